"""A shard's KV blocks: on the device, in host memory, in files, and on their way."""
