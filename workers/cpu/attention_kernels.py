"""The compiled loops of the CPU attention backend.

The softmax is the online one of FlashAttention (Dao et al., 2022); dividing a context over threads and combining its
parts is Flash-Decoding (Dao et al., 2023). Items, tiles, runs, chunks, query rows and parts are those of
attention_plan.py. Addresses are bytes; strides and offsets count floats.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from headwise.workers.cpu import attention_simd as simd
from headwise.workers.cpu.attention_plan import CHUNK_ROWS, RUN_KEYS, TILE_KEYS, TILE_RUNS, Sizes
from headwise.workers.cpu.pointwise_simd import add_scaled, copy, fill, scaled, scatter
from headwise.workers.cpu.team import Team, clear, join, meet, take_job
from headwise.workers.jit.kernel_cache import kernel
from headwise.workers.jit.native import load_float, store_float, store_int

_ADDRESS_BYTES, _FLOAT_BYTES, _LANES = 8, 4, 16
_RUNS_BYTES = _ADDRESS_BYTES * TILE_RUNS


class Work(NamedTuple):
    """The attention of a step.

    Attributes:
        items, tables_BN, num_parts: see :class:`~headwise.workers.cpu.attention_plan.StepItems`.
        scale: float32, of the scores, which are powers of 2.
        scratch: the address of ``scratch_bytes`` for each thread: scratch_floats(), aligned to 64 bytes.
        parts: the address of part_floats() floats for each part.
    """

    items: NDArray[Any]
    tables_BN: NDArray[np.int32]
    num_parts: int
    scale: np.float32
    scratch: int
    scratch_bytes: int
    parts: int


class Heads(NamedTuple):
    """The address of the first head of the first token, and how far apart tokens and heads lie."""

    address: int
    token_stride: int
    head_stride: int


class LayerKV(NamedTuple):
    """The addresses of a layer's keys and values in the cache."""

    keys: int
    values: int


class Scratch(NamedTuple):
    """The addresses of what a thread works in for one item.

    Attributes:
        runs: of keys, then of values, of the tile; next_runs: of the tile after it.
        scores: of a chunk, [CHUNK_ROWS, TILE_KEYS]; alpha: what its sums so far are to be multiplied with.
        highest: the highest score so far of each query row; total: its sum of weights, in _LANES parts.
        packed: the queries as chunks of [head_dim, rows of the chunk]; output: [query rows, head_dim].
    """

    runs: int
    next_runs: int
    scores: int
    alpha: int
    highest: int
    total: int
    packed: int
    output: int


def scratch_floats(sizes: Sizes) -> int:
    """What a thread needs: the addresses of two tiles, scores and factors of a chunk, sums, queries and outputs."""
    return 32 + CHUNK_ROWS * TILE_KEYS + 16 + sizes.max_rows * (1 + _LANES + 2 * sizes.head_dim)


def part_floats(sizes: Sizes) -> int:
    """What a part leaves: unnormalized outputs, the highest score and the sum of weights of each query row."""
    return sizes.max_rows * (sizes.head_dim + 2)


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
    """One or two stages of a team: its members attend for the items, longest first, then combine parts."""
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
    if work.num_parts > 0:
        combine_parts(work, sizes, o, team.member, team.size)
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
    # max_rows is a multiple of 16, so each piece starts on a cache line.
    highest = alpha + _FLOAT_BYTES * 16
    total = highest + _FLOAT_BYTES * sizes.max_rows
    packed = total + _FLOAT_BYTES * sizes.max_rows * _LANES
    output = packed + _FLOAT_BYTES * sizes.max_rows * sizes.head_dim
    return Scratch(address, address + 2 * _RUNS_BYTES, scores, alpha, highest, total, packed, output)


