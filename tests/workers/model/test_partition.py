"""Every split covers each head, column and row once, and columns and rows come out even."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.workers.errors import InvalidValueError
from headwise.workers.model.model_config import ModelConfig
from headwise.workers.model.partition import (
    HeadShard,
    partition_heads,
    partition_model,
    split_evenly,
)

HEADS = [(q, kv) for q in range(1, 33) for kv in range(1, q + 1) if q % kv == 0]


def config(**changes: object) -> ModelConfig:
    values: dict[str, object] = {
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 8,
        "intermediate_size": 96,
        "vocab_size": 101,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
    }
    return ModelConfig(**{**values, **changes})  # type: ignore[arg-type]


def assert_adjacent(ranges: list[tuple[int, int]], total: int) -> None:
    assert ranges[0][0] == 0
    assert ranges[-1][1] == total
    assert all(a[1] == b[0] for a, b in pairwise(ranges))
    assert all(start <= stop for start, stop in ranges)


def assert_even(ranges: list[tuple[int, int]]) -> None:
    sizes = [stop - start for start, stop in ranges]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("num_q", range(1, 33))
def test_heads_of_every_small_model(num_q: int) -> None:
    for q, kv in HEADS:
        if q != num_q:
            continue
        group = q // kv
        for tp in range(1, q + 1):
            shards = partition_heads(q, kv, tp)
            assert len(shards) == tp
            assert_adjacent([(s.q_start, s.q_stop) for s in shards], q)
            for shard in shards:
                used = {head // group for head in range(shard.q_start, shard.q_stop)}
                assert used == set(range(shard.kv_start, shard.kv_stop))
            counts = [s.num_q for s in shards]
            assert min(counts) >= 1
            assert counts == sorted(counts, reverse=True)
            if tp <= kv:
                assert_adjacent([(s.kv_start, s.kv_stop) for s in shards], kv)
                assert max(counts) - min(counts) in (0, group)
            else:
                assert max(counts) - min(counts) <= 1


def test_local_groups_point_at_the_right_kv_head() -> None:
    for q, kv in HEADS:
        for tp in range(1, q + 1):
            for shard in partition_heads(q, kv, tp):
                starts = shard.q_starts
                assert len(starts) == shard.num_kv + 1
                assert starts[0] == 0
                assert starts[-1] == shard.num_q
                for local_kv, (start, stop) in enumerate(pairwise(starts)):
                    assert start < stop
                    for local_q in range(start, stop):
                        assert (shard.q_start + local_q) // (q // kv) == shard.kv_start + local_kv


def test_nine_query_heads_on_two_ranks() -> None:
    assert partition_heads(9, 3, 2) == [HeadShard(0, 6, 0, 2, 3), HeadShard(6, 9, 2, 3, 3)]


def test_a_rank_may_hold_parts_of_two_groups() -> None:
    shard = partition_heads(9, 3, 4)[2]
    assert (shard.q_start, shard.q_stop, shard.kv_start, shard.kv_stop) == (5, 7, 1, 3)
    assert shard.q_starts == (0, 1, 2)


@pytest.mark.parametrize("tp", [0, -1, 9])
def test_impossible_sizes_are_refused_with_the_numbers(tp: int) -> None:
    with pytest.raises(InvalidValueError, match=rf"tensor_parallel_size={tp}: must be from 1 to 8"):
        partition_heads(8, 4, tp)
    with pytest.raises(InvalidValueError, match="tensor_parallel_size"):
        partition_model(config(), tp)


@pytest.mark.parametrize(("num_q", "num_kv"), [(8, 3), (8, 0), (2, 4)])
def test_kv_heads_that_do_not_divide_are_refused(num_q: int, num_kv: int) -> None:
    with pytest.raises(InvalidValueError, match=rf"num_key_value_heads={num_kv}: must divide the {num_q}"):
        partition_heads(num_q, num_kv, 1)


@given(total=st.integers(0, 10_000), parts=st.integers(1, 64))
def test_split_evenly(total: int, parts: int) -> None:
    ranges = split_evenly(total, parts)
    assert len(ranges) == parts
    assert_adjacent(ranges, total)
    sizes = [stop - start for start, stop in ranges]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


@settings(deadline=None)
@given(
    heads=st.sampled_from(HEADS),
    tp=st.integers(1, 32),
    hidden=st.integers(1, 64),
    head_dim=st.sampled_from([2, 8, 64]),
    intermediate=st.integers(1, 300),
    vocab=st.integers(1, 500),
    layers=st.integers(1, 4),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_any_model_is_covered_and_even(
    heads: tuple[int, int],
    tp: int,
    hidden: int,
    head_dim: int,
    intermediate: int,
    vocab: int,
    layers: int,
    flags: tuple[bool, bool, bool],
) -> None:
    model = config(
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        intermediate_size=intermediate,
        vocab_size=vocab,
        tie_word_embeddings=flags[0],
        attention_bias=flags[1],
        mlp_bias=flags[2],
    )
    parts = partition_model(model, min(tp, heads[0]))
    assert [part.rank for part in parts] == list(range(len(parts)))
    assert all(part.world_size == len(parts) for part in parts)
    assert [part.heads for part in parts] == partition_heads(heads[0], heads[1], len(parts))
    assert_adjacent([part.mlp for part in parts], intermediate)
    assert_adjacent([part.vocab for part in parts], vocab)
    assert_even([part.mlp for part in parts])
    assert_even([part.vocab for part in parts])


def test_the_demo_model_on_two_ranks() -> None:
    smollm2 = config(
        hidden_size=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        intermediate_size=1536,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    first, second = partition_model(smollm2, 2)
    assert (first.mlp, second.mlp) == ((0, 768), (768, 1536))
    assert (first.vocab, second.vocab) == ((0, 24576), (24576, 49152))
