"""CHECKPOINT -> FIDELITY of filled-in video."""