@kernel
def attend_item(
    work: Work, sizes: Sizes, item: Any, next_item: Any, q: Heads, kv: LayerKV, o: Heads, scratch: Scratch
) -> None:
    """Attend for one item, and fetch the next one's first tile ahead."""
    tables_BN = work.tables_BN
    num_rows = item.num_tokens * item.num_heads
    runs, next_runs = scratch.runs, scratch.next_runs
    pack_queries(item, sizes, q, work.scale, scratch.packed)
    fill(scratch.highest, num_rows, np.float32(-np.inf))
    fill(scratch.total, num_rows * _LANES, np.float32(0.0))
    fill(scratch.output, num_rows * sizes.head_dim, np.float32(0.0))
    locate_runs(item, item.key_start, tables_BN, sizes, kv, next_runs)
    for key in range(item.key_start, item.key_end, TILE_KEYS):
        runs, next_runs = next_runs, runs
        if key + TILE_KEYS < item.key_end:
            locate_runs(item, key + TILE_KEYS, tables_BN, sizes, kv, next_runs)
        else:
            locate_runs(next_item, next_item.key_start, tables_BN, sizes, kv, next_runs)
        attend_tile(item, key, sizes, runs, next_runs, scratch)
    store_outputs(item, sizes, scratch, o, work.parts)


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
def attend_tile(item: Any, key: int, sizes: Sizes, runs: int, next_runs: int, scratch: Scratch) -> None:
    """Let the item's query rows see the tile that starts at a key."""
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
            row_scores, row_total = scores + _FLOAT_BYTES * TILE_KEYS * i, scratch.total + _FLOAT_BYTES * _LANES * m
            simd.softmax_row(row_scores, sees, scratch.highest + _FLOAT_BYTES * m, row_total, alpha + _FLOAT_BYTES * i)
        values, next_values = runs + _RUNS_BYTES, next_runs + _RUNS_BYTES
        column = 0
        while column < head_dim:
            left = head_dim - column
            width = simd.COLUMNS_AT_ONCE
            while width > left:
                width //= 2
            into = scratch.output + at + _FLOAT_BYTES * column
            simd.add_values(rows, width, scores, alpha, values, next_values, head_dim, column, num_keys, into)
            column += width


@kernel
def store_outputs(item: Any, sizes: Sizes, scratch: Scratch, o: Heads, parts: int) -> None:
    """Put the item's outputs into o, or what is to be combined into its part."""
    head_dim, max_rows = sizes.head_dim, sizes.max_rows
    part = parts + item.part * _FLOAT_BYTES * max_rows * (head_dim + 2)
    row_bytes = _FLOAT_BYTES * head_dim
    m = 0
    for token in range(item.first_token, item.first_token + item.num_tokens):
        for head in range(item.first_head, item.first_head + item.num_heads):
            weight = np.float32(0.0)
            for lane in range(_LANES):
                weight += load_float(scratch.total, m * _LANES + lane)
            if item.part < 0:
                target = o.address + _FLOAT_BYTES * (token * o.token_stride + head * o.head_stride)
                scaled(scratch.output + row_bytes * m, target, head_dim, np.float32(1.0) / weight)
            else:
                copy(scratch.output + row_bytes * m, part + row_bytes * m, head_dim)
                store_float(part, max_rows * head_dim + m, load_float(scratch.highest, m))
                store_float(part, max_rows * (head_dim + 1) + m, weight)
            m += 1


@kernel
def combine_parts(work: Work, sizes: Sizes, o: Heads, member: int, members: int) -> None:
    """Make one output of the parts of each context that was divided: this member's share of the items."""
    items = work.items
    part_bytes = _FLOAT_BYTES * sizes.max_rows * (sizes.head_dim + 2)
    for i in range(member, len(items), members):
        item = items[i]
        if item.part < 0 or item.key_start > 0:
            continue
        first, m = work.parts + item.part * part_bytes, 0
        for token in range(item.first_token, item.first_token + item.num_tokens):
            for head in range(item.first_head, item.first_head + item.num_heads):
                target = o.address + _FLOAT_BYTES * (token * o.token_stride + head * o.head_stride)
                combine_row(first, part_bytes, item.num_parts, m, sizes, target)
                m += 1


@kernel
def combine_row(first: int, part_bytes: int, num_parts: int, m: int, sizes: Sizes, o: int) -> None:
    """Query row m of the parts that follow each other from the address of the first, into o."""
    head_dim, max_rows = sizes.head_dim, sizes.max_rows
    highest, total = np.float32(-np.inf), np.float32(0.0)
    for part in range(num_parts):
        highest = max(highest, load_float(first + part * part_bytes, max_rows * head_dim + m))
    fill(o, head_dim, np.float32(0.0))
    for part in range(num_parts):
        base = first + part * part_bytes
        factor = simd.exp2_of(load_float(base, max_rows * head_dim + m) - highest)
        total += factor * load_float(base, max_rows * (head_dim + 1) + m)
        add_scaled(base + _FLOAT_BYTES * m * head_dim, o, head_dim, factor)
    scaled(o, o, head_dim, np.float32(1.0) / total)
