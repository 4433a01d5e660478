"""CHECKPOINT -> FILLED-IN CLIPS and their fidelity."""
