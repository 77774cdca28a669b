"""How the CPU backend cuts the attention of a step into items that threads can take one by one.

A *query row* is one query head of one token; the heads of a group sit side by side, so that they share each load of
keys and values. A *tile* is TILE_KEYS keys, held by four *runs* of RUN_KEYS keys that may lie in different blocks. A
*chunk* is one to CHUNK_ROWS query rows that meet a tile together. An *item* is a stretch of one row's context and some
of its query rows of one KV head; a context that is divided over several items leaves *parts*, combined at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwise.workers.errors import InvalidValueError
from headwise.workers.jit.kernel_cache import kernel
from headwise.workers.kv.cache import KVCache
from headwise.workers.model.attention import AttentionBatch

RUN_KEYS = 16
TILE_RUNS = 4
TILE_KEYS = RUN_KEYS * TILE_RUNS
CHUNK_ROWS = 6

# The fields of an item: a stretch of one row's context that some of its query rows, of one KV head, attend to.
ROW, KV_HEAD, FIRST_TOKEN, NUM_TOKENS, FIRST_POSITION, KEY_START, KEY_END, PART, NUM_PARTS, COST = range(10)
ITEM_FIELDS = 10

# Query rows of an item: their queries and outputs stay in the second-level cache while keys and values pass.
_MAX_ROWS = 96
# An item of more than 1 / (threads * this) of a step is divided, so that threads idle for less than that at its end.
_ITEMS_PER_THREAD = 4
# Starting threads costs about 10 us; what one thread does in about three times that, it does alone.
_PARALLEL_COST = 400_000


@dataclass(frozen=True, slots=True)
class StepItems:
    """What is worked out once a step and used by every layer.

    Attributes:
        items: [n, ITEM_FIELDS], the costliest first where threads share them.
        tables_BN, slots_T: the batch's, contiguous.
        num_parts: how many items leave a part to combine.
        parallel: whether the step is worth more than one thread.
    """

    batch: AttentionBatch
    items: NDArray[np.int64]
    tables_BN: NDArray[np.int32]
    slots_T: NDArray[np.int64]
    num_parts: int
    parallel: bool


def rows_of_item(q_starts: NDArray[np.int64]) -> int:
    """The most query rows an item has: a multiple of 16 that holds at least one token of the largest group."""
    return -(-max(_MAX_ROWS, int(np.diff(q_starts).max())) // 16) * 16


def cut_step(batch: AttentionBatch, cache: KVCache, q_starts: NDArray[np.int64], num_threads: int) -> StepItems:
    """The items of a step for so many threads.

    Raises:
        InvalidValueError: a row's queries, context and blocks do not fit each other or the cache.
    """
    tables_BN = np.ascontiguousarray(batch.block_tables_BN.numpy(), dtype=np.int32)
    slots_T = np.ascontiguousarray(batch.slots_T.numpy(), dtype=np.int64)
    items, num_parts = _cut(batch, cache, tables_BN, q_starts, max_cost=0)
    cost = int(items[:, COST].sum())
    parallel = num_threads > 1 and cost * cache.head_dim > _PARALLEL_COST
    if parallel:
        max_cost = cost // (num_threads * _ITEMS_PER_THREAD)
        if items[:, COST].max() > max_cost:
            items, num_parts = _cut(batch, cache, tables_BN, q_starts, max_cost)
        items = items[np.argsort(-items[:, COST], kind="stable")]
    return StepItems(batch, items, tables_BN, slots_T, num_parts, parallel)


def _cut(
    batch: AttentionBatch, cache: KVCache, tables_BN: NDArray[np.int32], q_starts: NDArray[np.int64], max_cost: int
) -> tuple[NDArray[np.int64], int]:
    starts_B1 = np.ascontiguousarray(batch.query_starts_B1.numpy(), dtype=np.int32)
    lens_B = np.ascontiguousarray(batch.context_lens_B.numpy(), dtype=np.int32)
    limits = (cache.num_blocks, cache.block_size, len(batch.slots_T), rows_of_item(q_starts), max_cost)
    capacity = 2 * len(lens_B) * cache.num_kv_heads
    while True:
        items = np.empty((capacity, ITEM_FIELDS), dtype=np.int64)
        num_items, num_parts = plan_items(starts_B1, lens_B, tables_BN, q_starts, limits, items)
        if num_items < 0:
            row = num_parts
            given = (int(starts_B1[row]), int(starts_B1[row + 1]), int(lens_B[row]), tables_BN[row].tolist())
            limit = (
                f"row {row}: query range, context and block table do not fit each other or {cache.num_blocks} blocks"
            )
            raise InvalidValueError("batch", given, limit)
        if num_items <= capacity:
            return items[:num_items], num_parts
        capacity = num_items


def _plan_items(
    query_starts: Any, context_lens: Any, block_tables: Any, q_starts: Any, limits: Any, items: Any
) -> tuple[int, int]:
    """Cut a step into items; returns how many items and parts there are, or (-1, row) of a row that makes no sense.

    limits: [num_blocks, block_size, tokens of the step, most query rows an item has, most it may cost (0: no limit)].
    items: int64 [capacity, ITEM_FIELDS]; filled as far as it goes.
    """
    num_blocks, block_size, num_tokens, max_rows, max_cost = limits
    num_items = num_parts = 0
    for row in range(len(context_lens)):
        first, context = query_starts[row], context_lens[row]
        queries = query_starts[row + 1] - first
        used = (context + block_size - 1) // block_size
        sound = first >= 0 and 1 <= queries <= context and first + queries <= num_tokens
        if not sound or used > block_tables.shape[1]:
            return -1, row
        for block in block_tables[row, :used]:
            if block < 0 or block >= num_blocks:
                return -1, row
        for head in range(len(q_starts) - 1):
            group = q_starts[head + 1] - q_starts[head]
            tokens_of_item = max(1, max_rows // group)
            for token in range(0, queries, tokens_of_item):
                tokens = min(tokens_of_item, queries - token)
                # What a key costs: its load, about as long as computing with six query rows, and the computing.
                key_cost = 6 + tokens * group
                place = (row, head, first + token, tokens, context - queries + token)
                parts = divide_context(place, key_cost, max_cost, num_parts, items[num_items:])
                num_items += parts
                num_parts += parts if parts > 1 else 0
    return num_items, num_parts


def _divide_context(place: Any, key_cost: int, max_cost: int, next_part: int, items: Any) -> int:
    """Fill in the items of one tile of queries, as far as there is room; returns how many there are."""
    row, head, token, tokens, position = place
    keys = position + tokens
    # Every query must see a key in every part, so only the tiles that all of them see are divided.
    tiles = position // TILE_KEYS + 1
    parts = min(tiles, (keys * key_cost + max_cost - 1) // max_cost) if max_cost > 0 else 1
    for part in range(min(parts, len(items))):
        item = items[part]
        item[ROW], item[KV_HEAD], item[FIRST_TOKEN], item[NUM_TOKENS] = row, head, token, tokens
        item[FIRST_POSITION], item[NUM_PARTS] = position, parts
        item[KEY_START] = tiles * part // parts * TILE_KEYS
        item[KEY_END] = tiles * (part + 1) // parts * TILE_KEYS if part + 1 < parts else keys
        item[PART] = next_part + part if parts > 1 else -1
        item[COST] = (item[KEY_END] - item[KEY_START]) * key_cost
    return parts


plan_items = kernel(_plan_items)
divide_context = kernel(_divide_context)
