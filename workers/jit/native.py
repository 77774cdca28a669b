"""What compiled kernels need of the machine and Numba does not offer: memory by address, atomics, the clock.

Addresses are int64; offsets count elements.
"""

from __future__ import annotations

import platform
import time
from typing import Any

import numba
from llvmlite import ir

from headwise.workers.jit.kernel_cache import kernel
from headwise.workers.jit.vectors import FLOAT, I8, I32, I64, INT, at, cgutils, define, load, store

_types: Any = numba.types

sched_yield = _types.ExternalFunction("sched_yield", _types.int32())
"""Let another thread have the core."""

_clock_gettime = _types.ExternalFunction("clock_gettime", _types.int32(_types.int32, _types.intp))
_CLOCK_MONOTONIC = time.CLOCK_MONOTONIC
_MACHINE = platform.machine()
_PAUSES: dict[str, tuple[str, list[Any]]] = {
    "x86_64": ("llvm.x86.sse2.pause", []),
    # The barrier holds the core up for about as long as x86's pause does; most cores ignore the hint "yield".
    "aarch64": ("llvm.aarch64.isb", [I32(15)]),
}
"""By machine: the intrinsic of a waiting loop, and its arguments."""


def _emit_load_float(builder: Any, address: Any, offset: Any) -> Any:
    return load(builder, at(builder, address, offset))


def _emit_store_float(builder: Any, address: Any, offset: Any, value: Any) -> None:
    store(builder, value, at(builder, address, offset))


def _emit_load_int(builder: Any, address: Any, offset: Any) -> Any:
    return load(builder, at(builder, address, offset, 8), I64)


def _emit_store_int(builder: Any, address: Any, offset: Any, value: Any) -> None:
    store(builder, value, at(builder, address, offset, 8))


def _emit_load_byte(builder: Any, address: Any, offset: Any) -> Any:
    return builder.zext(load(builder, at(builder, address, offset, 1), I8, 1), I64)


def _emit_store_byte(builder: Any, address: Any, offset: Any, value: Any) -> None:
    store(builder, builder.trunc(value, I8), at(builder, address, offset, 1), 1)


def _emit_load_acquire(builder: Any, address: Any) -> Any:
    return builder.load_atomic(builder.inttoptr(address, I64.as_pointer()), "acquire", 8)


def _emit_store_release(builder: Any, address: Any, value: Any) -> None:
    builder.store_atomic(value, builder.inttoptr(address, I64.as_pointer()), "release", 8)


def _emit_fetch_add(builder: Any, address: Any, value: Any) -> Any:
    return builder.atomic_rmw("add", builder.inttoptr(address, I64.as_pointer()), value, "seq_cst")


def _emit_swap_if(builder: Any, address: Any, expected: Any, value: Any) -> Any:
    pair = builder.cmpxchg(builder.inttoptr(address, I64.as_pointer()), expected, value, "seq_cst", "seq_cst")
    return builder.zext(builder.extract_value(pair, 1), I64)


def _emit_pause(builder: Any) -> None:
    if _MACHINE in _PAUSES:
        name, arguments = _PAUSES[_MACHINE]
        kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


load_float = define(_emit_load_float, (INT, INT), FLOAT)
store_float = define(_emit_store_float, (INT, INT, FLOAT))
load_int = define(_emit_load_int, (INT, INT), INT)
store_int = define(_emit_store_int, (INT, INT, INT))
load_byte = define(_emit_load_byte, (INT, INT), INT)
store_byte = define(_emit_store_byte, (INT, INT, INT))
load_acquire = define(_emit_load_acquire, (INT,), INT)
"""The int64 at an address, read anew each time: a plain read in a waiting loop is hoisted out of it."""
store_release = define(_emit_store_release, (INT, INT))
"""Write the int64 at an address, after everything this thread wrote before."""
fetch_add = define(_emit_fetch_add, (INT, INT), INT)
"""Add to the int64 at an address and return what it was."""
swap_if = define(_emit_swap_if, (INT, INT, INT), INT)
"""Write the int64 at an address if it is as expected; returns 1 if it was."""
pause = define(_emit_pause, ())
"""Tell the core that this is a waiting loop."""


@kernel
def now_ns(timespec: int) -> int:
    """The monotonic clock; ``timespec`` is the address of 16 bytes to use."""
    _clock_gettime(_CLOCK_MONOTONIC, timespec)
    return int(load_int(timespec, 0) * 1_000_000_000 + load_int(timespec, 1))
