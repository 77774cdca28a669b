"""The compiled loops of the CPU attention backend.

The softmax is the online one of FlashAttention (Dao et al., 2022); dividing a context over threads and combining its
parts is Flash-Decoding (Dao et al., 2023). Arguments that many kernels share:

    items, tables, q_starts: see cpu_plan.py; with sizes they are the ``arrays``.
    sizes: int64 [KV heads, block size, head dim, token stride of o, query rows of an item at most, blocks].
    q, k, v: (address, token stride, head stride) of a step's queries, keys and values.
    layer: the addresses of a layer's keys and values in the cache.
    scratch: the address of scratch_floats() floats for a thread, aligned to 64 bytes.
    parts: the address of part_floats() floats for each part; with scratch, its bytes a thread and the number of parts
        the ``memory``.

Addresses are bytes; strides and offsets count floats.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from headwise.workers.cpu import attention_simd as simd
from headwise.workers.cpu.attention_plan import (
    CHUNK_ROWS,
    FIRST_POSITION,
    FIRST_TOKEN,
    KEY_END,
    KEY_START,
    KV_HEAD,
    NUM_PARTS,
    NUM_TOKENS,
    PART,
    ROW,
    RUN_KEYS,
    TILE_KEYS,
    TILE_RUNS,
)
from headwise.workers.cpu.pointwise_simd import add_scaled, copy, fill, scaled, scatter
from headwise.workers.cpu.team import barrier, clear, join, next_job
from headwise.workers.jit.kernel_cache import kernel
from headwise.workers.jit.native import load_float, store_float, store_int

_ADDRESS_BYTES, _FLOAT_BYTES, _LANES = 8, 4, 16
_RUNS_BYTES = _ADDRESS_BYTES * TILE_RUNS


def scratch_floats(max_rows: int, head_dim: int) -> int:
    """What a thread needs: the addresses of two tiles, scores and factors of a chunk, sums, queries and outputs."""
    return 32 + CHUNK_ROWS * TILE_KEYS + 16 + max_rows * (1 + _LANES + 2 * head_dim)


def part_floats(max_rows: int, head_dim: int) -> int:
    """What a part leaves: unnormalized outputs, the highest score and the sum of weights of each query row."""
    return max_rows * (head_dim + 2)


def _write_token(k: int, v: int, slot: int, sizes: Any, layer: Any, k_stride: int, v_stride: int) -> None:
    """Put one token's keys and values, whose heads are a stride apart, at its slot."""
    heads, block_size, head_dim = sizes[0], sizes[1], sizes[2]
    block = slot // block_size
    offset = slot - block * block_size
    for head in range(heads):
        base = (block * heads + head) * block_size * head_dim
        key, value = k + _FLOAT_BYTES * head * k_stride, v + _FLOAT_BYTES * head * v_stride
        scatter(key, layer[0] + _FLOAT_BYTES * (base + offset), block_size, head_dim)
        copy(value, layer[1] + _FLOAT_BYTES * (base + offset * head_dim), head_dim)


def _write_tokens(slots: Any, sizes: Any, k: Any, v: Any, layer: Any) -> None:
    """Put a step's keys and values at their slots, in one thread."""
    for t in range(len(slots)):
        key, value = k[0] + _FLOAT_BYTES * k[1] * t, v[0] + _FLOAT_BYTES * v[1] * t
        write_token(key, value, slots[t], sizes, layer, k[2], v[2])


def _attend(team: Any, arrays: Any, q: Any, layer: Any, scale: Any, o: int, memory: Any) -> None:
    """One or two stages of a team: its members attend for the items, longest first, then combine parts."""
    items, tables, q_starts, sizes = arrays
    scratch, scratch_bytes, parts, num_parts = memory
    own = scratch + team.member * scratch_bytes
    last, done = len(items) - 1, 0
    i = next_job(team, len(items), 0)
    while i >= 0:
        done += 1
        after = next_job(team, len(items), done)
        next_item = items[after if after >= 0 else last]
        attend_item(items[i], next_item, tables, q_starts, sizes, q, layer, scale, o, own, parts)
        i = after
    barrier(team)
    if num_parts > 0:
        combine_parts(items, q_starts, sizes, o, parts, team.member, team.size)
        barrier(team)


def _attend_alone(arrays: Any, q: Any, layer: Any, scale: Any, o: int, memory: Any, address: int, threads: int) -> None:
    team = join(address, threads)
    if team.member >= 0:
        attend(team, arrays, q, layer, scale, o, memory)


