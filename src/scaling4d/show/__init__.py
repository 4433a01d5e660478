"""What readouts predict, drawn beside the truth."""
