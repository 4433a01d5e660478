"""CHECKPOINT -> FEATURES: encoders of this project, released ones, and those of transformers.

load: a Checkpoint folder as one of our models. pretrained: any encoder, for clips of a given size. published: the
kind of a released file. released: its arrays as weights of ours. transformers: that library's models. encoder: the
Python API.
"""
