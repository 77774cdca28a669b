"""Buckets: the numbers of rows that decode steps on a GPU are padded to, each with a graph of its own."""

from __future__ import annotations

_STEP = 8


def buckets_of(max_rows: int) -> tuple[int, ...]:
    """1, 2, 4, 8, 16, 24 and so on, up to the first that holds ``max_rows`` rows."""
    return tuple(sorted({bucket_of(rows) for rows in range(1, max_rows + 1)}))


def bucket_of(num_rows: int) -> int:
    """The smallest bucket that holds so many rows."""
    return 1 << (num_rows - 1).bit_length() if num_rows <= _STEP else -(-num_rows // _STEP) * _STEP
