"""What a step's kernels find in its array."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise.workers.cuda.attention_plan import FIELDS, cut_step, max_slots
from headwise.workers.cuda.buckets import bucket_of
from headwise.workers.cuda.step_pack import most_items, pack_attention, pack_step, token_places
from headwise.workers.model.attention import AttentionBatch
from headwise.workers.model.model import StepInput
from tests.effort import examples

rows = st.tuples(st.integers(1, 40), st.sampled_from([0, 15, 16, 600, 3000]))


def step(rows: list[tuple[int, int]], bucket: int = 0) -> StepInput:
    """Of rows of (tokens of the step, tokens before them), with numbers that tell every place."""
    starts = np.cumsum([0, *(queries for queries, _ in rows)], dtype=np.int32)
    contexts = np.array([sum(row) for row in rows], np.int32)
    tables = np.arange(len(rows) * -(-contexts.max() // 16), dtype=np.int32).reshape(len(rows), -1) + 1000
    tokens = np.arange(starts[-1])
    logit_tokens = starts[1:].astype(np.int64) - 1
    batch = AttentionBatch(starts, contexts, tables)
    return StepInput(torch.empty(0), tokens + 1, tokens + 100, tokens + 10_000, logit_tokens, batch, bucket)


def packed(step: StepInput) -> np.ndarray:
    pack = pack_step(step, *cut_step(step.attention, 4, 64))
    array = np.full(pack.size, -7, np.int32)
    pack.write(array)
    return array


def assert_attention(array: np.ndarray, batch: AttentionBatch) -> None:
    small, large = cut_step(batch, 4, 64)
    for header, items in ((array[0:2], small), (array[2:4], large)):
        count, at = header
        assert np.array_equal(array[at : at + count * len(FIELDS)].reshape(count, len(FIELDS)), items.items_I8)
    at, width = array[4], array[5]
    tables = array[at : at + batch.block_tables_BN.size].reshape(-1, width)
    assert np.array_equal(tables, batch.block_tables_BN)


@examples(100)
@given(rows=st.lists(rows, min_size=1, max_size=6))
def test_everything_of_a_step_is_where_it_is_looked_for(rows: list[tuple[int, int]]) -> None:
    one = step(rows)
    array, places = packed(one), token_places(len(one.rows_T), len(rows))
    found = (array[place] for place in places[:4])
    for got, expected in zip(found, (one.rows_T, one.positions_T, one.slots_T, one.logit_tokens_B), strict=True):
        assert np.array_equal(got, expected)
    assert all(place.start % 4 == 0 for place in places[:4]) and places.end % 4 == 0
    assert_attention(array, one.attention)


@examples(100)
@given(contexts=st.lists(st.sampled_from([0, 15, 16, 600, 3000]), min_size=1, max_size=20), more=st.integers(0, 2))
def test_padded_tokens_go_nowhere(contexts: list[int], more: int) -> None:
    bucket = bucket_of(len(contexts)) * 2**more
    one = step([(1, context) for context in contexts], bucket)
    array, places, num_rows = packed(one), token_places(bucket, bucket), len(contexts)
    assert np.array_equal(array[places.slots][:num_rows], one.slots_T)
    assert (array[places.slots][num_rows:] == -1).all()
    assert not array[places.rows][num_rows:].any() and not array[places.positions][num_rows:].any()
    assert np.array_equal(array[places.logit_tokens][:num_rows], one.logit_tokens_B)
    assert_attention(array, one.attention)


@examples(100)
@given(contexts=st.lists(st.integers(0, 5000), min_size=1, max_size=20))
def test_a_graph_has_room_for_every_step_of_its_bucket(contexts: list[int]) -> None:
    bucket, slots = bucket_of(len(contexts)), max_slots(bucket_of(len(contexts)), 5001)
    one = step([(1, context) for context in contexts], bucket)
    blocks = -(-5001 // 16)
    assert len(packed(one)) <= token_places(bucket, bucket).end + bucket * blocks + 4 + most_items(bucket + slots)


def test_what_attention_alone_needs_begins_after_the_header() -> None:
    batch = step([(1, 700), (30, 5)]).attention
    pack = pack_attention(batch, *cut_step(batch, 4, 64))
    array = np.zeros(pack.size, np.int32)
    pack.write(array)
    assert array[4] == 8
    assert_attention(array, batch)
