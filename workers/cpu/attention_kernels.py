"""The compiled loops of the CPU attention backend.

The softmax is the online one of FlashAttention (Dao et al., 2022); dividing a context over threads and adding up its
parts is Flash-Decoding (Dao et al., 2023). Items, tiles, runs, chunks, query rows and parts are those of
attention_plan.py. Whether a context is divided must not change a bit: in either case a part is summed up by itself, and
``add_part`` adds the parts in their order. Addresses are bytes; strides and offsets count floats.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from headwise.workers.cpu import attention_simd as simd
from headwise.workers.cpu.attention_plan import (
    CHUNK_ROWS,
    PART_KEYS,
    RUN_KEYS,
    TILE_KEYS,
    TILE_RUNS,
    Sizes,
    padded_rows,
)
from headwise.workers.cpu.pointwise_simd import blend, copy, fill, scaled, scatter
from headwise.workers.cpu.team import Team, clear, join, meet, take_job
from headwise.workers.jit.kernel_cache import kernel
from headwise.workers.jit.native import load_float, store_float, store_int

_ADDRESS_BYTES, _FLOAT_BYTES, _LANES = 8, 4, 16
_RUNS_BYTES = _ADDRESS_BYTES * TILE_RUNS


class Work(NamedTuple):
    """The attention of a step.

    Attributes:
        items, tables_BN, sums_rows: see :class:`~headwise.workers.cpu.attention_plan.StepItems`.
        scale: float32, of the scores, which are powers of 2.
        scratch: the address of ``scratch_bytes`` for each thread: scratch_floats(), aligned to 64 bytes.
        sums: the address of sums_floats() floats.
    """

    items: NDArray[Any]
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


class LayerKV(NamedTuple):
    """The addresses of a layer's keys and values in the cache."""

    keys: int
    values: int


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
        runs: of keys, then of values, of the tile; next_runs: of the tile after it.
        scores: of a chunk, [CHUNK_ROWS, TILE_KEYS]; alpha: what its sums so far are to be multiplied with.
        packed: the queries as chunks of [head_dim, rows of the chunk].
        whole: the sums of all parts so far; part: those of a part after the first.
    """

    runs: int
    next_runs: int
    scores: int
    alpha: int
    packed: int
    whole: Sums
    part: Sums


def scratch_floats(sizes: Sizes) -> int:
    """What a thread needs: the addresses of two tiles, scores and factors of a chunk, queries, and sums twice."""
    queries = sizes.max_rows * sizes.head_dim
    return 32 + CHUNK_ROWS * TILE_KEYS + 16 + queries + 2 * sums_floats(sizes.max_rows, sizes.head_dim)


def sums_floats(rows: int, head_dim: int) -> int:
    """What the sums of query rows take."""
    return rows * (1 + _LANES + head_dim)


@kernel(parallel=True)
def attend_in_threads(work: Work, sizes: Sizes, q: Heads, kv: LayerKV, o: Heads, team: int, threads: int) -> None:
    clear(team, threads)
    for _ in numba.prange(threads):
        attend_alone(work, sizes, q, kv, o, team, threads)


@kernel
def attend_alone(work: Work, sizes: Sizes, q: Heads, kv: LayerKV, o: Heads, team: int, threads: int) -> None:
    """Attend as one of a team, whose memory is at an address."""
    member = join(team, threads)
    if member.member >= 0:
        attend(member, work, sizes, q, kv, o)


@kernel
def attend(team: Team, work: Work, sizes: Sizes, q: Heads, kv: LayerKV, o: Heads) -> None:
    """One or two stages of a team: its members attend for the items, longest first, then add up divided contexts."""
    items = work.items
    scratch = divide_scratch(work.scratch + team.member * work.scratch_bytes, sizes)
    last, done = len(items) - 1, 0
    i = take_job(team, len(items), 0)
    while i >= 0:
        done += 1
        after = take_job(team, len(items), done)
        next_item = items[after if after >= 0 else last]
        attend_item(work, sizes, items[i], next_item, q, kv, o, scratch)
        i = after
    meet(team)
    if work.sums_rows > 0:
        add_divided(work, sizes, o, team.member, team.size)
        meet(team)


@kernel
def write_token(keys: int, values: int, head_stride: int, slot: int, sizes: Sizes, kv: LayerKV) -> None:
    """Put one token's keys and values, given by the addresses of their first heads, at its slot."""
    block = slot // sizes.block_size
    offset = slot - block * sizes.block_size
    for head in range(sizes.kv_heads):
        base = (block * sizes.kv_heads + head) * sizes.block_size * sizes.head_dim
        key, value = keys + _FLOAT_BYTES * head * head_stride, values + _FLOAT_BYTES * head * head_stride
        scatter(key, kv.keys + _FLOAT_BYTES * (base + offset), sizes.block_size, sizes.head_dim)
        copy(value, kv.values + _FLOAT_BYTES * (base + offset * sizes.head_dim), sizes.head_dim)


