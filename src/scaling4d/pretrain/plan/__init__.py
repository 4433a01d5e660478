"""What a scaling point will cost, without a GPU: parameters, FLOPs, memory, days."""
