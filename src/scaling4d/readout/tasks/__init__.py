"""Five tasks: what the head is asked, what it is trained on, how it is measured."""
