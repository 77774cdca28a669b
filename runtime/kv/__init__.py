"""Who owns which KV block. Imports no torch: tested without a model."""
