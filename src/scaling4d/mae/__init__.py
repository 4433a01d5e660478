"""CLIPS -> MASKED TOKENS -> LOSS: the two papers' masked autoencoders."""
