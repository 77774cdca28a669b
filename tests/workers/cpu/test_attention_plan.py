"""How a step is cut: which parts a query row's context has does not depend on what is computed with it."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.workers.cpu import attention_plan
from headwise.workers.cpu.attention_plan import PART_KEYS, TILE_KEYS, Sizes, StepItems, cut_step, rows_of_item
from headwise.workers.model.attention import AttentionBatch
from tests.effort import examples

BLOCK = 16


def cut(rows: list[tuple[int, int]], groups: list[int], threads: int, parallel_cost: int = 0) -> StepItems:
    """Cuts a step of (queries, context) rows."""
    queries, contexts = zip(*rows, strict=True)
    blocks = -(-max(contexts) // BLOCK)
    q_starts = np.cumsum([0, *groups])
    sizes = Sizes(blocks, len(groups), BLOCK, 64, rows_of_item(q_starts))
    starts = np.cumsum([0, *queries], dtype=np.int32)
    tables = np.tile(np.arange(blocks, dtype=np.int32), (len(rows), 1))
    with mock.patch.object(attention_plan, "_PARALLEL_COST", parallel_cost):
        return cut_step(AttentionBatch(starts, np.array(contexts, np.int32), tables), sizes, q_starts, threads)


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[int, int]]:
    contexts = draw(st.lists(st.integers(1, 4 * PART_KEYS), min_size=1, max_size=5))
    return [(draw(st.just(1) | st.integers(1, context)), context) for context in contexts]


@examples(100)
@given(
    rows=steps(),
    groups=st.lists(st.sampled_from([1, 2, 3, 4, 7, 100]), min_size=1, max_size=3),
    threads=st.integers(1, 8),
)
def test_every_query_row_has_the_parts_of_its_position(
    rows: list[tuple[int, int]], groups: list[int], threads: int
) -> None:
    step = cut(rows, groups, threads)
    seen: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for item in step.items:
        first, last = item["first_position"], item["first_position"] + item["num_tokens"] - 1
        assert first // PART_KEYS == last // PART_KEYS == item["num_parts"] - 1
        assert item["num_tokens"] * item["num_heads"] <= rows_of_item(np.cumsum([0, *groups]))
        for token in range(item["num_tokens"]):
            for head in range(item["num_heads"]):
                place = (int(item["first_token"]) + token, int(item["first_head"]) + head)
                seen.setdefault(place, []).append((int(item["key_start"]), int(item["key_end"])))
    positions = [context - queries + i for queries, context in rows for i in range(queries)]
    assert sorted(seen) == [(token, head) for token in range(len(positions)) for head in range(sum(groups))]
    for (token, _), stretches in seen.items():
        starts, ends = zip(*sorted(stretches), strict=True)
        assert starts in ((0,), tuple(range(0, positions[token] + 1, PART_KEYS)))
        assert ends[:-1] == starts[1:] and ends[-1] > positions[token]


@examples(100)
@given(rows=steps(), groups=st.lists(st.sampled_from([1, 3, 4]), min_size=1, max_size=3), threads=st.integers(2, 8))
def test_sums_of_parts_lie_one_after_the_other(rows: list[tuple[int, int]], groups: list[int], threads: int) -> None:
    step = cut(rows, groups, threads)
    divided = step.items[step.items["sums_row"] >= 0]
    divided = divided[np.argsort(divided["sums_row"])]
    next_row = 0
    for item in divided:
        assert item["sums_row"] == next_row
        assert item["num_parts"] > 1 and item["key_end"] - item["key_start"] <= PART_KEYS
        next_row += -(-item["num_tokens"] * item["num_heads"] // 16) * 16
    assert next_row == step.sums_rows
    parts = divided["key_start"] // PART_KEYS
    assert (parts[1:][parts[1:] > 0] == parts[:-1][parts[1:] > 0] + 1).all()


def test_a_part_is_whole_tiles() -> None:
    assert PART_KEYS % TILE_KEYS == 0


def test_a_context_is_divided_where_threads_would_idle() -> None:
    long, others = (1, 3 * PART_KEYS + 1), [(1, 40)] * 200
    assert len(cut([long], [3], 2).items) == 4
    assert len(cut([long, *others], [3], 2).items) == 201


def test_a_context_of_one_part_is_not_divided() -> None:
    assert cut([(1, PART_KEYS)], [1], 8).sums_rows == 0


@pytest.mark.parametrize(("threads", "parallel_cost"), [(1, 0), (8, 10**12)])
def test_one_thread_divides_nothing(threads: int, parallel_cost: int) -> None:
    step = cut([(1, 10 * PART_KEYS)], [1], threads, parallel_cost)
    assert len(step.items) == 1 and step.sums_rows == 0
    assert step.items["num_parts"] == [10]


def test_the_costliest_items_come_first() -> None:
    costs = cut([(1, 40), (300, 300), (1, 900), (7, 20)], [3, 3], 2).items["cost"]
    assert (costs[:-1] >= costs[1:]).all()
