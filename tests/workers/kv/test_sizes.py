"""How many blocks a memory budget pays for."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.sizes import MOST_BLOCKS, affordable, parse_memory
from tests.effort import examples


@examples(60)
@given(
    sizes=st.lists(st.integers(0, 100), min_size=1, max_size=3),
    caps=st.lists(st.one_of(st.none(), st.integers(1, 50)), min_size=3, max_size=3),
    memory=st.integers(0, 5000),
)
def test_as_many_blocks_as_memory_pays_for(sizes: list[int], caps: list[int | None], memory: int) -> None:
    caps = caps[: len(sizes)]

    def taken(count: int) -> int:
        return sum(size * min(count, cap or count) for size, cap in zip(sizes, caps, strict=True))

    found = affordable(memory, sizes, caps)
    assert taken(found) <= memory and (found == MOST_BLOCKS or taken(found + 1) > memory)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("2GiB", 2 << 30),
        ("512 MiB", 512 << 20),
        ("1.5gib", 3 << 29),
        ("2GB", 2 * 10**9),
        ("64KiB", 65536),
        ("4096", 4096),
        (4096, 4096),
        (4096.0, 4096),
        ("1e9", 10**9),
        (0.25, 250),
        ("0.25", 250),
        (".5", 500),
        (1.0, 1000),
        (1, 1000),
        ("1B", 1),
    ],
)
def test_memory_budgets(text: str | int | float, budget: int) -> None:
    assert parse_memory(text, total=1000) == budget


@pytest.mark.parametrize(
    "text",
    ["", "lots", "2TiB", "-1GiB", "GiB", -5, 0, 0.0, "0GiB", "0.0001", True, float("nan"), float("inf"), "1 2", None],
)
def test_what_is_no_memory_budget_is_refused_by_name(text: Any) -> None:
    with pytest.raises(InvalidValueError, match=r"^kv_memory="):
        parse_memory(text, total=1000)
