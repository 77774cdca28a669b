"""The vector code of the CPU attention kernels, as LLVM intrinsics that Numba functions call.

Tiles, runs, chunks and query rows are those of attention_plan.py: 6 rows x 4 vectors of accumulators, 4 vectors of
keys and one query element fill 29 of AVX-512's 32 registers. Addresses are bytes as int64; strides and offsets count
floats.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir

from headwise.workers.cpu.attention_plan import CHUNK_ROWS, RUN_KEYS, TILE_KEYS, TILE_RUNS
from headwise.workers.jit.vectors import (
    F32,
    FLOAT,
    HAS_AVX512,
    I32,
    I64,
    INT,
    V16,
    at,
    cgutils,
    constant,
    define,
    exp2,
    fma,
    larger,
    load,
    prefetch,
    reduce,
    splat,
    store,
    switch,
)

# A chunk's accumulators must stay in registers.
_RUNS_AT_ONCE = TILE_RUNS if HAS_AVX512 else 1
COLUMNS_AT_ONCE = 64 if HAS_AVX512 else 16
"""How many columns of the values ``add_values`` takes at most."""


def _emit_scores(builder: Any, rows: Any, *args: Any) -> None:
    """s[rows, TILE_KEYS] = q[D, rows] times a tile's keys, fetching the next tile's keys ahead: at each of the D steps
    ``ahead`` bytes further from where their runs begin."""
    cases = {n: partial(_emit_scores_of, builder, n, *args) for n in range(1, CHUNK_ROWS + 1)}
    switch(builder, rows, cases)


def _emit_scores_of(builder: Any, rows: int, *args: Any) -> None:
    for first in range(0, TILE_RUNS, _RUNS_AT_ONCE):
        _emit_scores_of_runs(builder, rows, range(first, first + _RUNS_AT_ONCE), *args)


def _emit_scores_of_runs(
    builder: Any,
    rows: int,
    tile_runs: range,
    q: Any,
    runs: Any,
    next_runs: Any,
    ahead: Any,
    key_stride: Any,
    head_dim: Any,
    s: Any,
) -> None:
    tile = [(row, run) for row in range(rows) for run in tile_runs]
    sums = {place: cgutils.alloca_once_value(builder, constant(V16, 0.0)) for place in tile}
    keys = {run: load(builder, at(builder, runs, run, 8), I64) for run in tile_runs}
    next_keys = [load(builder, at(builder, next_runs, run, 8), I64) for run in tile_runs]
    with cgutils.for_range(builder, head_dim) as loop:
        offset = builder.mul(loop.index, key_stride)
        for address in next_keys:
            prefetch(builder, at(builder, address, builder.mul(loop.index, ahead), 1), 2)
        vectors = {run: load(builder, at(builder, address, offset), V16) for run, address in keys.items()}
        column = at(builder, q, builder.mul(loop.index, I64(rows)))
        elements = [splat(builder, load(builder, at(builder, column, row))) for row in range(rows)]
        for row, run in tile:
            total = builder.load(sums[row, run], typ=V16)
            builder.store(fma(builder, elements[row], vectors[run], total), sums[row, run])
    for row, run in tile:
        total = builder.load(sums[row, run], typ=V16)
        store(builder, total, at(builder, s, row * TILE_KEYS + run * RUN_KEYS))


def _emit_add_values(builder: Any, rows: Any, width: Any, *args: Any) -> None:
    """o[rows, width] = o * alpha[rows] + p[rows, keys] times a tile's values, fetching the next tile's ahead.

    ``o`` and the values are at the first of ``width`` columns of their D: 8, 16, 32 or 64, up to COLUMNS_AT_ONCE. The
    keys are those from the tile's run ``first_run`` up to its key ``num_keys``. Of the next tile, 16 numbers of a run
    take ``ahead`` bytes.
    """
    cases = {
        n * 64 + w: partial(_emit_add_values_of, builder, n, w, *args)
        for n in range(1, CHUNK_ROWS + 1)
        for w in (8, 16, 32, 64)
        if w <= COLUMNS_AT_ONCE
    }
    switch(builder, builder.add(builder.mul(rows, I64(64)), width), cases)


def _emit_add_values_of(
    builder: Any,
    rows: int,
    width: int,
    p: Any,
    alpha: Any,
    runs: Any,
    next_runs: Any,
    ahead: Any,
    head_dim: Any,
    column: Any,
    first_run: Any,
    num_keys: Any,
    o: Any,
) -> None:
    kind = ir.VectorType(F32, min(width, 16))
    tile = [(row, i) for row in range(rows) for i in range(0, width, 16)]
    factors = [splat(builder, load(builder, at(builder, alpha, row)), kind) for row in range(rows)]
    outputs = {(row, i): at(builder, at(builder, o, builder.mul(head_dim, I64(row))), i) for row, i in tile}
    sums = {}
    for row, i in tile:
        scaled = builder.fmul(load(builder, outputs[row, i], kind), factors[row])
        sums[row, i] = cgutils.alloca_once_value(builder, scaled)
    num_runs = builder.udiv(builder.add(num_keys, I64(RUN_KEYS - 1)), I64(RUN_KEYS))
    with cgutils.for_range_slice(builder, first_run, num_runs, I64(1)) as (run, _):
        first = builder.mul(run, I64(RUN_KEYS))
        left = builder.sub(num_keys, first)
        count = builder.select(builder.icmp_signed("<", left, I64(RUN_KEYS)), left, I64(RUN_KEYS))
        values = at(builder, load(builder, at(builder, runs, run, 8), I64), column)
        next_values = load(builder, at(builder, next_runs, run, 8), I64)
        weights = at(builder, p, first)
        with cgutils.for_range(builder, count) as inner:
            offset = builder.mul(inner.index, head_dim)
            line, numbers = at(builder, values, offset), builder.add(offset, column)
            next_line = at(builder, next_values, builder.lshr(builder.mul(numbers, ahead), I64(4)), 1)
            for i in range(0, width, 16):
                prefetch(builder, at(builder, next_line, builder.mul(ahead, I64(i // 16)), 1), 2)
            vectors = {i: load(builder, at(builder, line, i), kind) for i in range(0, width, 16)}
            weight = at(builder, weights, inner.index)
            for row in range(rows):
                factor = splat(builder, load(builder, at(builder, weight, row * TILE_KEYS)), kind)
                for i, vector in vectors.items():
                    total = builder.load(sums[row, i], typ=kind)
                    builder.store(fma(builder, factor, vector, total), sums[row, i])
    for place in tile:
        store(builder, builder.load(sums[place], typ=kind), outputs[place])


def _emit_softmax_row(builder: Any, s: Any, start: Any, limit: Any, highest: Any, total: Any, alpha: Any) -> None:
    """Scores s[TILE_KEYS] become weights relative to the row's highest score so far; keys before start, at limit and
    past it weigh 0.

    ``highest`` (one float), ``total`` (16 partial sums) and ``alpha`` (what earlier sums are now to be multiplied
    with) are updated. A NaN score makes the row's weights NaN.
    """
    lanes = ir.VectorType(I32, 16)
    starts, limits = (splat(builder, builder.trunc(x, I32), lanes) for x in (start, limit))
    lowest = constant(V16, float("-inf"))
    visible, scores = [], []
    for run in range(TILE_RUNS):
        keys = ir.Constant(lanes, [run * RUN_KEYS + lane for lane in range(16)])
        early, late = builder.icmp_signed(">=", keys, starts), builder.icmp_signed("<", keys, limits)
        visible.append(builder.and_(early, late))
        scores.append(builder.select(visible[run], load(builder, at(builder, s, run * 16), V16), lowest))
    pairs = [larger(builder, scores[0], scores[1]), larger(builder, scores[2], scores[3])]
    before = load(builder, at(builder, highest, 0))
    now = larger(builder, reduce(builder, larger(builder, *pairs), larger), before)
    store(builder, now, at(builder, highest, 0))
    factor = exp2(builder, builder.fsub(before, now))
    store(builder, factor, at(builder, alpha, 0))
    sums, now_V = [], splat(builder, now)
    for run in range(TILE_RUNS):
        weight = exp2(builder, builder.fsub(scores[run], now_V))
        weight = builder.select(visible[run], weight, constant(V16, 0.0))
        store(builder, weight, at(builder, s, run * 16))
        sums.append(weight)
    added = builder.fadd(builder.fadd(sums[0], sums[1]), builder.fadd(sums[2], sums[3]))
    pointer = at(builder, total, 0)
    store(builder, fma(builder, load(builder, pointer, V16), splat(builder, factor), added), pointer)


exp2_of = define(exp2, (FLOAT,), FLOAT)
scores = define(_emit_scores, (INT,) * 8)
softmax_row = define(_emit_softmax_row, (INT,) * 6)
add_values = define(_emit_add_values, (INT,) * 12)
