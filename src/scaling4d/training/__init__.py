"""One trainer for all that learns."""
