"""The vector code of the CPU attention kernels, as LLVM intrinsics that Numba functions call.

Numba compiles scalar loops and leaves vectors to LLVM, which does not keep a tile of accumulators in registers. So
the inner loops are built here as LLVM instructions on vectors of 16 floats: one AVX-512 register, and two or four on
machines with narrower ones. Tiles, runs, chunks and query rows are those of cpu_plan.py: 6 rows x 4 vectors of
accumulators, 4 vectors of keys and one query element fill 29 of AVX-512's 32 registers.

Addresses are bytes as int64; strides and offsets count floats.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import llvmlite.binding
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils as numba_cgutils
from numba.extending import intrinsic

from headwise.workers.attention.cpu_plan import CHUNK_ROWS, RUN_KEYS, TILE_KEYS, TILE_RUNS

cgutils: Any = numba_cgutils  # has no types

_features: dict[str, bool] = llvmlite.binding.get_host_cpu_features()
_forced: str = numba.config.CPU_FEATURES or ""  # type: ignore[attr-defined]
# A chunk's accumulators must stay in registers: AVX-512 has 32 of 16 floats, others 16 of 8 or 32 of 4.
_HAS_AVX512 = "+avx512f" in _forced if _forced else _features.get("avx512f", False)
_RUNS_AT_ONCE = TILE_RUNS if _HAS_AVX512 else 1
COLUMNS_AT_ONCE = 64 if _HAS_AVX512 else 16
"""How many columns of the values ``add_values`` takes at most."""

_I32, _I64, _F32, _PTR = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.PointerType()
_V16 = ir.VectorType(_F32, 16)

# 2 ** f over [-0.5, 0.5], relative error below 2e-9 before rounding (weighted least squares on Chebyshev nodes).
_EXP2 = (
    1.0000000005541891,
    0.6931472057371868,
    0.2402264689045523,
    0.055503287770956165,
    0.00961848897647378,
    0.001339993117728661,
    0.00015345806795266764,
)
_EXP2_MIN = -125.0
# Added to a float below 2 ** 22, it leaves the nearest integer in the low bits of the sum.
_ROUND = 1.5 * 2.0**23


def _define(emit: Callable[..., Any], args: tuple[Any, ...], returns: Any = types.void) -> Any:
    """The intrinsic whose code ``emit(builder, *args)`` builds."""

    def codegen(context: Any, builder: Any, _signature: Any, values: tuple[Any, ...]) -> Any:
        result = emit(builder, *values)
        return context.get_dummy_value() if returns is types.void else result

    def typed(_context: Any, *_args: Any) -> Any:
        return returns(*args), codegen

    # Numba cannot call a function of *args, but it believes the signature that a function states.
    names = ["context", *(f"arg{i}" for i in range(len(args)))]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    typed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return intrinsic(typed)


def _at(builder: Any, address: Any, offset: Any, size: int = 4) -> Any:
    """A pointer ``offset`` elements of ``size`` bytes past an address or pointer; offsets are ints or i64 values."""
    pointer = address if isinstance(address.type, ir.PointerType) else builder.inttoptr(address, _PTR)
    offset = _I64(offset) if isinstance(offset, int) else offset
    return builder.gep(pointer, [offset], source_etype=_F32 if size == 4 else _I64)


def _load(builder: Any, pointer: Any, kind: Any = _F32) -> Any:
    value = builder.load(pointer, typ=kind)
    value.align = 4
    return value


def _store(builder: Any, value: Any, pointer: Any) -> None:
    builder.store(value, pointer).align = 4


def _splat(builder: Any, value: Any, kind: Any = _V16) -> Any:
    lane = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _I32(0))
    zeros = ir.Constant(ir.VectorType(_I32, kind.count), [0] * kind.count)
    return builder.shuffle_vector(lane, ir.Constant(kind, ir.Undefined), zeros)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))


def _larger(builder: Any, a: Any, b: Any) -> Any:
    """The larger of two floats or vectors, and b where either is NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _constant(kind: Any, value: float) -> Any:
    return ir.Constant(kind, [value] * 16 if isinstance(kind, ir.VectorType) else value)


def _emit_exp2(builder: Any, x: Any) -> Any:
    """2 ** x for x <= 0 within 1.5 ulp; 2 ** -125 below it; NaN stays NaN."""
    kind = x.type
    bits = ir.VectorType(_I32, 16) if isinstance(kind, ir.VectorType) else _I32
    x = _larger(builder, _constant(kind, _EXP2_MIN), x)
    rounded = builder.fadd(x, _constant(kind, _ROUND))
    fraction = builder.fsub(x, builder.fsub(rounded, _constant(kind, _ROUND)))
    power = _constant(kind, _EXP2[-1])
    for coefficient in reversed(_EXP2[:-1]):
        power = _fma(builder, power, fraction, _constant(kind, coefficient))
    exponent = builder.shl(builder.bitcast(rounded, bits), _constant(bits, 23))
    return builder.bitcast(builder.add(builder.bitcast(power, bits), exponent), kind)


