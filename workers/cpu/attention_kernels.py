"""The compiled loops of the CPU attention backend.

The softmax is the online one of FlashAttention (Dao et al., 2022); dividing a context over threads and adding up its
parts is Flash-Decoding (Dao et al., 2023). Items, tiles, runs, chunks, query rows and parts are those of
attention_plan.py. Whether a context is divided must not change a bit: in either case a part is summed up by itself, and
``add_part`` adds the parts in their order. Keys and values that are not float32 are expanded to that, tile by tile.
Addresses are bytes; strides and offsets count floats.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from headwise.workers.cpu import attention_simd as simd
from headwise.workers.cpu.attention_plan import (
    CHUNK_ROWS,
    NO_WINDOW,
    RUN_KEYS,
    TILE_KEYS,
    TILE_RUNS,
    Sizes,
    padded_rows,
)
from headwise.workers.cpu.kv_records import LayerKV, expand_keys_of_run, expand_values_of_run, plane_of, values_of_tile
from headwise.workers.cpu.kv_records_simd import FLOAT32
from headwise.workers.cpu.pointwise_simd import blend, fill, scaled
from headwise.workers.cpu.team import Team, clear, join, meet, take_job
from headwise.workers.jit.kernel_cache import kernel
from headwise.workers.jit.native import load_float, load_int, store_float, store_int
from headwise.workers.model.attention import PART_KEYS

_ADDRESS_BYTES, _FLOAT_BYTES, _LANES = 8, 4, 16
_RUNS_BYTES = _ADDRESS_BYTES * TILE_RUNS
_LOCATED_BYTES = 4 * _RUNS_BYTES


class Work(NamedTuple):
    """The attention of a step.

    Attributes:
        items, starts_X1, tables_BN, sums_rows: see :class:`~headwise.workers.cpu.attention_plan.StepItems`.
        scale: float32, of the scores, which are powers of 2.
        scratch: the address of ``scratch_bytes`` for each thread: scratch_floats(), aligned to 64 bytes.
        sums: the address of sums_floats() floats.
    """

    items: NDArray[Any]
    starts_X1: NDArray[np.int64]
    tables_BN: NDArray[np.int32]
    sums_rows: int
    scale: np.float32
    scratch: int
    scratch_bytes: int
    sums: int


class Heads(NamedTuple):
    """The address of the first head of the first token, and how far apart tokens and heads lie."""

    address: int
    token_stride: int
    head_stride: int


class Sums(NamedTuple):
    """The addresses of what query rows have summed up of a stretch of keys.

    Attributes:
        highest: the highest score so far of each query row; total: its sum of weights, in _LANES lanes.
        output: [query rows, head_dim], not yet divided by the sum of weights.
    """

    highest: int
    total: int
    output: int


class Scratch(NamedTuple):
    """The addresses of what a thread works in for one item.

    Attributes:
        runs: of keys, then of values, of the tile, then the offset of each run in its block; next_runs: of the tile
            after it.
        expanded: where the runs of keys, then of values, of an expanded tile are.
        tile: the floats of an expanded tile.
        scores: of a chunk, [CHUNK_ROWS, TILE_KEYS]; alpha: what its sums so far are to be multiplied with.
        packed: the queries as chunks of [head_dim, rows of the chunk].
        whole: the sums of all parts so far; part: those of a part after the first.
    """

    runs: int
    next_runs: int
    expanded: int
    tile: int
    scores: int
    alpha: int
    packed: int
    whole: Sums
    part: Sums


def scratch_floats(sizes: Sizes) -> int:
    """What a thread needs: three lists of runs, an expanded tile, scores and factors of a chunk, queries, and sums
    twice."""
    located, tile = 3 * _LOCATED_BYTES // _FLOAT_BYTES, int(tile_floats(sizes))
    queries = sizes.max_rows * sizes.head_dim
    return located + tile + CHUNK_ROWS * TILE_KEYS + 16 + queries + 2 * sums_floats(sizes.max_rows, sizes.head_dim)


def sums_floats(rows: int, head_dim: int) -> int:
    """What the sums of query rows take."""
    return rows * (1 + _LANES + head_dim)


@kernel(parallel=True)
def attend_in_threads(
    work: Work, sizes: Sizes, q: Heads, q_sinks: Heads, kv: LayerKV, o: Heads, team: int, threads: int
) -> None:
    clear(team, threads)
    for _ in numba.prange(threads):
        attend_alone(work, sizes, q, q_sinks, kv, o, team, threads)


@kernel
def attend_alone(
    work: Work, sizes: Sizes, q: Heads, q_sinks: Heads, kv: LayerKV, o: Heads, team: int, threads: int
) -> None:
    """Attend as one of a team, whose memory is at an address."""
    member = join(team, threads)
    if member.member >= 0:
        attend(member, work, sizes, q, q_sinks, kv, o)


@kernel
def attend(team: Team, work: Work, sizes: Sizes, q: Heads, q_sinks: Heads, kv: LayerKV, o: Heads) -> None:
    """One or two stages of a team: its members attend for the items, longest first, then add up divided contexts.

    Args:
        q_sinks: the queries that see sinks apart from the window; read only where items have sinks.
    """
    items = work.items[work.starts_X1[kv.kind] : work.starts_X1[kv.kind + 1]]
    scratch = divide_scratch(work.scratch + team.member * work.scratch_bytes, sizes)
    last, done = len(items) - 1, 0
    i = take_job(team, len(items), 0)
    while i >= 0:
        done += 1
        after = take_job(team, len(items), done)
        next_item = items[after if after >= 0 else last]
        attend_item(work, sizes, items[i], next_item, q, q_sinks, kv, o, scratch)
        i = after
    meet(team)
    if work.sums_rows > 0:
        add_divided(work, items, sizes, o, team.member, team.size)
        meet(team)


@kernel
def tile_floats(sizes: Sizes) -> int:
    """Of an expanded tile of keys and values; 0 where none is needed."""
    return 0 if sizes.key_form == FLOAT32 else 2 * values_of_tile(sizes)


@kernel
def divide_scratch(address: int, sizes: Sizes) -> Scratch:
    tile = address + 3 * _LOCATED_BYTES
    scores = tile + _FLOAT_BYTES * tile_floats(sizes)
    alpha = scores + _FLOAT_BYTES * CHUNK_ROWS * TILE_KEYS
    packed = alpha + _FLOAT_BYTES * 16
    whole = packed + _FLOAT_BYTES * sizes.max_rows * sizes.head_dim
    part = whole + _FLOAT_BYTES * sizes.max_rows * (1 + _LANES + sizes.head_dim)
    max_rows = sizes.max_rows
    expanded = address + 2 * _LOCATED_BYTES
    for run in range(2 * TILE_RUNS):
        store_int(expanded, run, tile + _FLOAT_BYTES * run * RUN_KEYS * sizes.head_dim)
    return Scratch(
        address,
        address + _LOCATED_BYTES,
        expanded,
        tile,
        scores,
        alpha,
        packed,
        place_sums(whole, max_rows),
        place_sums(part, max_rows),
    )


@kernel
def place_sums(address: int, rows: int) -> Sums:
    """Sums of so many query rows, a multiple of 16, so that each row's lanes start on a cache line."""
    total = address + _FLOAT_BYTES * rows
    return Sums(address, total, total + _FLOAT_BYTES * rows * _LANES)


