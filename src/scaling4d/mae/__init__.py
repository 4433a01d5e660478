"""CLIPS -> MASKED TOKENS -> LOSS: the two papers' masked autoencoders, and encoders that others published."""
