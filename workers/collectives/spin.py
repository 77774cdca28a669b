"""The compiled inner step of the shared-memory collectives: copy in, raise a flag, wait for the flags, sum.

The memory of a group of n ranks, whose layout only this module and shared_memory.py know::

    | control block of rank 0 | ... | of rank n-1 | slot 0 of rank 0 | ... | slot 0 of n-1 | slot 1 of rank 0 | ...

An operation counts up the sequence number of its rank and uses the slots of that number's parity. A rank that sees
every flag at sequence s knows that all of them have left s - 1, so that writing the slots of s + 1 disturbs no reader:
two slots a rank need one flag an operation and no second one to say that the data has been read.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import extending

from headwise.workers.jit.kernel_cache import kernel
from headwise.workers.jit.native import load_acquire, now_ns, sched_yield, store_release

# Numba's hints describe its classes; inside a compiled function the same names mean machine types.
_numba: Any = numba
carray, types = _numba.carray, _numba.types
intrinsic: Any = extending.intrinsic

CONTROL_BYTES = 512
"""A rank's control block; what shares a cache line is written together."""

SEQUENCE, SIGNATURES, STATUS, PID, CAUSE_BYTES, CLOCK, CAUSE = 0, 8, 64, 72, 80, 128, 192
"""Offsets in a control block: the flag, the signatures of either slot's operation, what Python reads, a timespec."""

DONE, LATE, MISMATCH = 0, 1, 2
"""The outcomes of :func:`step`, in the low two bits; the rank it is about is above them."""

_YIELDS_FOR_NS = 10_000_000
_RETURNS_AFTER_NS = 50_000_000
_NAP_US = 100

_usleep = types.ExternalFunction("usleep", types.int32(types.uint32))
_memcpy = types.ExternalFunction("memcpy", types.intp(types.intp, types.intp, types.uintp))


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@kernel
def write_word(address: int, value: int) -> None:
    """Write a word of a control block; who reads it with :func:`read_word` then sees all that was written before."""
    store_release(address, value)


@kernel
def read_word(address: int) -> int:
    return int(load_acquire(address))


@kernel
def _await_flag(flag: int, sequence: int, spins: int, may_yield: bool, scratch: int) -> bool:
    """Wait until a flag has come to ``sequence``; False after _RETURNS_AFTER_NS without it."""
    for _ in range(spins):
        if load_acquire(flag) >= sequence:
            return True
    start = now_ns(scratch)
    while load_acquire(flag) < sequence:
        waited = now_ns(scratch) - start
        if waited > _RETURNS_AFTER_NS:
            return False
        if may_yield and waited < _YIELDS_FOR_NS:
            sched_yield()
        else:
            _usleep(_NAP_US)
    return True


@kernel
def _sum_f32(slots: int, slot_bytes: int, world_size: int, into: int, count: int) -> None:
    x = carray(_pointer(into), count, dtype=np.float32)
    first = carray(_pointer(slots), count, dtype=np.float32)
    second = carray(_pointer(slots + slot_bytes), count, dtype=np.float32)
    for i in range(count):
        x[i] = first[i] + second[i]
    for rank in range(2, world_size):
        part = carray(_pointer(slots + rank * slot_bytes), count, dtype=np.float32)
        for i in range(count):
            x[i] += part[i]


@kernel
def step(
    memory: int,
    rank: int,
    world_size: int,
    slot_bytes: int,
    sequence: int,
    signature: int,
    address: int,
    num_bytes: int,
    num_sums: int,
    spins: int,
    again: bool,
) -> int:
    """Publish ``num_bytes`` from ``address``, wait for every rank, then sum ``num_sums`` float32 back to ``address``.

    Args:
        signature: what the operation is; the same on every rank.
        spins: how often to look at a flag before yielding the core.
        again: go on with a step that was LATE: the bytes are published already.

    Returns:
        DONE; LATE + 4 * the rank that has not come after 50 ms; or MISMATCH + 4 * the rank with another signature.
    """
    parity = sequence & 1
    slots = memory + world_size * (CONTROL_BYTES + parity * slot_bytes)
    own = memory + rank * CONTROL_BYTES
    if not again:
        _memcpy(slots + rank * slot_bytes, address, num_bytes)
        store_release(own + SIGNATURES + 8 * parity, signature)
        store_release(own + SEQUENCE, sequence)
    for peer in range(world_size):
        control = memory + peer * CONTROL_BYTES
        if not _await_flag(control + SEQUENCE, sequence, spins, not again, own + CLOCK):
            return LATE + 4 * peer
        if load_acquire(control + SIGNATURES + 8 * parity) != signature:
            return MISMATCH + 4 * peer
    if num_sums > 0:
        _sum_f32(slots, slot_bytes, world_size, address, num_sums)
    return DONE
