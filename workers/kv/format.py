"""In what form keys and values are kept: as floats, or as integers with scales. Imports no torch.

Integers are *asymmetric*: a group of numbers is kept as codes of 8 or 4 bits, and each number is ``code * scale +
zero``, with a scale and a zero for the group, both float16. A group is the head of one token for int8, and 32 numbers
of it for int4 (all of it where head_dim is below 32). A head of a block of tokens is then one *record* of bytes:

    keys     codes [head_dim, block_size] | scales [groups, block_size] | zeros [groups, block_size]
    values   codes [block_size, head_dim] | scales [block_size, groups] | zeros [block_size, groups]

Codes of int8 are bytes. Codes of int4 are pairs in a byte, the first in its low half: of keys, numbers 2 i and 2 i + 1
of a token, so there are head_dim / 2 rows; of values, numbers i and i + half of a group whose half is that long, so
there are head_dim / 2 columns, groups side by side.
"""

from __future__ import annotations

from typing import NamedTuple

from headwise.workers.errors import InvalidValueError

FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BITS = {"int8": 8, "int4": 4}
INT4_GROUP = 32
KV_DTYPES = (*FLOAT_BYTES, *BITS, "int8/int4", "int4/int8")
"""What a user may ask for; ``a/b`` is a for keys and b for values."""


class KvFormat(NamedTuple):
    """How keys and values are kept: each a key of FLOAT_BYTES, the same for both, or each a key of BITS."""

    keys: str
    values: str

    def __str__(self) -> str:
        return self.keys if self.keys == self.values else f"{self.keys}/{self.values}"

    @property
    def quantised(self) -> bool:
        return self.keys in BITS

    def block_bytes(self, block_size: int, head_dim: int) -> int:
        """Of one KV head's keys and values of a block, in one layer."""
        return sum(record_bytes(kind, block_size, head_dim) for kind in self)


def kv_format(name: str, head_dim: int) -> KvFormat:
    """
    Args:
        name: one of KV_DTYPES.

    Raises:
        InvalidValueError: it is none, or does not work with such heads; the field is named kv_dtype.
    """
    if name not in KV_DTYPES:
        raise InvalidValueError("kv_dtype", name, f"must be one of {', '.join(KV_DTYPES)}")
    keys, _, values = name.partition("/")
    if "int4" in (keys, values) and (head_dim % 2 or head_dim % group_size("int4", head_dim)):
        limit = f"needs a head_dim that is a multiple of {INT4_GROUP}, or even and below; it is {head_dim} here"
        raise InvalidValueError("kv_dtype", name, limit)
    return KvFormat(keys, values or keys)


def group_size(kind: str, head_dim: int) -> int:
    """How many numbers of a head share a scale and a zero. ``kind``: a key of BITS."""
    return head_dim if kind == "int8" else min(INT4_GROUP, head_dim)


def record_bytes(kind: str, block_size: int, head_dim: int) -> int:
    """Of a KV head's keys, or values, of a block in one layer. ``kind``: a key of FLOAT_BYTES or of BITS."""
    if kind in FLOAT_BYTES:
        return block_size * head_dim * FLOAT_BYTES[kind]
    groups = head_dim // group_size(kind, head_dim)
    return block_size * (head_dim * BITS[kind] // 8 + 4 * groups)
