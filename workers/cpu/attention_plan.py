"""How the CPU backend cuts the attention of a step into items that threads can take one by one.

A *query row* is one query head of one token; the heads of a group sit side by side, so that they share each load of
keys and values. A *tile* is TILE_KEYS keys, held by four *runs* of RUN_KEYS keys that may lie in different blocks. A
*chunk* is one to CHUNK_ROWS query rows that meet a tile together. A *part* is PART_KEYS keys of a context, counted from
its first key; the last part may have fewer. An *item* is some query rows of one row and KV head, with their whole
context or with one part of it.

Every query row sums up each part of its context by itself, and adds the parts one after the other. Which parts there
are follows from its position alone, so its output has the same bits in every batch and chunk, and for any number of
threads. For that, the queries of an item see the same parts: an item ends where a part does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headwise.workers.errors import InvalidValueError
from headwise.workers.jit.kernel_cache import kernel
from headwise.workers.model.attention import AttentionBatch

RUN_KEYS = 16
TILE_RUNS = 4
TILE_KEYS = RUN_KEYS * TILE_RUNS
CHUNK_ROWS = 6
PART_KEYS = 4 * TILE_KEYS

# Query rows of an item: their queries and outputs stay in the second-level cache while keys and values pass.
_MAX_ROWS = 96
# An item of more than 1 / (threads * this) of a step is divided into parts, so that threads idle less at its end.
_ITEMS_PER_THREAD = 4
# Starting threads costs about 10 us; what one thread does in about three times that, it does alone.
_PARALLEL_COST = 400_000

_FIELDS = (
    *("row", "kv_head", "first_head", "num_heads", "first_token", "num_tokens", "first_position"),
    *("key_start", "key_end", "num_parts", "sums_row", "cost"),
)
ITEM = np.dtype([(name, np.int64) for name in _FIELDS])
"""One item: ``num_tokens`` tokens from ``first_token`` of the step, the first at ``first_position`` of its row, and of
each the ``num_heads`` query heads from ``first_head``, which use ``kv_head``; all attend to the keys ``[key_start,
key_end)`` of the row: all ``num_parts`` parts of their context, or one of these. Where it is one, ``sums_row`` is
where the item's sums start among the ``sums_rows`` of the step, part after part; otherwise it is -1."""


class Sizes(NamedTuple):
    """What holds for every step of a shard.

    Attributes:
        num_blocks, kv_heads, block_size, head_dim: of the cache.
        max_rows: the most query rows of an item.
    """

    num_blocks: int
    kv_heads: int
    block_size: int
    head_dim: int
    max_rows: int


class StepItems(NamedTuple):
    """A step, cut.

    Attributes:
        items: ITEM [n], the costliest first where threads share them.
        tables_BN: int32, the batch's block tables, contiguous.
        sums_rows: for how many query rows of divided contexts there are sums to keep, padded_rows() of each item.
    """

    items: NDArray[Any]
    tables_BN: NDArray[np.int32]
    sums_rows: int


def rows_of_item(q_starts: NDArray[np.int64]) -> int:
    """The most query rows an item has: a multiple of 16 that holds at least one token of the largest group."""
    return int(padded_rows(max(_MAX_ROWS, int(np.diff(q_starts).max()))))


def cut_step(batch: AttentionBatch, sizes: Sizes, q_starts: NDArray[np.int64], num_threads: int) -> StepItems:
    """The items of a step for so many threads.

    Args:
        q_starts: [K + 1]; KV head k serves the query heads [q_starts[k], q_starts[k + 1]).

    Raises:
        InvalidValueError: a row's queries, context and blocks do not fit each other or the cache.
    """
    step = _cut(batch, sizes, q_starts, max_cost=0)
    cost = int(step.items["cost"].sum())
    if num_threads > 1 and cost * sizes.head_dim > _PARALLEL_COST:
        max_cost = cost // (num_threads * _ITEMS_PER_THREAD)
        if step.items["cost"].max() > max_cost:
            step = _cut(batch, sizes, q_starts, max_cost)
        step = step._replace(items=step.items[np.argsort(-step.items["cost"], kind="stable")])
    return step


