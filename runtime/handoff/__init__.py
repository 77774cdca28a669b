"""Handing a prompt's KV from the engine that computes it (prefill) to the engine that goes on from it (decode)."""
