"""Keys and values of one KV head of a block, in whatever form they are kept: written a token at a time, and read a run
at a time as floats. Records are those of :mod:`~headwise.workers.kv.format`, keys of floats are transposed.

Addresses are bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from headwise.workers.cpu.attention_plan import RUN_KEYS, Sizes
from headwise.workers.cpu.kv_records_simd import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    INT4,
    INT8,
    expand_keys,
    expand_values,
    narrow,
    quantise,
    widen,
)
from headwise.workers.cpu.pointwise_simd import copy, scatter
from headwise.workers.jit.kernel_cache import kernel
from headwise.workers.jit.native import load_byte, load_int, store_byte

FORMS = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": FLOAT16, "int8": INT8, "int4": INT4}
"""By the name of a format, what the kernels call it."""

_FLOAT_BYTES, _HALF_BYTES = 4, 2

PLANE_WORDS = 5
_GROUP, _KEYS, _KEY_STRIDE, _VALUES, _VALUE_STRIDE = range(PLANE_WORDS)


class Plane(NamedTuple):
    """Where the cache holds a KV head of a layer: PLANE_WORDS words in memory.

    Attributes:
        group: the head's; its blocks count by themselves.
        keys, values: the addresses of the head's in block 0.
        key_stride, value_stride: from block to block.
    """

    group: int
    keys: int
    key_stride: int
    values: int
    value_stride: int


class LayerKV(NamedTuple):
    """Where the cache holds a layer.

    Attributes:
        planes: the address of the planes of its KV heads.
        kind: of the layer, in Groups.kinds_XK.
    """

    planes: int
    kind: int


@kernel
def plane_of(kv: LayerKV, head: int) -> Plane:
    at = kv.planes + 8 * PLANE_WORDS * head
    return Plane(
        load_int(at, _GROUP),
        load_int(at, _KEYS),
        load_int(at, _KEY_STRIDE),
        load_int(at, _VALUES),
        load_int(at, _VALUE_STRIDE),
    )


@kernel
def write_token(
    keys: int, values: int, head_stride: int, slots: Any, token: int, tokens: int, sizes: Sizes, kv: LayerKV
) -> None:
    """Put one token's keys and values at its slots. Where they are quantised, the floats themselves are overwritten.

    Args:
        keys, values: the addresses of the first heads'; the others follow ``head_stride`` floats apart.
        slots: [G * tokens], see :class:`~headwise.workers.model.model.StepInput`.
    """
    for head in range(sizes.kv_heads):
        plane = plane_of(kv, head)
        slot = slots[plane.group * tokens + token]
        block = slot // sizes.block_size
        offset = slot - block * sizes.block_size
        at = _FLOAT_BYTES * head * head_stride
        write_key(keys + at, plane.keys + block * plane.key_stride, offset, sizes)
        write_value(values + at, plane.values + block * plane.value_stride, offset, sizes)


@kernel
def write_key(key: int, record: int, offset: int, sizes: Sizes) -> None:
    form, size, head_dim = sizes.key_form, sizes.block_size, sizes.head_dim
    if form == FLOAT32:
        scatter(key, record + _FLOAT_BYTES * offset, size, head_dim)
    elif form in (BFLOAT16, FLOAT16):
        narrow(form, key, record + _HALF_BYTES * offset, _HALF_BYTES * size, head_dim)
    else:
        group = sizes.key_group
        scales = record + size * (head_dim if form == INT8 else head_dim // 2)
        zeros = scales + _HALF_BYTES * size * (head_dim // group)
        for first in range(0, head_dim, group):
            at = _HALF_BYTES * (first // group * size + offset)
            codes = key + _FLOAT_BYTES * first
            quantise(codes, group, 255 if form == INT8 else 15, codes, scales + at, zeros + at)
            if form == INT8:
                for i in range(group):
                    store_byte(record, (first + i) * size + offset, load_byte(codes, i))
            else:
                for i in range(group // 2):
                    pair = load_byte(codes, 2 * i) | load_byte(codes, 2 * i + 1) << 4
                    store_byte(record, (first // 2 + i) * size + offset, pair)


@kernel
def write_value(value: int, record: int, offset: int, sizes: Sizes) -> None:
    form, size, head_dim = sizes.value_form, sizes.block_size, sizes.head_dim
    if form == FLOAT32:
        copy(value, record + _FLOAT_BYTES * offset * head_dim, head_dim)
    elif form in (BFLOAT16, FLOAT16):
        narrow(form, value, record + _HALF_BYTES * offset * head_dim, _HALF_BYTES, head_dim)
    else:
        group = sizes.value_group
        width = head_dim if form == INT8 else head_dim // 2
        scales = record + size * width
        zeros = scales + _HALF_BYTES * size * (head_dim // group)
        for first in range(0, head_dim, group):
            at = _HALF_BYTES * (offset * (head_dim // group) + first // group)
            codes = value + _FLOAT_BYTES * first
            line = record + offset * width + (first if form == INT8 else first // 2)
            if form == INT8:
                quantise(codes, group, 255, line, scales + at, zeros + at)
            else:
                quantise(codes, group, 15, codes, scales + at, zeros + at)
                for i in range(group // 2):
                    store_byte(line, i, load_byte(codes, i) | load_byte(codes, i + group // 2) << 4)


@kernel
def expand_keys_of_run(keys: int, offset: int, sizes: Sizes, out: int) -> None:
    """A run of keys as floats, [D, RUN_KEYS].

    Args:
        keys: the address of the block's first key, of the head.
        offset: of the run in its block.
    """
    size, head_dim, form, group = sizes.block_size, sizes.head_dim, sizes.key_form, sizes.key_group
    at = _HALF_BYTES * offset
    if form in (BFLOAT16, FLOAT16):
        widen(form, keys + at, _HALF_BYTES * size, head_dim, out)
    else:
        scales = keys + size * (head_dim if form == INT8 else head_dim // 2)
        zeros = scales + _HALF_BYTES * size * (head_dim // group)
        expand_keys(form, keys + offset, scales + at, zeros + at, size, head_dim, group, out)


@kernel
def expand_values_of_run(values: int, offset: int, sizes: Sizes, out: int) -> None:
    """A run of values as floats, [RUN_KEYS, D]; as :func:`expand_keys_of_run`."""
    size, head_dim, form, group = sizes.block_size, sizes.head_dim, sizes.value_form, sizes.value_group
    at = _HALF_BYTES * offset
    if form in (BFLOAT16, FLOAT16):
        widen(form, values + at * head_dim, _HALF_BYTES * RUN_KEYS, head_dim, out)
    else:
        width, at = head_dim if form == INT8 else head_dim // 2, at * (head_dim // group)
        scales = values + size * width
        zeros = scales + _HALF_BYTES * size * (head_dim // group)
        expand_values(form, values + offset * width, scales + at, zeros + at, head_dim, group, out)


@kernel
def values_of_tile(sizes: Sizes) -> int:
    """How many floats the keys of a tile take; its values come after them."""
    return 4 * RUN_KEYS * sizes.head_dim
