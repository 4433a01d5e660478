"""One trainer for all that learns: processes, sharding, the optimizer, and how a run resumes."""
