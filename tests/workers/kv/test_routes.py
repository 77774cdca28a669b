"""Every KV head that a rank holds comes to it from one rank, whatever the sizes of the two groups."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.handoff import Range
from headwise.workers.kv.routes import Route, head_routes
from headwise.workers.model.partition import partition_heads
from tests.effort import examples

HEADS = [(q, kv) for q in range(1, 33) for kv in range(1, q + 1) if q % kv == 0]


def kv_ranges(q: int, kv: int, tp: int) -> list[Range]:
    return [(shard.kv_start, shard.kv_stop) for shard in partition_heads(q, kv, min(tp, q))]


@examples(200)
@given(heads=st.sampled_from(HEADS), tps=st.tuples(st.integers(1, 8), st.integers(1, 8)))
def test_every_head_a_rank_holds_comes_from_one_rank_that_has_it(heads: tuple[int, int], tps: tuple[int, int]) -> None:
    check_routes(*(kv_ranges(*heads, tp) for tp in tps))


RANGES = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)).map(lambda x: (min(x), max(x))), max_size=8)


@examples(200)
@given(RANGES, RANGES)
def test_routes_of_any_ranges_cover_each_head_once_or_are_refused(source: list[Range], target: list[Range]) -> None:
    held = {head for start, stop in source for head in range(start, stop)}
    if {head for start, stop in target for head in range(start, stop)} <= held:
        check_routes(source, target)
    else:
        with pytest.raises(InvalidValueError, match=r"^source=.*no rank holds KV head"):
            head_routes(source, target)


def check_routes(source: list[Range], target: list[Range]) -> None:
    routes = head_routes(source, target)
    assert routes == head_routes(list(source), list(target))
    arrived = [(route.destination, head) for route in routes for head in range(route.start, route.stop)]
    assert arrived == [(rank, head) for rank, held in enumerate(target) for head in range(*held)]
    for route in routes:
        start, stop = source[route.source]
        assert start <= route.start < route.stop <= stop


def test_heads_held_twice_are_sent_by_turns() -> None:
    one, four = kv_ranges(8, 2, 1), kv_ranges(8, 2, 4)
    assert head_routes(one, four) == [Route(0, rank, rank // 2, rank // 2 + 1) for rank in range(4)]
    assert head_routes(four, four) == [Route(rank, rank, rank // 2, rank // 2 + 1) for rank in range(4)]
    assert head_routes(four, one) == [Route(0, 0, 0, 1), Route(2, 0, 1, 2)]
    assert head_routes(kv_ranges(9, 3, 3), kv_ranges(9, 3, 2)) == [
        Route(0, 0, 0, 1),
        Route(1, 0, 1, 2),
        Route(2, 1, 2, 3),
    ]
