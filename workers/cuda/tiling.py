"""The sizes of what a program of the attention kernel works on at a time, by dtype and head dim.

They are those with which nothing spills and shared memory suffices for sm_80 on; benchmarks/gpu_kernels.py shows what
each becomes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

SMALL_ROWS = 16
"""Query rows of a tile of a row that has no more of them: the least that tensor cores multiply."""


class Tiling(NamedTuple):
    """Attributes:
    rows: query rows of a tile.
    keys: keys that a program loads at a time; divides 128.
    warps: of 32 threads, of a program.
    stages: loads in flight, in steps over keys.
    """

    rows: int
    keys: int
    warps: int
    stages: int


def tilings(dtype: torch.dtype, head_dim: int, group: int) -> tuple[Tiling, Tiling]:
    """The tiling of small tiles, for rows with at most SMALL_ROWS query rows in a step, and that of large ones.

    Args:
        group: the most query heads that use a KV head; a large tile has room for one token at least.
    """
    wide, single = head_dim > 128, dtype is torch.float32
    keys, stages = (64, 3) if not (wide or single) else (32, 3) if not (wide and single) else (16, 2)
    large_rows = 64 if not single else 32 if head_dim <= 64 else 16
    large_rows = max(large_rows, 1 << (group - 1).bit_length())
    return Tiling(SMALL_ROWS, keys, 8 if wide and single else 4, stages), Tiling(large_rows, keys, 8, stages)
