"""SETTINGS -> A DATA SET: labelled 4D scenes in the benchmarks' own formats. `experiments/pocket` is its output."""