@kernel
def sums_of_part(work: Work, sizes: Sizes, item: Any, part: int) -> Sums:
    """Where the sums of a divided context lie, so many parts after the item's own."""
    rows = padded_rows(item.num_tokens * item.num_heads)
    first = item.sums_row + part * rows
    sums: Sums = place_sums(work.sums + _FLOAT_BYTES * first * (1 + _LANES + sizes.head_dim), rows)
    return sums


class Part(NamedTuple):
    """A part of a context, as an item sees it.

    Attributes:
        start: the first key of its first tile.
        first_key: the first that a query row sees; end: after the last one.
        position, window: query row m sees the last ``window`` keys up to ``position`` and its token's place in the
            item.
        sinks: whether it is the sinks apart from the window.
    """

    start: int
    first_key: int
    end: int
    position: int
    window: int
    sinks: bool


@kernel
def place_part(item: Any, number: int) -> Part:
    """One of an item's own parts, counted from its first."""
    if item.sinks > 0:
        if number == 0:
            return Part(0, 0, item.sinks, item.sinks, NO_WINDOW, True)
        number -= 1
    start = (item.key_start // PART_KEYS + number) * PART_KEYS
    first_key, end = max(start, item.key_start), min(start + PART_KEYS, item.key_end)
    return Part(first_key // TILE_KEYS * TILE_KEYS, first_key, end, item.first_position, item.window, False)


@kernel
def attend_item(
    work: Work,
    sizes: Sizes,
    item: Any,
    next_item: Any,
    q: Heads,
    q_sinks: Heads,
    kv: LayerKV,
    o: Heads,
    scratch: Scratch,
) -> None:
    """Attend for one item, and fetch the next one's first tile ahead."""
    tables_BN = work.tables_BN
    num_rows = item.num_tokens * item.num_heads
    divided = item.sums_row >= 0
    num_parts = 1 if divided else item.num_parts
    runs, next_runs = scratch.runs, scratch.next_runs
    part, packed = place_part(item, 0), False
    locate_runs(item, part, part.start, tables_BN, sizes, kv, next_runs)
    for number in range(num_parts):
        if not packed:
            pack_queries(item, sizes, q_sinks if part.sinks else q, work.scale, scratch.packed)
            packed = not part.sinks
        last = number + 1 == num_parts
        item_after = next_item if last else item
        part_after = place_part(item_after, 0 if last else number + 1)
        sums = sums_of_part(work, sizes, item, 0) if divided else scratch.whole if number == 0 else scratch.part
        fill(sums.highest, num_rows, np.float32(-np.inf))
        fill(sums.total, num_rows * _LANES, np.float32(0.0))
        fill(sums.output, num_rows * sizes.head_dim, np.float32(0.0))
        for key in range(part.start, part.end, TILE_KEYS):
            runs, next_runs = next_runs, runs
            if key + TILE_KEYS < part.end:
                locate_runs(item, part, key + TILE_KEYS, tables_BN, sizes, kv, next_runs)
            else:
                locate_runs(item_after, part_after, part_after.start, tables_BN, sizes, kv, next_runs)
            attend_tile(item, part, key, sizes, runs, next_runs, scratch, sums)
        if not divided and number > 0:
            add_part(scratch.part, scratch.whole, num_rows, sizes.head_dim)
        part = part_after
    if not divided:
        store_outputs(item, sizes, scratch.whole, o)


@kernel
def pack_queries(item: Any, sizes: Sizes, q: Heads, scale: Any, packed: int) -> None:
    """Lay the item's query rows out as chunks of [head_dim, rows of the chunk], multiplied with the scale."""
    num_rows = item.num_tokens * item.num_heads
    m = 0
    for token in range(item.first_token, item.first_token + item.num_tokens):
        for head in range(item.first_head, item.first_head + item.num_heads):
            chunk = m // CHUNK_ROWS * CHUNK_ROWS
            rows = min(CHUNK_ROWS, num_rows - chunk)
            source, target = q.token_stride * token + q.head_stride * head, chunk * sizes.head_dim + m - chunk
            for d in range(sizes.head_dim):
                store_float(packed, target + d * rows, load_float(q.address, source + d) * scale)
            m += 1


@kernel
def locate_runs(item: Any, part: Part, key: int, tables_BN: Any, sizes: Sizes, kv: LayerKV, runs: int) -> None:
    """Store the addresses of a tile's runs of keys, then of values, or of their blocks where they are to be expanded.
    Runs that no query row sees repeat one that is seen: what lies there may be another request's, or nothing."""
    plane = plane_of(kv, item.kv_head)
    seen = max(key, part.first_key // RUN_KEYS * RUN_KEYS)
    for run in range(TILE_RUNS):
        at = key + run * RUN_KEYS
        if at < seen or at >= part.end:
            at = seen
        index = at // sizes.block_size
        offset = at - index * sizes.block_size
        block = tables_BN[item.table, index]
        keys, values = plane.keys + block * plane.key_stride, plane.values + block * plane.value_stride
        if sizes.key_form == FLOAT32:
            keys += _FLOAT_BYTES * offset
            values += _FLOAT_BYTES * offset * sizes.head_dim
        store_int(runs, run, keys)
        store_int(runs, TILE_RUNS + run, values)
        store_int(runs, 2 * TILE_RUNS + run, offset)


@kernel
def expand_tile(values: bool, part: Part, key: int, sizes: Sizes, runs: int, expanded: int, out: int) -> None:
    """Expand the runs of keys, or of values, of a tile that are seen, and store where they are then."""
    first = max(0, part.first_key - key) // RUN_KEYS
    last = (min(TILE_KEYS, part.end - key) + RUN_KEYS - 1) // RUN_KEYS
    for run in range(first, last):
        offset, into = load_int(runs, 2 * TILE_RUNS + run), out + _FLOAT_BYTES * run * RUN_KEYS * sizes.head_dim
        if values:
            expand_values_of_run(load_int(runs, TILE_RUNS + run), offset, sizes, into)
            store_int(expanded, TILE_RUNS + run, into)
        else:
            expand_keys_of_run(load_int(runs, run), offset, sizes, into)
            store_int(expanded, run, into)


@kernel
def attend_tile(
    item: Any,
    part: Part,
    key: int,
    sizes: Sizes,
    runs: int,
    next_runs: int,
    scratch: Scratch,
    sums: Sums,
) -> None:
    """Let the item's query rows see the tile that starts at a key.

    What a row does not see of the tile changes none of its bits.
    """
    head_dim, group = sizes.head_dim, item.num_heads
    keys_ahead = sizes.key_bytes * sizes.block_size // 16
    scores, alpha = scratch.scores, scratch.alpha
    num_rows = item.num_tokens * group
    ends = part.position - key + 1
    plain = sizes.key_form == FLOAT32
    located, key_stride, values_ready = runs, sizes.block_size, plain
    # Where only one chunk sees the tile, values take the place of the keys: both do not fit the first-level cache.
    values_at = scratch.tile if num_rows <= CHUNK_ROWS else scratch.tile + _FLOAT_BYTES * values_of_tile(sizes)
    if not plain:
        runs, key_stride = scratch.expanded, RUN_KEYS
        expand_tile(False, part, key, sizes, located, runs, scratch.tile)
    for chunk in range(0, num_rows, CHUNK_ROWS):
        rows = min(CHUNK_ROWS, num_rows - chunk)
        num_keys = min(TILE_KEYS, part.end - key, ends + (chunk + rows - 1) // group)
        first_key = max(0, part.first_key - key, ends + chunk // group - part.window)
        if num_keys <= first_key:
            continue
        at = _FLOAT_BYTES * chunk * head_dim
        simd.scores(rows, scratch.packed + at, runs, next_runs, keys_ahead, key_stride, head_dim, scores)
        for i in range(rows):
            m = chunk + i
            end = ends + m // group
            first, last = max(first_key, end - part.window), min(num_keys, end)
            row_scores, row_total = scores + _FLOAT_BYTES * TILE_KEYS * i, sums.total + _FLOAT_BYTES * _LANES * m
            highest, row_alpha = sums.highest + _FLOAT_BYTES * m, alpha + _FLOAT_BYTES * i
            if first < last:
                simd.softmax_row(row_scores, first, last, highest, row_total, row_alpha)
            else:
                fill(row_scores, TILE_KEYS, np.float32(0.0))
                store_float(row_alpha, 0, np.float32(1.0))
        if not values_ready:
            expand_tile(True, part, key, sizes, located, runs, values_at)
            values_ready = True
        values, next_values = runs + _RUNS_BYTES, next_runs + _RUNS_BYTES
        first_run, column = first_key // RUN_KEYS, 0
        while column < head_dim:
            left = head_dim - column
            width = simd.COLUMNS_AT_ONCE
            while width > left:
                width //= 2
            into = sums.output + at + _FLOAT_BYTES * column
            simd.add_values(
                *(rows, width, scores, alpha, values, next_values, sizes.value_bytes, head_dim),
                *(column, first_run, num_keys, into),
            )
            column += width


@kernel
def add_part(part: Sums, whole: Sums, num_rows: int, head_dim: int) -> None:
    """Add the sums of a part to those of all parts before it; rows that saw nothing of it keep their bits."""
    for m in range(num_rows):
        highest, so_far = load_float(part.highest, m), load_float(whole.highest, m)
        # Scores that are all -inf have made the total NaN.
        if highest == np.float32(-np.inf) and load_float(part.total, m * _LANES) == np.float32(0.0):
            continue
        keep = add = np.float32(1.0)
        if highest > so_far:
            keep = simd.exp2_of(so_far - highest)
            store_float(whole.highest, m, highest)
        else:
            add = simd.exp2_of(highest - so_far)
        lanes, output = _FLOAT_BYTES * _LANES * m, _FLOAT_BYTES * head_dim * m
        blend(part.total + lanes, whole.total + lanes, _LANES, add, keep)
        blend(part.output + output, whole.output + output, head_dim, add, keep)


@kernel
def store_outputs(item: Any, sizes: Sizes, whole: Sums, o: Heads) -> None:
    """Put the item's outputs into o, from the sums of its rows' whole context."""
    m = 0
    for token in range(item.first_token, item.first_token + item.num_tokens):
        for head in range(item.first_head, item.first_head + item.num_heads):
            weight = np.float32(0.0)
            for lane in range(_LANES):
                weight += load_float(whole.total, m * _LANES + lane)
            target = o.address + _FLOAT_BYTES * (token * o.token_stride + head * o.head_stride)
            output = whole.output + _FLOAT_BYTES * sizes.head_dim * m
            scaled(output, target, sizes.head_dim, np.float32(1.0) / weight)
            m += 1


@kernel
def add_divided(work: Work, items: Any, sizes: Sizes, o: Heads, member: int, members: int) -> None:
    """Make the outputs of the contexts that were divided: this member's share of them."""
    for i in range(member, len(items), members):
        item = items[i]
        if item.sums_row >= 0 and item.part == 0:
            whole = sums_of_part(work, sizes, item, 0)
            for part in range(1, item.num_parts):
                sums = sums_of_part(work, sizes, item, part)
                add_part(sums, whole, item.num_tokens * item.num_heads, sizes.head_dim)
            store_outputs(item, sizes, whole, o)
