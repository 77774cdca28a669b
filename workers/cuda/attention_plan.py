"""How the attention of a step is cut into items, each the work of one program of the kernel.

A *query row* is one query head of one token; the heads of a group lie side by side, so that they share each load of
keys and values. A *tile* is the query rows of some tokens that follow each other in a row of the batch; tiles are small
or large, see tiling.py. A *part* is a stretch of a context. An *item* is a tile with one part of its context. Where a
tile has several parts, each leaves its sums in a *slot*, and they are added up afterwards, in order.

Tiles and parts of a row follow from how many tokens the step computes of it and from the length of its context. So its
output has the same bits in whatever batch it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headwise.workers.cuda.tiling import SMALL_ROWS
from headwise.workers.model.attention import AttentionBatch

PART_KEYS = 512
"""A context has no more parts than there are so many keys in it, the last begun one counted."""

_MAX_PARTS = 64
"""The most parts of all tiles of a row together, as long as it has fewer tiles: they fill a GPU, and bound the sums."""
_KEYS_MULTIPLE = 128
"""Parts start at a multiple of it, and so at a whole number of the kernel's steps over keys."""

FIELDS = ("row", "first_token", "num_tokens", "first_position", "key_start", "key_end", "slot", "num_parts")
"""Of an item: ``num_tokens`` tokens from ``first_token`` of the step, the first at ``first_position`` of its ``row``,
and the keys ``[key_start, key_end)``. ``slot`` is -1 where the tile has just one of its ``num_parts``."""


class Items(NamedTuple):
    """The items of the rows that have tiles of one size.

    Attributes:
        items_I8: int32, a column for each of FIELDS.
        num_slots: how many slots they use.
    """

    items_I8: NDArray[np.int32]
    num_slots: int


def cut_step(batch: AttentionBatch, group: int, large_rows: int) -> tuple[Items, Items]:
    """Cuts a step into items of small tiles, and of large ones.

    Args:
        group: the most query heads that use a KV head.
        large_rows: query rows of a large tile.
    """
    small_B = np.diff(batch.query_starts_B1) * group <= SMALL_ROWS
    small = _cut(batch, np.flatnonzero(small_B), SMALL_ROWS // group)
    return small, _cut(batch, np.flatnonzero(~small_B), large_rows // group)


def max_slots(num_rows: int, context_len: int) -> int:
    """The most slots that rows with one token each and contexts of at most this length use."""
    parts = -(-context_len // PART_KEYS)
    return num_rows * min(_MAX_PARTS, parts) if parts > 1 else 0


def _cut(batch: AttentionBatch, rows_R: NDArray[Any], tokens_of_tile: int) -> Items:
    if not len(rows_R):
        return Items(np.empty((0, len(FIELDS)), np.int32), 0)
    starts_R = batch.query_starts_B1[rows_R].astype(np.int64)
    queries_R = batch.query_starts_B1[rows_R + 1] - starts_R
    contexts_R = batch.context_lens_B[rows_R].astype(np.int64)
    tiles_R = _ceil_div(queries_R, tokens_of_tile)
    part_keys_R = _part_keys(tiles_R, contexts_R)

    r_T, tile_T = _expand(tiles_R)
    offset_T = tile_T * tokens_of_tile
    tokens_T = np.minimum(tokens_of_tile, queries_R[r_T] - offset_T)
    position_T = contexts_R[r_T] - queries_R[r_T] + offset_T
    stop_T = position_T + tokens_T
    parts_T = _ceil_div(stop_T, part_keys_R[r_T])
    slots_T = np.where(parts_T > 1, parts_T, 0)
    slot_T = np.where(parts_T > 1, np.cumsum(slots_T) - slots_T, -1)

    t_I, part_I = _expand(parts_T)
    key_start_I = part_I * part_keys_R[r_T[t_I]]
    key_end_I = np.minimum(key_start_I + part_keys_R[r_T[t_I]], stop_T[t_I])
    slot_I = np.where(slot_T[t_I] >= 0, slot_T[t_I] + part_I, -1)
    columns = (
        *(rows_R[r_T[t_I]], (starts_R[r_T] + offset_T)[t_I], tokens_T[t_I], position_T[t_I]),
        *(key_start_I, key_end_I, slot_I, parts_T[t_I]),
    )
    items_I8 = np.stack(columns, axis=1).astype(np.int32)
    # Programs take items in turn: with the longest first, none is left with one when the others are done.
    order_I = np.argsort(key_start_I - key_end_I, kind="stable")
    return Items(np.ascontiguousarray(items_I8[order_I]), int(slots_T.sum()))


def _part_keys(tiles_R: NDArray[Any], contexts_R: NDArray[Any]) -> NDArray[Any]:
    most_R = np.maximum(1, _MAX_PARTS // tiles_R)
    parts_R = np.clip(_ceil_div(contexts_R, PART_KEYS), 1, most_R)
    keys_R: NDArray[Any] = _ceil_div(_ceil_div(contexts_R, parts_R), _KEYS_MULTIPLE) * _KEYS_MULTIPLE
    return keys_R


def _expand(counts_N: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """For counts of (2, 3): whose each is, (0, 0, 1, 1, 1), and its number among them, (0, 1, 0, 1, 2)."""
    stops_N = np.cumsum(counts_N)
    owner_M = np.repeat(np.arange(len(counts_N)), counts_N)
    return owner_M, np.arange(len(owner_M)) - np.repeat(stops_N - counts_N, counts_N)


def _ceil_div(a: Any, b: Any) -> Any:
    return -(-a // b)
