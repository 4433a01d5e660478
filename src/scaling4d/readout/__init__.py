"""CHECKPOINT -> RESULT: the same readouts for every encoder, five tasks about space and time."""
