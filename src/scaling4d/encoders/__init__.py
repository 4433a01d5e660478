"""CHECKPOINT -> FEATURES: encoders of this project, released ones, and those of transformers."""
