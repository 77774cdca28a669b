"""How a step is cut: which parts a query row's context has does not depend on what is computed with it."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.workers.cpu import attention_plan
from headwise.workers.cpu.attention_plan import (
    NO_WINDOW,
    TILE_KEYS,
    Groups,
    Sizes,
    StepItems,
    cut_step,
    rows_of_item,
)
from headwise.workers.kv.policy import DENSE, Reach
from headwise.workers.model.attention import PART_KEYS, AttentionBatch
from tests.effort import examples

BLOCK = 16


def cut(
    rows: list[tuple[int, int]],
    groups: list[int],
    threads: int,
    parallel_cost: int = 0,
    reaches: tuple[Reach, ...] = (DENSE,),
    kinds: list[list[int]] | None = None,
) -> StepItems:
    """Cuts a step of (queries, context) rows.

    Args:
        groups: how many query heads each KV head has.
        kinds: the group of each KV head, for each kind of layer; None is one kind, all of the first group.
    """
    queries, contexts = zip(*rows, strict=True)
    blocks = -(-max(contexts) // BLOCK)
    q_starts = np.cumsum([0, *groups])
    sizes = Sizes(len(groups), BLOCK, 64, rows_of_item(q_starts))
    starts = np.cumsum([0, *queries], dtype=np.int32)
    tables = np.tile(np.arange(blocks, dtype=np.int32), (len(rows) * len(reaches), 1))
    windows = [NO_WINDOW if reach.window is None else reach.window for reach in reaches]
    shape = ([blocks] * len(reaches), [reach.sinks for reach in reaches], windows, kinds or [[0] * len(groups)])
    with mock.patch.object(attention_plan, "_PARALLEL_COST", parallel_cost):
        batch = AttentionBatch(starts, np.array(contexts, np.int32), tables)
        return cut_step(batch, sizes, Groups(*(np.array(x, np.int64) for x in shape)), q_starts, threads)


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


@examples(100)
@given(
    rows=steps(),
    sinks=st.sampled_from([0, 0, 4, 300]),
    window=st.sampled_from([1, 40, 256]) | st.integers(1, 700),
    threads=st.integers(1, 4),
)
def test_a_window_has_the_parts_that_its_queries_see(
    rows: list[tuple[int, int]], sinks: int, window: int, threads: int
) -> None:
    reach = Reach(sinks, window)
    step = cut(rows, [3], threads, reaches=(reach,))
    seen: dict[int, list[tuple[int, int]]] = {}
    for item in step.items:
        first, last = (int(item["first_position"]) + n for n in (0, item["num_tokens"] - 1))
        apart = first >= sinks + window
        assert first // PART_KEYS == last // PART_KEYS and apart == (last >= sinks + window)
        assert item["window"] == (window if apart else NO_WINDOW)
        stretches = [(0, int(item["sinks"]))] if item["sinks"] else []
        if item["key_start"] < item["key_end"]:
            stretches.append((int(item["key_start"]), int(item["key_end"])))
        for token in range(item["num_tokens"]):
            seen.setdefault(int(item["first_token"]) + token, []).extend(stretches)
    positions = [context - queries + i for queries, context in rows for i in range(queries)]
    assert sorted(seen) == list(range(len(positions)))
    for token, stretches in seen.items():
        keys = {key for first, end in stretches for key in range(first, end)}
        assert len(keys) == sum(end - first for first, end in stretches)
        first = reach.first_key(positions[token])
        assert set(range(first, positions[token] + 1)) <= keys
        assert keys & set(range(sinks)) == set(range(min(sinks, max(keys) + 1)))


def test_kinds_of_layers_have_items_of_their_own() -> None:
    reaches = (DENSE, Reach(0, 100))
    step = cut([(1, 1000), (1, 50)], [3, 3], 1, reaches=reaches, kinds=[[0, 0], [0, 1], [1, 1]])
    assert step.starts_X1.tolist() == [0, 4, 8, 12]
    assert step.items["table"].tolist() == [0, 0, 1, 1, 0, 2, 1, 3, 2, 2, 3, 3]
    longest = step.items[step.items["first_position"] == 999]
    assert (longest["key_end"] - longest["key_start"]).tolist() == [1000, 1000, 1000, 100, 100, 100]
