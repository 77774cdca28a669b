"""How many bytes blocks of KV take, and how many of them a memory budget pays for. Imports no torch."""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Sequence

from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.format import KvFormat
from headwise.workers.kv.policy import KvPolicy

MOST_BLOCKS = (1 << 31) - 1
"""Of a group: block tables are int32."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def block_bytes(policy: KvPolicy, format: KvFormat, block_size: int, head_dim: int) -> tuple[int, ...]:
    """Bytes of the keys and values of one block of each group, all layers together.

    Args:
        policy: of the heads of a rank; a group without heads there takes nothing.
    """
    heads = [sum(row.count(group) for row in policy.groups_LK) for group in range(policy.num_groups)]
    return tuple(count * format.block_bytes(block_size, head_dim) for count in heads)


def affordable(memory: int, block_bytes: Sequence[int], caps: Sequence[int | None]) -> int:
    """The largest N so that ``memory`` holds min(N, cap) blocks of every group; at most MOST_BLOCKS.

    Args:
        memory: bytes.
        block_bytes: of each group.
        caps: see :meth:`KvPolicy.caps`.
    """

    def fits(count: int) -> bool:
        taken = (size * min(count, count if cap is None else cap) for size, cap in zip(block_bytes, caps, strict=True))
        return sum(taken) <= memory

    return bisect(range(1, MOST_BLOCKS + 1), False, key=lambda count: not fits(count))


def parse_memory(text: str | int | float, total: int) -> int:
    """Bytes of a memory budget.

    Args:
        text: bytes (``1073741824``), a size (``"2GiB"``, ``"512 MB"``), or, where it is at most 1, a fraction of total.
        total: the bytes a fraction refers to.

    Raises:
        InvalidValueError: not one of these; the field is named kv_memory.
    """
    wanted = f'must be a size such as "2GiB" or a fraction in (0, 1] of the {total} bytes available'
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)(?:e([+-]?\d{1,2}))?\s*([KMG]?I?B)?\s*", str(text), re.IGNORECASE)
    if match is None or isinstance(text, bool) or (match[3] or "").upper() not in _UNITS:
        raise InvalidValueError("kv_memory", text, wanted)
    number = float(match[1]) * 10.0 ** int(match[2] or 0)
    budget = int(number * total) if number <= 1 and not match[3] else int(number * _UNITS[(match[3] or "").upper()])
    if budget < 1:
        raise InvalidValueError("kv_memory", text, wanted)
    return budget
