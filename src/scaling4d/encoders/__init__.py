"""A checkpoint becomes features: released weights, encoders of other libraries, and features that stay on disk."""
