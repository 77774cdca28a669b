"""How the CPU backend cuts the attention of a step into items that threads can take one by one.

A *query row* is one query head of one token; the heads of a KV head sit side by side, so that they share each load of
keys and values. A *tile* is TILE_KEYS keys, held by four *runs* of RUN_KEYS keys that may lie in different blocks. A
*chunk* is one to CHUNK_ROWS query rows that meet a tile together. A *part* of a context is what a query row sees of
PART_KEYS keys, counted from the start of the text; where a query sees sinks apart from its window, they are a part by
themselves, before all others. An *item* is some query rows of one row and KV head, with all parts of their context or
with one.

Every query row sums up each part of its context by itself, and adds the parts one after the other. Which parts there
are, and where their tiles begin, follows from its position alone, so its output has the same bits in every batch and
chunk, and for any number of threads. The queries of an item need not see the same keys: a tile or part of which a query
row sees nothing changes none of its bits. But they end in the same part, and either all see sinks apart or none does.

Positions and keys are those of a row's block table: of the text, less the row's shift, which is whole parts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headwise.workers.errors import InvalidValueError
from headwise.workers.jit.kernel_cache import kernel
from headwise.workers.model.attention import PART_KEYS, AttentionBatch

RUN_KEYS = 16
TILE_RUNS = 4
TILE_KEYS = RUN_KEYS * TILE_RUNS
CHUNK_ROWS = 6
NO_WINDOW = 1 << 40
"""The window of a query that sees everything before it."""

# Query rows of an item: their queries and outputs stay in the second-level cache while keys and values pass.
_MAX_ROWS = 96
# An item of more than 1 / (threads * this) of a step is divided into parts, so that threads idle less at its end.
_ITEMS_PER_THREAD = 4
# Starting threads costs about 10 us; what one thread does in about three times that, it does alone.
_PARALLEL_COST = 400_000

_FIELDS = (
    *("table", "kv_head", "first_head", "num_heads", "first_token", "num_tokens", "first_position", "window"),
    *("sinks", "key_start", "key_end", "part", "num_parts", "sums_row", "cost"),
)
ITEM = np.dtype([(name, np.int64) for name in _FIELDS])
"""One item: ``num_tokens`` tokens from ``first_token`` of the step, the first at ``first_position`` of the block table
``table``, and of each the ``num_heads`` query heads from ``first_head``, which use ``kv_head``.

They see the first ``sinks`` keys, with queries of their own, and of the keys ``[key_start, key_end)`` each its last
``window`` ones. That is all ``num_parts`` parts of their context, or one, the one numbered ``part``. Where it is one,
``sums_row`` is where the item's sums start among the ``sums_rows`` of the step, part after part; otherwise it is -1."""


class Sizes(NamedTuple):
    """What holds for every step of a shard.

    Attributes:
        kv_heads, block_size, head_dim: of the cache.
        max_rows: the most query rows of an item.
        key_form, value_form: how numbers are kept, see kv_records.py.
        key_group, value_group: how many numbers of a head share a scale; 0 if there are no scales.
        key_bytes, value_bytes: of a head in a block, for each 16 numbers of one token.
    """

    kv_heads: int
    block_size: int
    head_dim: int
    max_rows: int
    key_form: int = 0
    value_form: int = 0
    key_group: int = 0
    value_group: int = 0
    key_bytes: int = 64
    value_bytes: int = 64


class Groups(NamedTuple):
    """The groups of KV heads with the same reach, as arrays of int64.

    Attributes:
        blocks_G: how many blocks there are of each; 0 if no head here is in the group.
        sinks_G, windows_G: their reaches; NO_WINDOW where all is seen.
        kinds_XK: the group of each KV head, for each kind of layer.
    """

    blocks_G: NDArray[np.int64]
    sinks_G: NDArray[np.int64]
    windows_G: NDArray[np.int64]
    kinds_XK: NDArray[np.int64]


class StepItems(NamedTuple):
    """A step, cut.

    Attributes:
        items: ITEM [n]: of each kind of layer, the costliest first where threads share them.
        starts_X1: int64; the items of kind x are [starts[x], starts[x + 1]).
        tables_BN: int32, the batch's block tables, contiguous.
        sums_rows: for how many query rows of divided contexts a layer has sums to keep, padded_rows() of each item.
    """

    items: NDArray[Any]
    starts_X1: NDArray[np.int64]
    tables_BN: NDArray[np.int32]
    sums_rows: int


class _Rows(NamedTuple):
    """A batch's arrays, contiguous."""

    starts_B1: NDArray[np.int32]
    contexts_B: NDArray[np.int32]
    tables_BN: NDArray[np.int32]
    shifts_B: NDArray[np.int64]


