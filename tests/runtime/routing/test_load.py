"""What a request would cost: the choice is the least of all costs, worked out one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.runtime.routing.load import MAX_WORK_WEIGHT, MIN_WORK_WEIGHT, LoadReport, Loads
from tests.effort import examples

TOKENS = 64

# Seconds are powers of two, so that sums are exact and equals are equal.
replicas = st.lists(
    st.tuples(
        st.integers(0, 200),  # tokens that wait
        st.integers(0, 3),  # requests that run
        st.sampled_from([0.25, 0.5, 1.0]),  # seconds a token
        st.sampled_from([0, 0, 16, 32, 48, 63]),  # tokens cached
        st.booleans(),  # drains
    ),
    max_size=6,
)


@examples(300)
@given(replicas, st.integers(0, 2**64 - 1))
def test_the_least_cost_is_chosen_and_of_equals_the_least_load(
    drawn: list[tuple[int, int, float, int, bool]], seed: int
) -> None:
    loads, groups = Loads(), dict[int, int]()
    for slot, (queued, running, token_s, cached, _) in enumerate(drawn):
        loads.open(slot, str(slot))
        loads.add(slot, queued, running)
        loads.learn(slot, LoadReport(0, 0, 0, token_s, 2.0))
        if cached:
            groups[cached] = groups.get(cached, 0) | 1 << slot
    for slot, (*_, drains) in enumerate(drawn):
        if drains:
            loads.close(slot)
    left = [slot for slot, (*_, drains) in enumerate(drawn) if not drains]
    busy = sum(drawn[slot][0] > 0 for slot in left)
    weight = MAX_WORK_WEIGHT
    if busy < len(left):
        weight = min(max(MIN_WORK_WEIGHT, busy / (len(left) - busy)), MAX_WORK_WEIGHT)

    def cost(slot: int) -> tuple[float, int]:
        queued, running, token_s, cached, _ = drawn[slot]
        own = TOKENS - cached
        return (queued + own + weight * own) * token_s + 2.0 * running, queued + running

    best = loads.best(TOKENS, sorted(groups.items()), seed)
    if not left:
        assert best is None
    else:
        assert best in left and cost(best) == min(map(cost, left))


def test_what_a_replica_never_told_is_the_others_mean() -> None:
    loads = Loads()
    for slot in range(3):
        loads.open(slot, str(slot))
    assert loads.wait_s(2, 10) == 10.0
    loads.learn(0, LoadReport(0, 0, 0, 0.25))
    loads.learn(1, LoadReport(0, 0, 0, 0.75))
    assert [loads.wait_s(slot, 10) for slot in range(3)] == [2.5, 7.5, 5.0]
    loads.close(0)
    assert loads.wait_s(2, 10) == 7.5


def test_reports_go_into_running_means() -> None:
    loads = Loads()
    loads.open(0, "0")
    for token_s in (1.0, 2.0):
        loads.learn(0, LoadReport(0, 0, 0, token_s))
    assert loads.wait_s(0, 1) == pytest.approx(1.3)


def test_more_slots_keep_what_is_known_of_the_others() -> None:
    loads = Loads()
    for slot in range(100):
        loads.open(slot, str(slot))
        loads.add(slot, queued_tokens=slot + 1, running=slot)
    assert [loads.of(slot) for slot in range(100)] == [(slot + 1, slot) for slot in range(100)]
    assert loads.best(1, [], 0) == 0
