"""One shard of the model: its slice of the weights, its KV memory, its kernels. Imports no Ray."""