def rows_of_item(q_starts: NDArray[np.int64]) -> int:
    """The most query rows an item has: a multiple of 16 that holds at least one token of the largest group."""
    return int(padded_rows(max(_MAX_ROWS, int(np.diff(q_starts).max()))))


def cut_step(
    batch: AttentionBatch, sizes: Sizes, groups: Groups, q_starts: NDArray[np.int64], num_threads: int
) -> StepItems:
    """The items of a step for so many threads.

    Args:
        q_starts: [K + 1]; KV head k serves the query heads [q_starts[k], q_starts[k + 1]).

    Raises:
        InvalidValueError: a row's queries, context, shift and blocks do not fit each other or the cache.
    """
    rows = _checked(batch, sizes, groups)
    kinds = [_cut_kind(rows, sizes, groups, kind_K, q_starts, num_threads) for kind_K in groups.kinds_XK]
    starts_X1 = np.cumsum([0, *(len(items) for items, _ in kinds)])
    items = kinds[0][0] if len(kinds) == 1 else np.concatenate([items for items, _ in kinds])
    return StepItems(items, starts_X1, rows.tables_BN, max(sums_rows for _, sums_rows in kinds))


def _checked(batch: AttentionBatch, sizes: Sizes, groups: Groups) -> _Rows:
    num_tables = len(batch.context_lens_B) * len(groups.blocks_G)
    shifts_B = np.zeros(num_tables, np.int64) if batch.shifts_B is None else batch.shifts_B
    rows = _Rows(
        np.ascontiguousarray(batch.query_starts_B1, dtype=np.int32),
        np.ascontiguousarray(batch.context_lens_B, dtype=np.int32),
        np.ascontiguousarray(batch.block_tables_BN, dtype=np.int32),
        np.ascontiguousarray(shifts_B, dtype=np.int64),
    )
    if len(rows.tables_BN) != num_tables or len(rows.shifts_B) != num_tables:
        shapes = (rows.tables_BN.shape, rows.shifts_B.shape)
        raise InvalidValueError("batch", shapes, f"must have {num_tables} block tables, and as many shifts")
    table = wrong_table(*rows, sizes.block_size, groups.blocks_G, groups.sinks_G, groups.windows_G)
    if table >= 0:
        group, row = divmod(table, len(rows.contexts_B))
        queries = (int(rows.starts_B1[row]), int(rows.starts_B1[row + 1]))
        given = (queries, int(rows.contexts_B[row]), int(rows.shifts_B[table]), rows.tables_BN[table].tolist())
        limit = (
            f"row {row}, group {group}: query range, context, shift and block table do not fit each other or "
            f"{groups.blocks_G[group]} blocks"
        )
        raise InvalidValueError("batch", given, limit)
    return rows


def _cut_kind(
    rows: _Rows, sizes: Sizes, groups: Groups, kind_K: NDArray[np.int64], q_starts: NDArray[np.int64], num_threads: int
) -> tuple[NDArray[Any], int]:
    """The items of a kind of layer, and their rows of sums."""
    items, sums_rows = _cut(rows, sizes, groups, kind_K, q_starts, max_cost=0)
    cost = int(items["cost"].sum())
    if num_threads > 1 and cost * sizes.head_dim > _PARALLEL_COST:
        max_cost = cost // (num_threads * _ITEMS_PER_THREAD)
        if items["cost"].max() > max_cost:
            items, sums_rows = _cut(rows, sizes, groups, kind_K, q_starts, max_cost)
        items = items[np.argsort(-items["cost"], kind="stable")]
    return items, sums_rows


def _cut(
    rows: _Rows, sizes: Sizes, groups: Groups, kind_K: NDArray[np.int64], q_starts: NDArray[np.int64], max_cost: int
) -> tuple[NDArray[Any], int]:
    capacity = 2 * len(rows.contexts_B) * sizes.kv_heads
    while True:
        items = np.empty(capacity, ITEM)
        shape = (rows.starts_B1, rows.contexts_B, rows.shifts_B, q_starts)
        num_items, sums_rows = cut_rows(
            *shape, kind_K, groups.sinks_G, groups.windows_G, sizes.max_rows, max_cost, items
        )
        if num_items <= capacity:
            return items[:num_items], sums_rows
        capacity = num_items


@kernel
def padded_rows(rows: int) -> int:
    """The next multiple of 16: with so many rows, each row of sums starts on a cache line."""
    return (rows + 15) // 16 * 16


