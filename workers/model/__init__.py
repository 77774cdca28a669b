"""What a model is, on every device: configuration, weights, partition, and the interfaces of what computes it."""
