"""Which attention backend computes on a device."""

from __future__ import annotations

import torch

from headwise.workers.cpu.attention import CpuAttention
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.cache import KVCache
from headwise.workers.model.attention import AttentionBackend
from headwise.workers.reference.attention import ReferenceAttention

_BACKENDS: dict[str, type[AttentionBackend]] = {"reference": ReferenceAttention, "cpu": CpuAttention}


def create_backend(
    name: str, cache: KVCache, q_starts: tuple[int, ...], scale: float, num_threads: int = 1
) -> AttentionBackend:
    """The backend of that name, ``"reference"`` or ``"cpu"``; see :class:`AttentionBackend` for the arguments.

    Raises:
        InvalidValueError: no such backend, or it cannot work on this cache.
    """
    return _backend(name)(cache, q_starts, scale, num_threads)


def default_backend(device: torch.device | str, dtype: torch.dtype, block_size: int, head_dim: int) -> str:
    """The fastest backend that can work on such a cache."""
    fits = torch.device(device).type == "cpu" and CpuAttention.supports(dtype, block_size, head_dim)
    return "cpu" if fits else "reference"


def transposed_keys(name: str) -> bool:
    """Whether the cache for this backend is to be built with ``transposed_keys``."""
    return bool(_backend(name).transposed_keys)


def _backend(name: str) -> type[AttentionBackend]:
    if name not in _BACKENDS:
        raise InvalidValueError("attention_backend", name, f"must be one of {', '.join(_BACKENDS)}")
    return _BACKENDS[name]
