"""VIDEOS -> FEATURES: an encoder over long videos, window by window."""