@kernel
def wrong_table(
    query_starts: Any,
    context_lens: Any,
    tables: Any,
    shifts: Any,
    block_size: int,
    blocks: Any,
    sinks: Any,
    windows: Any,
) -> int:
    """The first block table that makes no sense; -1 if all do. What no query sees may be anything."""
    num_rows = len(context_lens)
    for group in range(len(blocks)):
        if blocks[group] == 0:
            continue
        span, sinks_blocks = sinks[group] + windows[group], (sinks[group] + block_size - 1) // block_size
        for row in range(num_rows):
            table = group * num_rows + row
            first, context, shift = query_starts[row], context_lens[row], shifts[table]
            queries = query_starts[row + 1] - first
            if (row == 0 and first != 0) or queries < 1 or queries > context:
                return table
            position = context - queries
            # The window of the row's first query is the first to begin.
            first_key = (position - windows[group] + 1 if position >= span else 0) - shift
            if shift < 0 or shift % block_size != 0 or shift % PART_KEYS != 0:
                return table
            if shift > 0 and first_key < max(sinks[group] + 1, sinks_blocks * block_size):
                return table
            used = (context - shift + block_size - 1) // block_size
            if used > tables.shape[1]:
                return table
            seen_apart = sinks_blocks if context > span else 0
            for index in range(used):
                seen = index < seen_apart or index >= first_key // block_size
                if seen and (tables[table, index] < 0 or tables[table, index] >= blocks[group]):
                    return table
    return -1


@kernel
def cut_rows(
    query_starts: Any,
    context_lens: Any,
    shifts: Any,
    q_starts: Any,
    kind: Any,
    sinks: Any,
    windows: Any,
    max_rows: int,
    max_cost: int,
    items: Any,
) -> tuple[int, int]:
    """Cut a step into items; returns how many items and rows of sums there are.

    Args:
        kind: the group of each KV head.
        max_cost: what costs more is divided into the parts of its context; 0 is no limit.
        items: ITEM [capacity]; filled as far as it goes.
    """
    num_items = sums_rows = 0
    num_rows = len(context_lens)
    for row in range(num_rows):
        first, context = query_starts[row], context_lens[row]
        queries = query_starts[row + 1] - first
        for head in range(len(kind)):
            group, num_heads = kind[head], q_starts[head + 1] - q_starts[head]
            table, span = group * num_rows + row, sinks[group] + windows[group]
            tokens_of_item = max(1, max_rows // num_heads)
            token = 0
            while token < queries:
                position = context - queries + token
                tokens = min(tokens_of_item, queries - token, PART_KEYS - position % PART_KEYS)
                seen = Seen(position - shifts[table], NO_WINDOW, 0)
                if position < span:
                    tokens = min(tokens, span - position)
                else:
                    seen = Seen(position - shifts[table], windows[group], sinks[group])
                query_rows = QueryRows(table, head, q_starts[head], num_heads, first + token, tokens)
                added = add_items(query_rows, seen, max_cost, sums_rows, items[num_items:])
                num_items += added
                sums_rows += added * padded_rows(tokens * num_heads) if added > 1 else 0
                token += tokens
    return num_items, sums_rows


class QueryRows(NamedTuple):
    """The query rows of an item, as ITEM names them."""

    table: int
    kv_head: int
    first_head: int
    num_heads: int
    first_token: int
    num_tokens: int


class Seen(NamedTuple):
    """What the query rows of an item see: the first one's position, and what ITEM calls window and sinks."""

    position: int
    window: int
    sinks: int


@kernel
def add_items(rows: QueryRows, seen: Seen, max_cost: int, sums_row: int, items: Any) -> int:
    """Fill in the items of some query rows, as far as there is room; returns how many there are."""
    key_start, key_end = max(0, seen.position - seen.window + 1), seen.position + rows.num_tokens
    num_rows = rows.num_tokens * rows.num_heads
    # What a key costs: its load, about as long as computing with six query rows, and the computing.
    key_cost = 6 + num_rows
    apart = 1 if seen.sinks > 0 else 0
    first_stretch = key_start // PART_KEYS
    parts = apart + seen.position // PART_KEYS - first_stretch + 1
    divided = parts > 1 and 0 < max_cost < (seen.sinks + key_end - key_start) * key_cost
    count = parts if divided else 1
    for part in range(min(count, len(items))):
        item = items[part]
        item.table, item.kv_head = rows.table, rows.kv_head
        item.first_head, item.num_heads = rows.first_head, rows.num_heads
        item.first_token, item.num_tokens = rows.first_token, rows.num_tokens
        item.first_position, item.window, item.sinks = seen.position, seen.window, seen.sinks
        item.key_start, item.key_end = key_start, key_end
        item.part, item.num_parts = part, parts
        item.sums_row = sums_row + part * padded_rows(num_rows) if divided else -1
        if divided and part < apart:
            item.key_end = key_start
        elif divided:
            stretch = (first_stretch + part - apart) * PART_KEYS
            item.sinks = 0
            item.key_start, item.key_end = max(key_start, stretch), min(key_end, stretch + PART_KEYS)
        item.cost = (item.sinks + item.key_end - item.key_start) * key_cost
    return count