@kernel
def divide_scratch(address: int, sizes: Sizes) -> Scratch:
    scores = address + 4 * _RUNS_BYTES
    alpha = scores + _FLOAT_BYTES * CHUNK_ROWS * TILE_KEYS
    packed = alpha + _FLOAT_BYTES * 16
    whole = packed + _FLOAT_BYTES * sizes.max_rows * sizes.head_dim
    part = whole + _FLOAT_BYTES * sizes.max_rows * (1 + _LANES + sizes.head_dim)
    max_rows = sizes.max_rows
    return Scratch(
        address,
        address + 2 * _RUNS_BYTES,
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


@kernel
def attend_item(
    work: Work, sizes: Sizes, item: Any, next_item: Any, q: Heads, kv: LayerKV, o: Heads, scratch: Scratch
) -> None:
    """Attend for one item, and fetch the next one's first tile ahead."""
    tables_BN = work.tables_BN
    num_rows = item.num_tokens * item.num_heads
    divided = item.sums_row >= 0
    runs, next_runs = scratch.runs, scratch.next_runs
    pack_queries(item, sizes, q, work.scale, scratch.packed)
    locate_runs(item, item.key_start, tables_BN, sizes, kv, next_runs)
    for first in range(item.key_start, item.key_end, PART_KEYS):
        sums = sums_of_part(work, sizes, item, 0) if divided else scratch.whole if first == 0 else scratch.part
        fill(sums.highest, num_rows, np.float32(-np.inf))
        fill(sums.total, num_rows * _LANES, np.float32(0.0))
        fill(sums.output, num_rows * sizes.head_dim, np.float32(0.0))
        for key in range(first, min(first + PART_KEYS, item.key_end), TILE_KEYS):
            runs, next_runs = next_runs, runs
            if key + TILE_KEYS < item.key_end:
                locate_runs(item, key + TILE_KEYS, tables_BN, sizes, kv, next_runs)
            else:
                locate_runs(next_item, next_item.key_start, tables_BN, sizes, kv, next_runs)
            attend_tile(item, key, sizes, runs, next_runs, scratch, sums)
        if not divided and first > 0:
            add_part(scratch.part, scratch.whole, num_rows, sizes.head_dim)
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
def locate_runs(item: Any, key: int, tables_BN: Any, sizes: Sizes, kv: LayerKV, runs: int) -> None:
    """Store the addresses of a tile's runs of keys, then of values; runs past the item's end repeat the first."""
    for run in range(TILE_RUNS):
        at = key + run * RUN_KEYS
        if at >= item.key_end:
            at = key
        block = at // sizes.block_size
        offset = at - block * sizes.block_size
        base = (tables_BN[item.row, block] * sizes.kv_heads + item.kv_head) * sizes.block_size * sizes.head_dim
        store_int(runs, run, kv.keys + _FLOAT_BYTES * (base + offset))
        store_int(runs, TILE_RUNS + run, kv.values + _FLOAT_BYTES * (base + offset * sizes.head_dim))


@kernel
def attend_tile(item: Any, key: int, sizes: Sizes, runs: int, next_runs: int, scratch: Scratch, sums: Sums) -> None:
    """Let the item's query rows see the tile that starts at a key.

    What a row does not see of the tile, because it has a lower position than the item's last, changes none of its bits.
    But every row must have seen a key of the part before a tile of which it sees none.
    """
    head_dim, group = sizes.head_dim, item.num_heads
    scores, alpha = scratch.scores, scratch.alpha
    num_rows = item.num_tokens * group
    first_sees = item.first_position - key + 1
    for chunk in range(0, num_rows, CHUNK_ROWS):
        rows = min(CHUNK_ROWS, num_rows - chunk)
        num_keys = min(TILE_KEYS, item.key_end - key, first_sees + (chunk + rows - 1) // group)
        if num_keys <= 0:
            continue
        at = _FLOAT_BYTES * chunk * head_dim
        simd.scores(rows, scratch.packed + at, runs, next_runs, sizes.block_size, head_dim, scores)
        for i in range(rows):
            m = chunk + i
            sees = min(num_keys, first_sees + m // group)
            row_scores, row_total = scores + _FLOAT_BYTES * TILE_KEYS * i, sums.total + _FLOAT_BYTES * _LANES * m
            simd.softmax_row(row_scores, sees, sums.highest + _FLOAT_BYTES * m, row_total, alpha + _FLOAT_BYTES * i)
        values, next_values = runs + _RUNS_BYTES, next_runs + _RUNS_BYTES
        column = 0
        while column < head_dim:
            left = head_dim - column
            width = simd.COLUMNS_AT_ONCE
            while width > left:
                width //= 2
            into = sums.output + at + _FLOAT_BYTES * column
            simd.add_values(rows, width, scores, alpha, values, next_values, head_dim, column, num_keys, into)
            column += width


@kernel
def add_part(part: Sums, whole: Sums, num_rows: int, head_dim: int) -> None:
    """Add the sums of a part to those of all parts before it."""
    for m in range(num_rows):
        highest, so_far = load_float(part.highest, m), load_float(whole.highest, m)
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
def add_divided(work: Work, sizes: Sizes, o: Heads, member: int, members: int) -> None:
    """Make the outputs of the contexts that were divided: this member's share of them."""
    items = work.items
    for i in range(member, len(items), members):
        item = items[i]
        if item.sums_row >= 0 and item.key_start == 0:
            whole = sums_of_part(work, sizes, item, 0)
            for part in range(1, item.num_parts):
                sums = sums_of_part(work, sizes, item, part)
                add_part(sums, whole, item.num_tokens * item.num_heads, sizes.head_dim)
            store_outputs(item, sizes, whole, o)
