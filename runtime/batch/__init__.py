"""Batches: many prompts from a file, computed side by side, their answers in another file. See docs/cluster.md."""
