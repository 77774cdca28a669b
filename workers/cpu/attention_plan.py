"""How the CPU backend cuts the attention of a step into items that threads can take one by one.

A *query row* is one query head of one token; the heads of a group sit side by side, so that they share each load of
keys and values. A *tile* is TILE_KEYS keys, held by four *runs* of RUN_KEYS keys that may lie in different blocks. A
*chunk* is one to CHUNK_ROWS query rows that meet a tile together. An *item* is a stretch of one row's context and some
of its query rows of one KV head; a context that is divided over several items leaves *parts*, combined at the end.
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

# Query rows of an item: their queries and outputs stay in the second-level cache while keys and values pass.
_MAX_ROWS = 96
# An item of more than 1 / (threads * this) of a step is divided, so that threads idle for less than that at its end.
_ITEMS_PER_THREAD = 4
# Starting threads costs about 10 us; what one thread does in about three times that, it does alone.
_PARALLEL_COST = 400_000

_FIELDS = (
    *("row", "kv_head", "first_head", "num_heads", "first_token", "num_tokens", "first_position"),
    *("key_start", "key_end", "part", "num_parts", "cost"),
)
ITEM = np.dtype([(name, np.int64) for name in _FIELDS])
"""One item: ``num_tokens`` tokens from ``first_token`` of the step, the first at ``first_position`` of its row, and of
each the ``num_heads`` query heads from ``first_head``, which use ``kv_head``; all attend to the keys ``[key_start,
key_end)`` of the row. ``part`` is -1 unless the context is divided, into ``num_parts``."""


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
        num_parts: how many items leave a part to combine.
    """

    items: NDArray[Any]
    tables_BN: NDArray[np.int32]
    num_parts: int


def rows_of_item(q_starts: NDArray[np.int64]) -> int:
    """The most query rows an item has: a multiple of 16 that holds at least one token of the largest group."""
    return -(-max(_MAX_ROWS, int(np.diff(q_starts).max())) // 16) * 16


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
        num_items, num_parts = cut_rows(starts_B1, lens_B, tables_BN, q_starts, sizes, max_cost, items)
        if num_items < 0:
            row = num_parts
            given = (int(starts_B1[row]), int(starts_B1[row + 1]), int(lens_B[row]), tables_BN[row].tolist())
            limit = (
                f"row {row}: query range, context and block table do not fit each other or {sizes.num_blocks} blocks"
            )
            raise InvalidValueError("batch", given, limit)
        if num_items <= capacity:
            return StepItems(items[:num_items], tables_BN, num_parts)
        capacity = num_items


@kernel
def cut_rows(
    query_starts: Any, context_lens: Any, block_tables: Any, q_starts: Any, sizes: Sizes, max_cost: int, items: Any
) -> tuple[int, int]:
    """Cut a step into items; returns how many items and parts there are, or (-1, row) of a row that makes no sense.

    Args:
        max_cost: the most an item may cost; 0 is no limit.
        items: ITEM [capacity]; filled as far as it goes.
    """
    num_items = num_parts = 0
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
            for token in range(0, queries, tokens_of_item):
                tokens = min(tokens_of_item, queries - token)
                query_rows = QueryRows(row, head, q_starts[head], group, first + token, tokens)
                parts = divide_context(query_rows, context - queries + token, max_cost, num_parts, items[num_items:])
                num_items += parts
                num_parts += parts if parts > 1 else 0
    return num_items, num_parts


class QueryRows(NamedTuple):
    """The query rows of an item, as ITEM names them."""

    row: int
    kv_head: int
    first_head: int
    num_heads: int
    first_token: int
    num_tokens: int


@kernel
def divide_context(rows: QueryRows, position: int, max_cost: int, next_part: int, items: Any) -> int:
    """Fill in the items of some query rows, as far as there is room; returns how many there are."""
    keys = position + rows.num_tokens
    # What a key costs: its load, about as long as computing with six query rows, and the computing.
    key_cost = 6 + rows.num_tokens * rows.num_heads
    # Every query must see a key in every part, so only the tiles that all of them see are divided.
    tiles = position // TILE_KEYS + 1
    parts = min(tiles, (keys * key_cost + max_cost - 1) // max_cost) if max_cost > 0 else 1
    for part in range(min(parts, len(items))):
        item = items[part]
        item.row, item.kv_head = rows.row, rows.kv_head
        item.first_head, item.num_heads = rows.first_head, rows.num_heads
        item.first_token, item.num_tokens, item.first_position = rows.first_token, rows.num_tokens, position
        item.key_start = tiles * part // parts * TILE_KEYS
        item.key_end = tiles * (part + 1) // parts * TILE_KEYS if part + 1 < parts else keys
        item.part, item.num_parts = next_part + part if parts > 1 else -1, parts
        item.cost = (item.key_end - item.key_start) * key_cost
    return parts
