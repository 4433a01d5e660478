"""READOUTS -> PICTURES: predictions beside the truth."""
