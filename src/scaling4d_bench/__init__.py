"""SPEED AND MEMORY, ours beside others': the same work, in turns, in one run. Nothing of ours imports this room."""
