"""VIDEOS -> FEATURES: an encoder over whole videos, window by window."""