def _attend_in_threads(
    arrays: Any, q: Any, layer: Any, scale: Any, o: int, memory: Any, address: int, threads: int
) -> None:
    clear(address, threads)
    for _ in numba.prange(threads):
        attend_alone(arrays, q, layer, scale, o, memory, address, threads)


def _attend_item(
    item: Any,
    next_item: Any,
    tables: Any,
    q_starts: Any,
    sizes: Any,
    q: Any,
    layer: Any,
    scale: Any,
    o: int,
    scratch: int,
    parts: int,
) -> None:
    """Attend for one item, and fetch the next one's first tile ahead."""
    head_dim, max_rows = sizes[2], sizes[4]
    num_rows = item[NUM_TOKENS] * (q_starts[item[KV_HEAD] + 1] - q_starts[item[KV_HEAD]])
    runs, next_runs = scratch, scratch + 2 * _RUNS_BYTES
    chunk_scratch = next_runs + 2 * _RUNS_BYTES
    # max_rows is a multiple of 16, so each piece starts on a cache line.
    highest = chunk_scratch + _FLOAT_BYTES * (CHUNK_ROWS * TILE_KEYS + 16)
    total = highest + _FLOAT_BYTES * max_rows
    packed = total + _FLOAT_BYTES * max_rows * _LANES
    output = packed + _FLOAT_BYTES * max_rows * head_dim
    state = (packed, output, highest, total, chunk_scratch)

    pack_queries(item, q_starts, head_dim, q, scale, packed)
    fill(highest, num_rows, np.float32(-np.inf))
    fill(total, num_rows * _LANES, np.float32(0.0))
    fill(output, num_rows * head_dim, np.float32(0.0))
    locate_runs(item, item[KEY_START], tables, sizes, layer, next_runs)
    for key in range(item[KEY_START], item[KEY_END], TILE_KEYS):
        runs, next_runs = next_runs, runs
        if key + TILE_KEYS < item[KEY_END]:
            locate_runs(item, key + TILE_KEYS, tables, sizes, layer, next_runs)
        else:
            locate_runs(next_item, next_item[KEY_START], tables, sizes, layer, next_runs)
        attend_tile(item, key, q_starts, sizes, runs, next_runs, state)
    store_outputs(item, q_starts, sizes, state, o, parts)


def _pack_queries(item: Any, q_starts: Any, head_dim: int, q: Any, scale: Any, packed: int) -> None:
    """Lay the item's query rows out as chunks of [head_dim, rows of the chunk], multiplied with the scale."""
    first, last = q_starts[item[KV_HEAD]], q_starts[item[KV_HEAD] + 1]
    num_rows = item[NUM_TOKENS] * (last - first)
    m = 0
    for token in range(item[FIRST_TOKEN], item[FIRST_TOKEN] + item[NUM_TOKENS]):
        for head in range(first, last):
            chunk = m // CHUNK_ROWS * CHUNK_ROWS
            rows = min(CHUNK_ROWS, num_rows - chunk)
            source, target = q[1] * token + q[2] * head, chunk * head_dim + m - chunk
            for d in range(head_dim):
                store_float(packed, target + d * rows, load_float(q[0], source + d) * scale)
            m += 1


def _locate_runs(item: Any, key: int, tables: Any, sizes: Any, layer: Any, runs: int) -> None:
    """Store the addresses of a tile's runs of keys, then of values; runs past the item's end repeat the first."""
    heads, block_size, head_dim = sizes[0], sizes[1], sizes[2]
    for run in range(TILE_RUNS):
        at = key + run * RUN_KEYS
        if at >= item[KEY_END]:
            at = key
        block = at // block_size
        offset = at - block * block_size
        base = (tables[item[ROW], block] * heads + item[KV_HEAD]) * block_size * head_dim
        store_int(runs, run, layer[0] + _FLOAT_BYTES * (base + offset))
        store_int(runs, TILE_RUNS + run, layer[1] + _FLOAT_BYTES * (base + offset * head_dim))


