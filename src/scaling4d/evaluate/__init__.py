"""MODELS -> ONE TABLE: readouts of any encoders on a profile's labelled benchmarks, outside the pipeline."""
