"""What DVC runs beside the stages of the story: hashes of the code, and stages in parallel."""