def _attend_tile(item: Any, key: int, q_starts: Any, sizes: Any, runs: int, next_runs: int, state: Any) -> None:
    """Let the item's query rows see the tile that starts at a key."""
    packed, output, highest, total, scores = state
    block_size, head_dim = sizes[1], sizes[2]
    group = q_starts[item[KV_HEAD] + 1] - q_starts[item[KV_HEAD]]
    num_rows = item[NUM_TOKENS] * group
    alpha = scores + _FLOAT_BYTES * CHUNK_ROWS * TILE_KEYS
    first_sees = item[FIRST_POSITION] - key + 1
    for chunk in range(0, num_rows, CHUNK_ROWS):
        rows = min(CHUNK_ROWS, num_rows - chunk)
        num_keys = min(TILE_KEYS, item[KEY_END] - key, first_sees + (chunk + rows - 1) // group)
        if num_keys <= 0:
            continue
        at = _FLOAT_BYTES * chunk * head_dim
        simd.scores(rows, packed + at, runs, next_runs, block_size, head_dim, scores)
        for i in range(rows):
            m = chunk + i
            sees = min(num_keys, first_sees + m // group)
            row_scores, row_total = scores + _FLOAT_BYTES * TILE_KEYS * i, total + _FLOAT_BYTES * _LANES * m
            simd.softmax_row(row_scores, sees, highest + _FLOAT_BYTES * m, row_total, alpha + _FLOAT_BYTES * i)
        values, next_values = runs + _RUNS_BYTES, next_runs + _RUNS_BYTES
        column = 0
        while column < head_dim:
            left = head_dim - column
            width = simd.COLUMNS_AT_ONCE
            while width > left:
                width //= 2
            into = output + at + _FLOAT_BYTES * column
            simd.add_values(rows, width, scores, alpha, values, next_values, head_dim, column, num_keys, into)
            column += width


def _store_outputs(item: Any, q_starts: Any, sizes: Any, state: Any, o: int, parts: int) -> None:
    """Put the item's outputs into o, or what is to be combined into its part."""
    _packed, output, highest, total, _scores = state
    head_dim, o_stride, max_rows = sizes[2], sizes[3], sizes[4]
    part = parts + item[PART] * _FLOAT_BYTES * max_rows * (head_dim + 2)
    row_bytes = _FLOAT_BYTES * head_dim
    m = 0
    for token in range(item[FIRST_TOKEN], item[FIRST_TOKEN] + item[NUM_TOKENS]):
        for head in range(q_starts[item[KV_HEAD]], q_starts[item[KV_HEAD] + 1]):
            weight = np.float32(0.0)
            for lane in range(_LANES):
                weight += load_float(total, m * _LANES + lane)
            if item[PART] < 0:
                target = o + _FLOAT_BYTES * (token * o_stride + head * head_dim)
                scaled(output + row_bytes * m, target, head_dim, np.float32(1.0) / weight)
            else:
                copy(output + row_bytes * m, part + row_bytes * m, head_dim)
                store_float(part, max_rows * head_dim + m, load_float(highest, m))
                store_float(part, max_rows * (head_dim + 1) + m, weight)
            m += 1


def _combine_parts(items: Any, q_starts: Any, sizes: Any, o: int, parts: int, member: int, members: int) -> None:
    """Make one output of the parts of each context that was divided: this member's share of the items."""
    head_dim, o_stride, max_rows = sizes[2], sizes[3], sizes[4]
    stride = _FLOAT_BYTES * max_rows * (head_dim + 2)
    for i in range(member, len(items), members):
        item = items[i]
        if item[PART] < 0 or item[KEY_START] > 0:
            continue
        m = 0
        for token in range(item[FIRST_TOKEN], item[FIRST_TOKEN] + item[NUM_TOKENS]):
            for head in range(q_starts[item[KV_HEAD]], q_starts[item[KV_HEAD] + 1]):
                target = o + _FLOAT_BYTES * (token * o_stride + head * head_dim)
                combine_row(parts + item[PART] * stride, stride, item[NUM_PARTS], m, head_dim, max_rows, target)
                m += 1


def _combine_row(first: int, stride: int, num_parts: int, m: int, head_dim: int, max_rows: int, o: int) -> None:
    highest, total = np.float32(-np.inf), np.float32(0.0)
    for part in range(num_parts):
        highest = max(highest, load_float(first + part * stride, max_rows * head_dim + m))
    fill(o, head_dim, np.float32(0.0))
    for part in range(num_parts):
        base = first + part * stride
        factor = simd.exp2_of(load_float(base, max_rows * head_dim + m) - highest)
        total += factor * load_float(base, max_rows * (head_dim + 1) + m)
        add_scaled(base + _FLOAT_BYTES * m * head_dim, o, head_dim, factor)
    scaled(o, o, head_dim, np.float32(1.0) / total)


write_token = kernel(_write_token)
write_tokens = kernel(_write_tokens)
attend = kernel(_attend)
attend_alone = kernel(_attend_alone)
attend_in_threads = kernel(_attend_in_threads, parallel=True)
attend_item = kernel(_attend_item)
pack_queries = kernel(_pack_queries)
locate_runs = kernel(_locate_runs)
attend_tile = kernel(_attend_tile)
store_outputs = kernel(_store_outputs)
combine_parts = kernel(_combine_parts)
combine_row = kernel(_combine_row)
