"""The vector code between the matrix products: the norm of a row, the turning of a head, the best of a row."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from headwise.workers.jit.vectors import (
    F32,
    FLOAT,
    I32,
    I64,
    INT,
    V16,
    at,
    cgutils,
    constant,
    define,
    fma,
    load,
    reduce,
    splat,
    store,
)


def _emit_add_norm(
    builder: Any, residual: Any, delta: Any, weight: Any, vectors: Any, width: Any, eps: Any, out: Any
) -> None:
    """residual += delta; out = residual * weight / sqrt(mean(residual ** 2) + eps). Rows of ``vectors`` x 16 floats,
    of which the first ``width`` count and the others are zeros."""
    squares = cgutils.alloca_once_value(builder, constant(V16, 0.0))
    with cgutils.for_range(builder, vectors) as loop:
        i = builder.mul(loop.index, I64(16))
        pointer = at(builder, residual, i)
        total = builder.fadd(load(builder, pointer, V16), load(builder, at(builder, delta, i), V16))
        store(builder, total, pointer)
        builder.store(fma(builder, total, total, builder.load(squares, typ=V16)), squares)
    square = reduce(builder, builder.load(squares, typ=V16), lambda b, x, y: b.fadd(x, y))
    mean = builder.fdiv(square, builder.sitofp(width, F32))
    root = builder.call(_intrinsic(builder, "llvm.sqrt.f32", F32), [builder.fadd(mean, eps)])
    scale = splat(builder, builder.fdiv(constant(F32, 1.0), root))
    with cgutils.for_range(builder, vectors) as loop:
        i = builder.mul(loop.index, I64(16))
        scaled = builder.fmul(load(builder, at(builder, residual, i), V16), scale)
        store(builder, builder.fmul(scaled, load(builder, at(builder, weight, i), V16)), at(builder, out, i))


def _emit_turn(builder: Any, x: Any, cos: Any, sin: Any, half: Any) -> None:
    """Rotary embedding of one head, in place: dimension i turns with i + half."""
    for kind, first, last, step in _strips(builder, half):
        with cgutils.for_range_slice(builder, first, last, step) as (i, _):
            low_at = at(builder, x, i)
            high_at = at(builder, x, builder.add(i, half))
            low, high = load(builder, low_at, kind), load(builder, high_at, kind)
            c, s = load(builder, at(builder, cos, i), kind), load(builder, at(builder, sin, i), kind)
            store(builder, builder.fsub(builder.fmul(low, c), builder.fmul(high, s)), low_at)
            store(builder, fma(builder, high, c, builder.fmul(low, s)), high_at)


def _emit_copy(builder: Any, source: Any, target: Any, count: Any) -> None:
    for kind, first, last, step in _strips(builder, count):
        with cgutils.for_range_slice(builder, first, last, step) as (i, _):
            store(builder, load(builder, at(builder, source, i), kind), at(builder, target, i))


def _emit_scaled(builder: Any, source: Any, target: Any, count: Any, factor: Any) -> None:
    """target = factor * source; they may be one."""
    for kind, first, last, step in _strips(builder, count):
        factors = factor if kind is F32 else splat(builder, factor)
        with cgutils.for_range_slice(builder, first, last, step) as (i, _):
            product = builder.fmul(load(builder, at(builder, source, i), kind), factors)
            store(builder, product, at(builder, target, i))


def _emit_blend(builder: Any, source: Any, target: Any, count: Any, add: Any, keep: Any) -> None:
    """target = keep * target + add * source."""
    for kind, first, last, step in _strips(builder, count):
        adds, keeps = (factor if kind is F32 else splat(builder, factor) for factor in (add, keep))
        with cgutils.for_range_slice(builder, first, last, step) as (i, _):
            into = at(builder, target, i)
            kept = builder.fmul(load(builder, into, kind), keeps)
            store(builder, fma(builder, load(builder, at(builder, source, i), kind), adds, kept), into)


def _emit_fill(builder: Any, target: Any, count: Any, value: Any) -> None:
    for kind, first, last, step in _strips(builder, count):
        values = value if kind is F32 else splat(builder, value)
        with cgutils.for_range_slice(builder, first, last, step) as (i, _):
            store(builder, values, at(builder, target, i))


def _emit_scatter(builder: Any, source: Any, target: Any, stride: Any, count: Any) -> None:
    """target[i * stride] = source[i]."""
    with cgutils.for_range(builder, count) as loop:
        value = load(builder, at(builder, source, loop.index))
        store(builder, value, at(builder, target, builder.mul(loop.index, stride)))


def _emit_best(builder: Any, row: Any, count: Any) -> Any:
    """Where the largest of a row is, the first of equals; a NaN counts as larger than all."""
    kind = ir.VectorType(I32, 16)
    lanes = ir.Constant(kind, list(range(16)))
    best = cgutils.alloca_once_value(builder, constant(V16, float("-inf")))
    where = cgutils.alloca_once_value(builder, lanes)
    whole = builder.and_(count, I64(-16))
    with cgutils.for_range_slice(builder, I64(0), whole, I64(16)) as (i, _):
        values, so_far = load(builder, at(builder, row, i), V16), builder.load(best, typ=V16)
        better = _beats(builder, values, so_far)
        here = builder.add(splat(builder, builder.trunc(i, I32), kind), lanes)
        builder.store(builder.select(better, values, so_far), best)
        builder.store(builder.select(better, here, builder.load(where, typ=kind)), where)
    value = cgutils.alloca_once_value(builder, constant(F32, float("-inf")))
    place = cgutils.alloca_once_value(builder, I32(0))
    for lane in range(16):
        candidate = builder.extract_element(builder.load(best, typ=V16), I32(lane))
        index = builder.extract_element(builder.load(where, typ=kind), I32(lane))
        _keep_better(builder, candidate, index, value, place)
    with cgutils.for_range_slice(builder, whole, count, I64(1)) as (i, _):
        _keep_better(builder, load(builder, at(builder, row, i)), builder.trunc(i, I32), value, place)
    return builder.zext(builder.load(place, typ=I32), I64)


def _beats(builder: Any, a: Any, b: Any) -> Any:
    """Whether a > b, or a alone is NaN: once NaN is the best, nothing is better."""
    a_is_nan, b_is_number = builder.fcmp_unordered("uno", a, a), builder.fcmp_ordered("ord", b, b)
    return builder.or_(builder.fcmp_ordered(">", a, b), builder.and_(a_is_nan, b_is_number))


def _keep_better(builder: Any, candidate: Any, index: Any, value: Any, place: Any) -> None:
    """Of equals, the one at the lower index."""
    so_far, at_place = builder.load(value, typ=F32), builder.load(place, typ=I32)
    alike = builder.fcmp_unordered("ueq", candidate, so_far)
    same = builder.and_(alike, builder.not_(_beats(builder, so_far, candidate)))
    earlier = builder.and_(same, builder.icmp_unsigned("<", index, at_place))
    better = builder.or_(_beats(builder, candidate, so_far), earlier)
    builder.store(builder.select(better, candidate, so_far), value)
    builder.store(builder.select(better, index, at_place), place)


def _strips(builder: Any, count: Any) -> list[tuple[Any, Any, Any, Any]]:
    """Whole vectors of a range, then what is left one by one: (kind, first, last, step)."""
    whole = builder.and_(count, I64(-16))
    return [(V16, I64(0), whole, I64(16)), (F32, whole, count, I64(1))]


def _intrinsic(builder: Any, name: str, kind: Any) -> Any:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind]), name)


add_norm = define(_emit_add_norm, (INT, INT, INT, INT, INT, FLOAT, INT))
turn = define(_emit_turn, (INT, INT, INT, INT))
copy = define(_emit_copy, (INT, INT, INT))
best = define(_emit_best, (INT, INT), INT)
scaled = define(_emit_scaled, (INT, INT, INT, FLOAT))
blend = define(_emit_blend, (INT, INT, INT, FLOAT, FLOAT))
fill = define(_emit_fill, (INT, INT, FLOAT))
scatter = define(_emit_scatter, (INT, INT, INT, INT))
