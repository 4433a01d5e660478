"""LOSS -> CHECKPOINT: train a point of the ladder on the curated clips."""
