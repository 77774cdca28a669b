"""The inner loop of the CPU's matrix products: a tile of some rows times one panel of a packed weight.

A panel is PANEL output columns, packed [depth, PANEL]: one pass over it, in the order of its memory, feeds every row
of the tile. TILE_ROWS x 2 vectors of accumulators, 2 vectors of weights and one element of x fill 27 of AVX-512's
32 registers. Every sum runs over the depth in the same order, so a row's result does not depend on the rows beside it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir

from headwise.workers.jit.vectors import (
    HAS_AVX512,
    I64,
    INT,
    PTR,
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
    splat,
    store,
    switch,
)

PANEL = 32
"""Output columns of a panel, two vectors; of a gated one, 16 columns of the gate and 16 of up."""

TILE_ROWS = 12 if HAS_AVX512 else 3
"""Most rows of a tile: its accumulators must stay in registers."""

_UNROLL = 4  # PANEL, which the depth is a multiple of, is one of this

_LOG2_E = 1.4426950408889634


def _emit_tile(builder: Any, rows: Any, *args: Any) -> None:
    """out[rows, PANEL] = bias + x[rows, depth] times a panel.

    Args (after rows): x, x_stride, depth, panel, bias, ahead, ahead_step, out, out_stride. ``ahead`` is what to fetch
    meanwhile, ``ahead_step`` bytes further with each step.
    """
    switch(builder, rows, {n: partial(_emit_tile_of, builder, n, *args) for n in range(1, TILE_ROWS + 1)})


def _emit_tile_of(
    builder: Any,
    rows: int,
    x: Any,
    x_stride: Any,
    depth: Any,
    panel: Any,
    bias: Any,
    ahead: Any,
    ahead_step: Any,
    out: Any,
    out_stride: Any,
) -> None:
    biases = [load(builder, at(builder, bias, 16 * v), V16) for v in (0, 1)]
    sums = {(row, v): cgutils.alloca_once_value(builder, biases[v]) for row in range(rows) for v in (0, 1)}
    x_rows = [at(builder, x, builder.mul(x_stride, I64(row))) for row in range(rows)]
    weights, fetched = builder.inttoptr(panel, PTR), builder.inttoptr(ahead, PTR)
    # Short of registers for its pointers, LLVM would read a row's elements of several steps at once, and spill them.
    unroll = _UNROLL if rows <= 4 else 1
    with cgutils.for_range(builder, builder.udiv(depth, I64(unroll))) as loop:
        for step in range(unroll):
            k = builder.add(builder.mul(loop.index, I64(unroll)), I64(step))
            line = builder.gep(fetched, [builder.mul(k, ahead_step)], source_etype=ir.IntType(8))
            prefetch(builder, line)
            prefetch(builder, at(builder, line, 16))
            column = at(builder, weights, builder.mul(k, I64(PANEL)))
            vectors = [load(builder, at(builder, column, 16 * v), V16) for v in (0, 1)]
            for row, x_row in enumerate(x_rows):
                element = splat(builder, load(builder, at(builder, x_row, k)))
                for v in (0, 1):
                    total = builder.load(sums[row, v], typ=V16)
                    builder.store(fma(builder, element, vectors[v], total), sums[row, v])
    for row, v in sums:
        target = at(builder, at(builder, out, builder.mul(out_stride, I64(row))), 16 * v)
        store(builder, builder.load(sums[row, v], typ=V16), target)


def _emit_gate(builder: Any, rows: Any, products: Any, out: Any, out_stride: Any) -> None:
    """out[rows, 16] = silu(gate) * up of products[rows, 16 of gate and 16 of up]."""
    with cgutils.for_range(builder, rows) as loop:
        row = at(builder, products, builder.mul(loop.index, I64(PANEL)))
        gate, up = load(builder, row, V16), load(builder, at(builder, row, 16), V16)
        target = at(builder, out, builder.mul(loop.index, out_stride))
        store(builder, _emit_silu_mul(builder, gate, up), target)


def _emit_silu_mul(builder: Any, gate: Any, up: Any) -> Any:
    """gate / (1 + e ** -gate) * up, by e ** -\\|gate\\|, which cannot overflow."""
    zero, one = constant(V16, 0.0), constant(V16, 1.0)
    magnitude = larger(builder, gate, builder.fsub(zero, gate))
    power = exp2(builder, builder.fmul(magnitude, constant(V16, -_LOG2_E)))
    positive = builder.fcmp_ordered(">", gate, zero)
    numerator = builder.select(positive, one, power)
    sigmoid = builder.fdiv(numerator, builder.fadd(one, power))
    return builder.fmul(builder.fmul(gate, sigmoid), up)


tile = define(_emit_tile, (INT,) * 10)
gate = define(_emit_gate, (INT,) * 4)
