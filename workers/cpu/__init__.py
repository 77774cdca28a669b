"""The forward pass of a shard on CPU cores, float32: one compiled call a step instead of hundreds of small ones."""
