"""How steps are cut: every query meets every key that it may see, once, and rows do not depend on each other."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from headwise.workers.cuda.attention_plan import FIELDS, PART_KEYS, Items, cut_step, max_slots
from headwise.workers.cuda.tiling import SMALL_ROWS
from headwise.workers.model.attention import AttentionBatch
from tests.effort import examples

rows = st.tuples(st.integers(1, 300) | st.just(1), st.integers(0, 5000) | st.sampled_from([0, PART_KEYS, 40_000]))


def batch(rows: list[tuple[int, int]]) -> AttentionBatch:
    """Of rows of (tokens of the step, tokens before them)."""
    starts = np.cumsum([0, *(queries for queries, _ in rows)], dtype=np.int32)
    return AttentionBatch(starts, np.array([sum(row) for row in rows], np.int32), np.zeros((len(rows), 1), np.int32))


def cut(rows: list[tuple[int, int]], group: int, large_rows: int = 64) -> list[tuple[int, Items]]:
    """With the tokens that a tile has room for."""
    items = cut_step(batch(rows), group, large_rows)
    return [(SMALL_ROWS // group, items[0]), (large_rows // group, items[1])]


@examples(200)
@given(rows=st.lists(rows, min_size=1, max_size=6), group=st.sampled_from([1, 3, 4, 8, 16, 20, 64]))
def test_every_query_meets_its_keys_once(rows: list[tuple[int, int]], group: int) -> None:
    starts = batch(rows).query_starts_B1
    seen: dict[tuple[int, int], NDArray[np.int64]] = {}  # by row and token of the step
    for room, items in cut(rows, group):
        slots = []
        for item in (dict(zip(FIELDS, fields, strict=True)) for fields in items.items_I8.tolist()):
            queries, before = rows[item["row"]]
            assert 1 <= item["num_tokens"] <= room
            assert item["first_token"] - starts[item["row"]] + before == item["first_position"]
            assert item["key_start"] % 128 == 0 and item["key_start"] < item["key_end"]
            assert (item["slot"] >= 0) == (item["num_parts"] > 1)
            slots += [item["slot"]] if item["slot"] >= 0 else []
            for token in range(item["first_token"], item["first_token"] + item["num_tokens"]):
                keys = seen.setdefault((item["row"], token), np.zeros(queries + before, np.int64))
                keys[item["key_start"] : item["key_end"]] += 1
        assert sorted(slots) == list(range(items.num_slots))
    assert len(seen) == sum(queries for queries, _ in rows)
    for (row, token), keys in seen.items():
        position = rows[row][1] + token - starts[row]
        assert (keys[: position + 1] == 1).all() and keys.max() == 1


@examples(100)
@given(rows=st.lists(rows, min_size=1, max_size=6), group=st.sampled_from([1, 3, 8]))
def test_a_row_is_cut_as_if_it_were_alone(rows: list[tuple[int, int]], group: int) -> None:
    def shape(items: Items, row: int, first_token: int) -> list[tuple[int, ...]]:
        chosen = items.items_I8[items.items_I8[:, 0] == row].astype(int)
        chosen[:, 1] -= first_token
        return sorted((*fields[1:6], fields[7], fields[6] >= 0) for fields in chosen.tolist())

    starts = batch(rows).query_starts_B1
    for row, alone in enumerate(rows):
        for (_, items), (_, of_one) in zip(cut(rows, group), cut([alone], group), strict=True):
            assert shape(items, row, starts[row]) == shape(of_one, 0, 0)


@examples(100)
@given(contexts=st.lists(st.integers(1, 140_000), min_size=1, max_size=8))
def test_decodes_never_need_more_slots_than_said(contexts: list[int]) -> None:
    small, large = cut_step(batch([(1, context - 1) for context in contexts]), 4, 64)
    assert small.num_slots <= max_slots(len(contexts), max(contexts)) and not len(large.items_I8)


def test_the_parts_of_a_slot_follow_each_other() -> None:
    (_, small), _ = cut([(1, 3 * PART_KEYS)], 4)
    items = small.items_I8[np.argsort(small.items_I8[:, 4])]
    assert items[:, 4].tolist() == [n * PART_KEYS for n in range(4)] and items[:, 6].tolist() == [0, 1, 2, 3]


def test_long_prompts_have_sums_within_bounds() -> None:
    """8,192 tokens after 24,576 others: sums of all parts of all tiles would take gigabytes."""
    (_, small), (_, large) = cut([(8192, 24_576)], 4)
    assert not len(small.items_I8) and large.num_slots == 0
