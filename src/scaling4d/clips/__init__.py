"""VIDEOS -> CLIPS: probe, cut, filter, remove duplicates, split, shard; the loader that replays the shards."""
