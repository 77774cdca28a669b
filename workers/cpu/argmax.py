"""The best token of each row of logits, on CPU cores: one pass over them, nothing sorted."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from headwise.workers.cpu.pointwise_simd import best
from headwise.workers.cpu.team import launching, usable_threads
from headwise.workers.jit.kernel_cache import kernel


def argmax(logits_BV: Tensor, num_threads: int) -> Tensor:
    """The index of each row's largest value, int64: the first of equals; a NaN counts as larger than all.

    Args:
        logits_BV: float32, rows contiguous.
    """
    ids_B = np.empty(len(logits_BV), np.int64)
    rows, width = logits_BV.shape
    arguments = (logits_BV.data_ptr(), logits_BV.stride(0), rows, width, ids_B)
    # The whole team even for fewer rows: libgomp ends the threads that a call leaves out, and starts them anew later.
    threads = usable_threads(num_threads) if rows > 1 else 1
    with launching(threads):
        (_find_best_in_threads if threads > 1 else _find_best_alone)(*arguments)
    return torch.from_numpy(ids_B)


def _find_best(logits: int, stride: int, rows: int, width: int, ids_B: Any) -> None:
    for b in numba.prange(rows):
        ids_B[b] = best(logits + 4 * stride * b, width)


_find_best_alone = kernel(_find_best)
_find_best_in_threads = kernel(_find_best, parallel=True)