def _cut(batch: AttentionBatch, sizes: Sizes, q_starts: NDArray[np.int64], max_cost: int) -> StepItems:
    starts_B1 = np.ascontiguousarray(batch.query_starts_B1, dtype=np.int32)
    lens_B = np.ascontiguousarray(batch.context_lens_B, dtype=np.int32)
    tables_BN = np.ascontiguousarray(batch.block_tables_BN, dtype=np.int32)
    capacity = 2 * len(lens_B) * sizes.kv_heads
    while True:
        items = np.empty(capacity, ITEM)
        num_items, sums_rows = cut_rows(starts_B1, lens_B, tables_BN, q_starts, sizes, max_cost, items)
        if num_items < 0:
            row = sums_rows
            given = (int(starts_B1[row]), int(starts_B1[row + 1]), int(lens_B[row]), tables_BN[row].tolist())
            limit = (
                f"row {row}: query range, context and block table do not fit each other or {sizes.num_blocks} blocks"
            )
            raise InvalidValueError("batch", given, limit)
        if num_items <= capacity:
            return StepItems(items[:num_items], tables_BN, sums_rows)
        capacity = num_items


@kernel
def padded_rows(rows: int) -> int:
    """The next multiple of 16: with so many rows, each row of sums starts on a cache line."""
    return (rows + 15) // 16 * 16


@kernel
def cut_rows(
    query_starts: Any, context_lens: Any, block_tables: Any, q_starts: Any, sizes: Sizes, max_cost: int, items: Any
) -> tuple[int, int]:
    """Cut a step into items; returns how many items and rows of sums there are, or (-1, row) of a row that makes no
    sense.

    Args:
        max_cost: what costs more is divided into the parts of its context; 0 is no limit.
        items: ITEM [capacity]; filled as far as it goes.
    """
    num_items = sums_rows = 0
    for row in range(len(context_lens)):
        first, context = query_starts[row], context_lens[row]
        queries = query_starts[row + 1] - first
        used = (context + sizes.block_size - 1) // sizes.block_size
        if (row == 0 and first != 0) or queries < 1 or queries > context or used > block_tables.shape[1]:
            return -1, row
        for block in block_tables[row, :used]:
            if block < 0 or block >= sizes.num_blocks:
                return -1, row
        for head in range(sizes.kv_heads):
            group = q_starts[head + 1] - q_starts[head]
            tokens_of_item = max(1, sizes.max_rows // group)
            token = 0
            while token < queries:
                position = context - queries + token
                tokens = min(tokens_of_item, queries - token, PART_KEYS - position % PART_KEYS)
                query_rows = QueryRows(row, head, q_starts[head], group, first + token, tokens)
                added = add_items(query_rows, position, max_cost, sums_rows, items[num_items:])
                num_items += added
                sums_rows += added * padded_rows(tokens * group) if added > 1 else 0
                token += tokens
    return num_items, sums_rows


class QueryRows(NamedTuple):
    """The query rows of an item, as ITEM names them."""

    row: int
    kv_head: int
    first_head: int
    num_heads: int
    first_token: int
    num_tokens: int


@kernel
def add_items(rows: QueryRows, position: int, max_cost: int, sums_row: int, items: Any) -> int:
    """Fill in the items of some query rows, as far as there is room; returns how many there are."""
    keys = position + rows.num_tokens
    num_rows = rows.num_tokens * rows.num_heads
    # What a key costs: its load, about as long as computing with six query rows, and the computing.
    key_cost = 6 + num_rows
    parts = position // PART_KEYS + 1
    divided = parts > 1 and 0 < max_cost < keys * key_cost
    count = parts if divided else 1
    for part in range(min(count, len(items))):
        item = items[part]
        item.row, item.kv_head = rows.row, rows.kv_head
        item.first_head, item.num_heads = rows.first_head, rows.num_heads
        item.first_token, item.num_tokens, item.first_position = rows.first_token, rows.num_tokens, position
        item.key_start = part * PART_KEYS
        item.key_end = min(item.key_start + PART_KEYS, keys) if divided else keys
        item.num_parts = parts
        item.sums_row = sums_row + part * padded_rows(num_rows) if divided else -1
        item.cost = (item.key_end - item.key_start) * key_cost
    return count
