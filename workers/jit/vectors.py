"""LLVM instructions on vectors of 16 floats, from which the CPU kernels' inner loops are built for Numba to call.

Numba compiles scalar loops and leaves vectors to LLVM, which does not keep a tile of accumulators in registers. So
the inner loops are emitted here: a vector of 16 floats is one AVX-512 register, and two or four on machines with
narrower ones. An emitting function takes the IR builder first; ``define`` makes a Numba intrinsic of one.

Addresses are bytes as int64; strides and offsets count floats.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import llvmlite.binding
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils as numba_cgutils
from numba.extending import intrinsic

cgutils: Any = numba_cgutils  # has no types

_features: dict[str, bool] = llvmlite.binding.get_host_cpu_features()
_forced: str = numba.config.CPU_FEATURES or ""  # type: ignore[attr-defined]
HAS_AVX512 = "+avx512f" in _forced if _forced else _features.get("avx512f", False)
"""Whether there are 32 registers of 16 floats; other machines have 16 of 8 or 32 of 4."""

INT = types.int64
FLOAT = types.float32
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32, PTR = ir.HalfType(), ir.FloatType(), ir.PointerType()
V16 = ir.VectorType(F32, 16)
_ELEMENTS = {1: I8, 2: I16, 4: F32, 8: I64}

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


def define(emit: Callable[..., Any], args: tuple[Any, ...], returns: Any = types.void) -> Any:
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


def at(builder: Any, address: Any, offset: Any, size: int = 4) -> Any:
    """A pointer ``offset`` elements of ``size`` bytes past an address or pointer; offsets are ints or i64 values."""
    pointer = address if isinstance(address.type, ir.PointerType) else builder.inttoptr(address, PTR)
    offset = I64(offset) if isinstance(offset, int) else offset
    return builder.gep(pointer, [offset], source_etype=_ELEMENTS[size])


def load(builder: Any, pointer: Any, kind: Any = F32, align: int = 4) -> Any:
    value = builder.load(pointer, typ=kind)
    value.align = align
    return value


def store(builder: Any, value: Any, pointer: Any, align: int = 4) -> None:
    builder.store(value, pointer).align = align


def splat(builder: Any, value: Any, kind: Any = V16) -> Any:
    lane = builder.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
    zeros = ir.Constant(ir.VectorType(I32, kind.count), [0] * kind.count)
    return builder.shuffle_vector(lane, ir.Constant(kind, ir.Undefined), zeros)


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))


def larger(builder: Any, a: Any, b: Any) -> Any:
    """The larger of two floats or vectors, and b where either is NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def constant(kind: Any, value: float) -> Any:
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def exp2(builder: Any, x: Any) -> Any:
    """2 ** x for x <= 0 within 1.5 ulp; 2 ** -125 below it; NaN stays NaN."""
    kind = x.type
    bits = ir.VectorType(I32, 16) if isinstance(kind, ir.VectorType) else I32
    x = larger(builder, constant(kind, _EXP2_MIN), x)
    rounded = builder.fadd(x, constant(kind, _ROUND))
    fraction = builder.fsub(x, builder.fsub(rounded, constant(kind, _ROUND)))
    power = constant(kind, _EXP2[-1])
    for coefficient in reversed(_EXP2[:-1]):
        power = fma(builder, power, fraction, constant(kind, coefficient))
    exponent = builder.shl(builder.bitcast(rounded, bits), constant(bits, 23))
    return builder.bitcast(builder.add(builder.bitcast(power, bits), exponent), kind)


def reduce(builder: Any, vector: Any, combine: Callable[[Any, Any, Any], Any]) -> Any:
    """One float of a vector's lanes, whose number is a power of 2."""
    count = half = vector.type.count
    while half > 1:
        half //= 2
        lanes = [(lane + half) % count for lane in range(count)]
        other = builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, count), lanes))
        vector = combine(builder, vector, other)
    return builder.extract_element(vector, I32(0))


def switch(builder: Any, value: Any, cases: Mapping[int, Callable[[], None]]) -> None:
    """Run the case of an i64 value; none if there is none."""
    end = builder.append_basic_block("end")
    switch = builder.switch(value, end)
    for number, emit in cases.items():
        block = builder.append_basic_block(f"case{number}")
        switch.add_case(I64(number), block)
        builder.position_at_end(block)
        emit()
        builder.branch(end)
    builder.position_at_end(end)


def prefetch(builder: Any, pointer: Any, level: int = 3) -> None:
    kind = ir.FunctionType(ir.VoidType(), [PTR, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [pointer, I32(0), I32(level), I32(1)])
