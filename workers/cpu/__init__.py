"""The forward pass of a shard on CPU cores, float32: a few compiled calls a step instead of hundreds of small ones."""

from headwise.workers.cpu.llama import CpuLlama

__all__ = ["CpuLlama"]
