"""Hashes of the code, a DVC stage of its own, and `dvc repro` with several stages at a time."""