def _reduce(builder: Any, vector: Any, combine: Callable[[Any, Any, Any], Any]) -> Any:
    """One float of a vector's 16 lanes."""
    for half in (8, 4, 2, 1):
        lanes = [(lane + half) % 16 for lane in range(16)]
        other = builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(_I32, 16), lanes))
        vector = combine(builder, vector, other)
    return builder.extract_element(vector, _I32(0))


def _switch(builder: Any, value: Any, cases: Mapping[int, Callable[[], None]]) -> None:
    """Run the case of an i64 value; none if there is none."""
    end = builder.append_basic_block("end")
    switch = builder.switch(value, end)
    for number, emit in cases.items():
        block = builder.append_basic_block(f"case{number}")
        switch.add_case(_I64(number), block)
        builder.position_at_end(block)
        emit()
        builder.branch(end)
    builder.position_at_end(end)


def _emit_scores(builder: Any, rows: Any, *args: Any) -> None:
    """s[rows, TILE_KEYS] = q[D, rows] times a tile's keys, fetching the next tile's keys ahead."""
    cases = {n: partial(_emit_scores_of, builder, n, *args) for n in range(1, CHUNK_ROWS + 1)}
    _switch(builder, rows, cases)


def _emit_scores_of(builder: Any, rows: int, *args: Any) -> None:
    for first in range(0, TILE_RUNS, _RUNS_AT_ONCE):
        _emit_scores_of_runs(builder, rows, range(first, first + _RUNS_AT_ONCE), *args)


def _emit_scores_of_runs(
    builder: Any, rows: int, tile_runs: range, q: Any, runs: Any, next_runs: Any, key_stride: Any, head_dim: Any, s: Any
) -> None:
    tile = [(row, run) for row in range(rows) for run in tile_runs]
    sums = {at: cgutils.alloca_once_value(builder, _constant(_V16, 0.0)) for at in tile}
    keys = {run: _load(builder, _at(builder, runs, run, 8), _I64) for run in tile_runs}
    next_keys = [_load(builder, _at(builder, next_runs, run, 8), _I64) for run in tile_runs]
    with cgutils.for_range(builder, head_dim) as loop:
        offset = builder.mul(loop.index, key_stride)
        for address in next_keys:
            _prefetch(builder, _at(builder, address, offset))
        vectors = {run: _load(builder, _at(builder, address, offset), _V16) for run, address in keys.items()}
        column = _at(builder, q, builder.mul(loop.index, _I64(rows)))
        elements = [_splat(builder, _load(builder, _at(builder, column, row))) for row in range(rows)]
        for row, run in tile:
            total = builder.load(sums[row, run], typ=_V16)
            builder.store(_fma(builder, elements[row], vectors[run], total), sums[row, run])
    for row, run in tile:
        total = builder.load(sums[row, run], typ=_V16)
        _store(builder, total, _at(builder, s, row * TILE_KEYS + run * RUN_KEYS))


def _emit_add_values(builder: Any, rows: Any, width: Any, *args: Any) -> None:
    """o[rows, width] = o * alpha[rows] + p[rows, num_keys] times a tile's values, fetching the next tile's ahead.

    ``o`` and the values are at the first of ``width`` columns of their D: 8, 16, 32 or 64, up to COLUMNS_AT_ONCE.
    """
    cases = {
        n * 64 + w: partial(_emit_add_values_of, builder, n, w, *args)
        for n in range(1, CHUNK_ROWS + 1)
        for w in (8, 16, 32, 64)
        if w <= COLUMNS_AT_ONCE
    }
    _switch(builder, builder.add(builder.mul(rows, _I64(64)), width), cases)


