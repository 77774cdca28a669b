"""Where kernels run: on a GPU, or, for tests without one, in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

import torch

TRITON = importlib.util.find_spec("triton") is not None
"""Whether it is installed. To import it takes a second, so who computes on a CPU does not."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter runs kernels on the CPU, slowly; read at import, as Triton does."""

FP_FUSION = True
"""Of every launch: a product and a sum become one instruction. Each launch says so, for what Triton does by itself will
be another in 3.10."""

_PROGRAMS_PER_PROCESSOR = 4


def num_programs(num_works: int | None, device: torch.device) -> int:
    """How many programs take so many works in turn: no more than a GPU holds at a time. None: any number of works."""
    most = _PROGRAMS_PER_PROCESSOR * _processors(device)
    return most if num_works is None else max(1, min(num_works, most))


def padded(size: int) -> int:
    """The next power of two, for ranges of Triton have no other sizes."""
    return 1 << (size - 1).bit_length()


@lru_cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 2
