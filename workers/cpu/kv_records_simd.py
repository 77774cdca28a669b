"""The vector code between float32 and the forms in which keys and values are kept, as LLVM intrinsics for Numba.

What records look like is said in :mod:`~headwise.workers.kv.format`. Addresses, strides and offsets are bytes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir

from headwise.workers.cpu.attention_plan import RUN_KEYS
from headwise.workers.jit.vectors import (
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    INT,
    at,
    cgutils,
    constant,
    define,
    fma,
    larger,
    load,
    reduce,
    splat,
    store,
    switch,
)

FLOAT32, BFLOAT16, FLOAT16, INT8, INT4 = range(5)
"""The forms of a number."""

# Added to a float from 0 to 2 ** 22, it leaves the nearest integer in the low bits; of two as near, the even one.
_ROUND = 1.5 * 2.0**23
_V8 = ir.VectorType(F32, 8)


def _emit_widen(builder: Any, form: Any, source: Any, stride: Any, rows: Any, target: Any) -> None:
    """target[rows, 16] floats = rows of 16 halves a stride apart."""
    args = (builder, source, stride, rows, target)
    switch(builder, form, {n: partial(_emit_widen_of, n, *args) for n in (BFLOAT16, FLOAT16)})


def _emit_widen_of(form: int, builder: Any, source: Any, stride: Any, rows: Any, target: Any) -> None:
    with cgutils.for_range(builder, rows) as loop:
        pointer = at(builder, source, builder.mul(loop.index, stride), 1)
        store(builder, _widened(builder, pointer, form), at(builder, target, builder.mul(loop.index, I64(16))))


def _widened(builder: Any, pointer: Any, form: int, count: int = 16) -> Any:
    """A vector of floats from halves."""
    if form == FLOAT16:
        return builder.fpext(load(builder, pointer, ir.VectorType(F16, count), 2), ir.VectorType(F32, count))
    bits = ir.VectorType(I32, count)
    wide = builder.zext(load(builder, pointer, ir.VectorType(I16, count), 2), bits)
    return builder.bitcast(builder.shl(wide, constant(bits, 16)), ir.VectorType(F32, count))


def _emit_narrow(builder: Any, form: Any, source: Any, target: Any, stride: Any, count: Any) -> None:
    """target[i * stride] = source[i] as a half, rounded to the nearest, of two to the even one."""
    args = (builder, source, target, stride, count)
    switch(builder, form, {n: partial(_emit_narrow_of, n, *args) for n in (BFLOAT16, FLOAT16)})


def _emit_narrow_of(form: int, builder: Any, source: Any, target: Any, stride: Any, count: Any) -> None:
    with cgutils.for_range(builder, count) as loop:
        value = load(builder, at(builder, source, loop.index))
        half = builder.bitcast(builder.fptrunc(value, F16), I16) if form == FLOAT16 else _bfloat16(builder, value)
        store(builder, half, at(builder, target, builder.mul(loop.index, stride), 1), 2)


def _bfloat16(builder: Any, value: Any) -> Any:
    bits = builder.bitcast(value, I32)
    odd = builder.and_(builder.lshr(bits, I32(16)), I32(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, I32(0x7FFF))), I32(16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, I32(0x7FC0), rounded), I16)


def _emit_expand_keys(builder: Any, form: Any, *args: Any) -> None:
    """target[D, 16] floats = the keys of a run in a record.

    Args (after form): codes, scales, zeros, all of the run's first key; stride, of rows of codes; head_dim; group;
    target.
    """
    switch(builder, form, {n: partial(_emit_expand_keys_of, n, builder, *args) for n in (INT8, INT4)})


def _emit_expand_keys_of(
    form: int,
    builder: Any,
    codes: Any,
    scales: Any,
    zeros: Any,
    stride: Any,
    head_dim: Any,
    group: Any,
    target: Any,
) -> None:
    rows = group if form == INT8 else builder.lshr(group, I64(1))
    with cgutils.for_range(builder, builder.udiv(head_dim, group)) as outer:
        offset = builder.mul(outer.index, builder.mul(stride, I64(2)))
        scale, zero = (_widened(builder, at(builder, x, offset, 1), FLOAT16) for x in (scales, zeros))
        first = builder.mul(outer.index, rows)
        with cgutils.for_range(builder, rows) as inner:
            row = builder.add(first, inner.index)
            parts = _codes(builder, at(builder, codes, builder.mul(row, stride), 1), form, RUN_KEYS)
            for i, part in enumerate(parts):
                into = builder.mul(row, I64(16 * len(parts)))
                store(builder, fma(builder, part, scale, zero), at(builder, at(builder, target, into), 16 * i))


def _emit_expand_values(builder: Any, form: Any, *args: Any) -> None:
    """target[16, D] floats = the values of a run in a record.

    Args (after form): codes, scales, zeros, all of the run's first value; head_dim; group; target.
    """
    switch(builder, form, {n: partial(_emit_expand_values_of, n, builder, *args) for n in (INT8, INT4)})


def _emit_expand_values_of(
    form: int,
    builder: Any,
    codes: Any,
    scales: Any,
    zeros: Any,
    head_dim: Any,
    group: Any,
    target: Any,
) -> None:
    width = group if form == INT8 else builder.lshr(group, I64(1))
    groups = builder.udiv(head_dim, group)
    with cgutils.for_range(builder, builder.mul(groups, I64(RUN_KEYS))) as outer:
        line = at(builder, codes, builder.mul(outer.index, width), 1)
        scale, zero = (_half(builder, x, outer.index) for x in (scales, zeros))
        into = at(builder, target, builder.mul(outer.index, group))
        whole = builder.and_(width, I64(-16))
        for count, first, last in ((16, I64(0), whole), (4, whole, width)):
            kind = ir.VectorType(F32, count)
            factors, added = splat(builder, scale, kind), splat(builder, zero, kind)
            with cgutils.for_range_slice(builder, first, last, I64(count)) as (i, _):
                parts = _codes(builder, at(builder, line, i, 1), form, count)
                for part, column in zip(parts, (i, builder.add(i, width)), strict=False):
                    store(builder, fma(builder, part, factors, added), at(builder, into, column))


def _codes(builder: Any, pointer: Any, form: int, count: int) -> list[Any]:
    """So many codes as floats; of int4, those in low halves of bytes, then those in high halves."""
    kind, floats = ir.VectorType(I32, count), ir.VectorType(F32, count)
    wide = builder.zext(load(builder, pointer, ir.VectorType(I8, count), 1), kind)
    if form == INT8:
        return [builder.sitofp(wide, floats)]
    halves = (builder.and_(wide, constant(kind, 15)), builder.lshr(wide, constant(kind, 4)))
    return [builder.sitofp(half, floats) for half in halves]


def _half(builder: Any, address: Any, index: Any) -> Any:
    return builder.fpext(load(builder, at(builder, address, index, 2), F16, 2), F32)


def _emit_quantise(builder: Any, source: Any, count: Any, levels: Any, codes: Any, scale_at: Any, zero_at: Any) -> None:
    """Codes, one a byte, of ``count`` floats, a multiple of 8, and their scale and zero as float16.

    The arithmetic is that of workers/kv/quantise.py. ``codes`` may be the source: each is written after its float was
    read. Of a group that is not finite, scale and zero are NaN.
    """
    first = load(builder, at(builder, source, 0), _V8)
    low, high, wrong = (cgutils.alloca_once_value(builder, x) for x in (first, first, constant(_V8, 0.0)))
    with cgutils.for_range_slice(builder, I64(0), count, I64(8)) as (i, _):
        x = load(builder, at(builder, source, i), _V8)
        builder.store(_smaller(builder, x, builder.load(low, typ=_V8)), low)
        builder.store(larger(builder, x, builder.load(high, typ=_V8)), high)
        builder.store(builder.fadd(builder.load(wrong, typ=_V8), builder.fsub(x, x)), wrong)
    lowest = reduce(builder, builder.load(low, typ=_V8), _smaller)
    highest = reduce(builder, builder.load(high, typ=_V8), larger)
    nan_or_0 = reduce(builder, builder.load(wrong, typ=_V8), lambda b, x, y: b.fadd(x, y))
    zero = builder.fptrunc(builder.fsub(lowest, nan_or_0), F16)
    zero_F = builder.fpext(zero, F32)
    spread = larger(builder, builder.fsub(highest, zero_F), constant(F32, 0.0))
    step = builder.fdiv(spread, builder.sitofp(levels, F32))
    scale = builder.fptrunc(builder.fadd(step, nan_or_0), F16)
    scale_F = builder.fpext(scale, F32)
    store(builder, scale, at(builder, scale_at, 0, 2), 2)
    store(builder, zero, at(builder, zero_at, 0, 2), 2)
    flat = builder.fcmp_ordered("==", scale_F, constant(F32, 0.0))
    most = builder.select(flat, constant(F32, 0.0), builder.sitofp(levels, F32))
    divisor = builder.select(flat, constant(F32, 1.0), scale_F)
    zeros, divisors, limits = (splat(builder, x, _V8) for x in (zero_F, divisor, most))
    with cgutils.for_range_slice(builder, I64(0), count, I64(8)) as (i, _):
        x = load(builder, at(builder, source, i), _V8)
        steps = builder.fdiv(builder.fsub(x, zeros), divisors)
        steps = _smaller(builder, larger(builder, steps, constant(_V8, 0.0)), limits)
        bits = builder.bitcast(builder.fadd(steps, constant(_V8, _ROUND)), ir.VectorType(I32, 8))
        store(builder, builder.trunc(bits, ir.VectorType(I8, 8)), at(builder, codes, i, 1), 1)


def _smaller(builder: Any, a: Any, b: Any) -> Any:
    """The smaller of two floats or vectors, and b where either is NaN."""
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


widen = define(_emit_widen, (INT,) * 5)
narrow = define(_emit_narrow, (INT,) * 5)
expand_keys = define(_emit_expand_keys, (INT,) * 8)
expand_values = define(_emit_expand_values, (INT,) * 7)
quantise = define(_emit_quantise, (INT,) * 6)