def _emit_add_values_of(
    builder: Any,
    rows: int,
    width: int,
    p: Any,
    alpha: Any,
    runs: Any,
    next_runs: Any,
    head_dim: Any,
    column: Any,
    num_keys: Any,
    o: Any,
) -> None:
    kind = ir.VectorType(_F32, min(width, 16))
    tile = [(row, i) for row in range(rows) for i in range(0, width, 16)]
    factors = [_splat(builder, _load(builder, _at(builder, alpha, row)), kind) for row in range(rows)]
    outputs = {(row, i): _at(builder, _at(builder, o, builder.mul(head_dim, _I64(row))), i) for row, i in tile}
    sums = {}
    for row, i in tile:
        scaled = builder.fmul(_load(builder, outputs[row, i], kind), factors[row])
        sums[row, i] = cgutils.alloca_once_value(builder, scaled)
    num_runs = builder.udiv(builder.add(num_keys, _I64(RUN_KEYS - 1)), _I64(RUN_KEYS))
    with cgutils.for_range(builder, num_runs) as outer:
        first = builder.mul(outer.index, _I64(RUN_KEYS))
        left = builder.sub(num_keys, first)
        count = builder.select(builder.icmp_signed("<", left, _I64(RUN_KEYS)), left, _I64(RUN_KEYS))
        values = _at(builder, _load(builder, _at(builder, runs, outer.index, 8), _I64), column)
        next_values = _at(builder, _load(builder, _at(builder, next_runs, outer.index, 8), _I64), column)
        weights = _at(builder, p, first)
        with cgutils.for_range(builder, count) as inner:
            offset = builder.mul(inner.index, head_dim)
            line, next_line = _at(builder, values, offset), _at(builder, next_values, offset)
            for i in range(0, width, 16):
                _prefetch(builder, _at(builder, next_line, i))
            vectors = {i: _load(builder, _at(builder, line, i), kind) for i in range(0, width, 16)}
            weight = _at(builder, weights, inner.index)
            for row in range(rows):
                factor = _splat(builder, _load(builder, _at(builder, weight, row * TILE_KEYS)), kind)
                for i, vector in vectors.items():
                    total = builder.load(sums[row, i], typ=kind)
                    builder.store(_fma(builder, factor, vector, total), sums[row, i])
    for at in tile:
        _store(builder, builder.load(sums[at], typ=kind), outputs[at])


def _prefetch(builder: Any, pointer: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [_PTR, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [pointer, _I32(0), _I32(3), _I32(1)])


def _emit_softmax_row(builder: Any, s: Any, limit: Any, highest: Any, total: Any, alpha: Any) -> None:
    """Scores s[TILE_KEYS] become weights relative to the row's highest score so far; keys at and past limit weigh 0.

    ``highest`` (one float), ``total`` (16 partial sums) and ``alpha`` (what earlier sums are now to be multiplied
    with) are updated. A NaN score makes the row's weights NaN.
    """
    lanes = ir.VectorType(_I32, 16)
    limits = _splat(builder, builder.trunc(limit, _I32), lanes)
    lowest = _constant(_V16, float("-inf"))
    visible, scores = [], []
    for run in range(TILE_RUNS):
        keys = ir.Constant(lanes, [run * RUN_KEYS + lane for lane in range(16)])
        visible.append(builder.icmp_signed("<", keys, limits))
        scores.append(builder.select(visible[run], _load(builder, _at(builder, s, run * 16), _V16), lowest))
    pairs = [_larger(builder, scores[0], scores[1]), _larger(builder, scores[2], scores[3])]
    before = _load(builder, _at(builder, highest, 0))
    now = _larger(builder, _reduce(builder, _larger(builder, *pairs), _larger), before)
    _store(builder, now, _at(builder, highest, 0))
    factor = _emit_exp2(builder, builder.fsub(before, now))
    _store(builder, factor, _at(builder, alpha, 0))
    sums, now_V = [], _splat(builder, now)
    for run in range(TILE_RUNS):
        weight = _emit_exp2(builder, builder.fsub(scores[run], now_V))
        weight = builder.select(visible[run], weight, _constant(_V16, 0.0))
        _store(builder, weight, _at(builder, s, run * 16))
        sums.append(weight)
    added = builder.fadd(builder.fadd(sums[0], sums[1]), builder.fadd(sums[2], sums[3]))
    pointer = _at(builder, total, 0)
    _store(builder, _fma(builder, _load(builder, pointer, _V16), _splat(builder, factor), added), pointer)


def _emit_take_ticket(builder: Any, counter: Any) -> Any:
    return builder.atomic_rmw("add", _at(builder, counter, 0, 8), _I64(1), "seq_cst")


def _emit_load(builder: Any, address: Any, offset: Any) -> Any:
    return _load(builder, _at(builder, address, offset))


def _emit_store(builder: Any, address: Any, offset: Any, value: Any) -> None:
    _store(builder, value, _at(builder, address, offset))


def _emit_store_address(builder: Any, address: Any, offset: Any, value: Any) -> None:
    _store(builder, value, _at(builder, address, offset, 8))


_INT = types.int64
exp2 = _define(_emit_exp2, (types.float32,), types.float32)
load_float = _define(_emit_load, (_INT, _INT), types.float32)
store_float = _define(_emit_store, (_INT, _INT, types.float32))
store_address = _define(_emit_store_address, (_INT, _INT, _INT))
take_ticket = _define(_emit_take_ticket, (_INT,), _INT)
scores = _define(_emit_scores, (_INT,) * 7)
softmax_row = _define(_emit_softmax_row, (_INT,) * 5)
add_values = _define(_emit_add_values, (_INT,) * 10)
