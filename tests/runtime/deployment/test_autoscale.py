"""How many replicas the load asks for."""

from __future__ import annotations

import dataclasses
import itertools

from hypothesis import given
from hypothesis import strategies as st

from headwise.cluster.supervisor import MAX_BACKOFF_S, MAX_FAILURES
from headwise.runtime.deployment.autoscale import DOWN_S, UP_KV_USE, UP_LOOKS, UP_WAIT_S, Autoscaler, Look
from headwise.runtime.deployment.deployment import DEMAND_S
from tests.effort import examples
from tests.runtime.deployment.script import Script

CALM = Look(now=0.0, wanted=2, serving=2, wait_s=0.0, kv_use=0.1, requests=1, rows=8, demand=10.0)


def looks(scaler: Autoscaler, look: Look, count: int) -> list[int]:
    """What it wants at each of so many looks, a second apart, that see the same but what it wanted itself."""
    found = []
    for second in range(count):
        wanted = scaler.wanted(dataclasses.replace(look, now=look.now + second))
        found.append(wanted)
        look = dataclasses.replace(look, wanted=wanted, serving=wanted)
    return found


def test_one_more_when_requests_wait_for_long() -> None:
    busy = dataclasses.replace(CALM, wait_s=UP_WAIT_S + 0.1)
    assert looks(Autoscaler(1, 4), busy, UP_LOOKS) == [2] * (UP_LOOKS - 1) + [3]


def test_one_more_when_memory_is_full() -> None:
    full = dataclasses.replace(CALM, kv_use=UP_KV_USE + 0.01)
    assert looks(Autoscaler(1, 4), full, UP_LOOKS)[-1] == 3


def test_a_moment_says_nothing() -> None:
    scaler, busy = Autoscaler(1, 4), dataclasses.replace(CALM, wait_s=UP_WAIT_S + 1)
    for _ in range(10):
        assert looks(scaler, busy, UP_LOOKS - 1)[-1] == 2
        assert looks(scaler, CALM, 1) == [2]


def test_nothing_is_said_while_what_is_asked_for_is_not_there() -> None:
    busy = dataclasses.replace(CALM, wait_s=UP_WAIT_S + 1, serving=1)
    scaler = Autoscaler(1, 4)
    assert {scaler.wanted(busy) for _ in range(100)} == {2}


def test_what_cannot_be_had_is_not_wanted_for_ever() -> None:
    scaler, missing = Autoscaler(1, 4), dataclasses.replace(CALM, wanted=3, serving=2)
    found = [scaler.wanted(dataclasses.replace(missing, now=second)) for second in range(int(DOWN_S) + 1)]
    assert found == [3] * int(DOWN_S) + [2]
    nobody = dataclasses.replace(CALM, serving=0, requests=0)
    assert {scaler.wanted(dataclasses.replace(nobody, now=1000.0 + second)) for second in range(200)} == {2}


def test_one_less_when_the_rest_would_do_for_a_while() -> None:
    assert looks(Autoscaler(1, 4), CALM, int(DOWN_S) + 1) == [2] * int(DOWN_S) + [1]
    assert looks(Autoscaler(2, 4), CALM, 500)[-1] == 2, "no less than asked for"


def test_no_less_where_the_rest_would_not_do() -> None:
    for load in ({"requests": 7}, {"kv_use": 0.4}, {"wait_s": 1.0}):
        assert looks(Autoscaler(1, 4), dataclasses.replace(CALM, **load), 500)[-1] == 2, load


def test_limits_hold_from_the_start() -> None:
    assert Autoscaler(3, 4).wanted(CALM) == 3
    assert Autoscaler(1, 1).wanted(CALM) == 1


def settles(capacity: float, demand: float, first: int, most: int) -> list[int]:
    """The numbers over an hour, where each replica does ``capacity`` tokens a second. Requests wait where that is too
    little, and do not where it is enough."""
    scaler, wanted, found = Autoscaler(1, most), first, []
    for second in range(3600):
        use = demand / (capacity * wanted)
        wait_s, done = 0.0 if use < 1 else 10.0, min(demand, capacity * wanted)
        look = Look(second, wanted, wanted, wait_s, min(1.0, use / 4), 1, 8, done)
        wanted = scaler.wanted(look)
        assert 1 <= wanted <= most
        found.append(wanted)
    return found


@examples(100)
@given(capacity=st.floats(10, 1000), demand=st.floats(0, 10000), first=st.integers(1, 8), most=st.integers(1, 8))
def test_under_a_load_that_stays_the_number_settles(capacity: float, demand: float, first: int, most: int) -> None:
    found = settles(capacity, demand, min(first, most), most)
    assert len(set(found[1800:])) == 1, "no more changes in the second half hour"
    changes = sum(before != after for before, after in itertools.pairwise(found))
    assert changes <= 3 * most


@examples(100)
@given(
    st.lists(
        st.tuples(st.floats(0, 60), st.floats(0, 1), st.integers(0, 1000), st.floats(0, 1e6), st.integers(0, 9)),
        max_size=300,
    ),
    st.integers(1, 4),
    st.integers(4, 8),
)
def test_it_stays_between_its_limits(seen: list[tuple[float, float, int, float, int]], least: int, most: int) -> None:
    scaler, wanted = Autoscaler(least, most), least
    for second, (wait_s, kv_use, requests, demand, missing) in enumerate(seen):
        look = Look(second, wanted, max(0, wanted - missing), wait_s, kv_use, requests, 8, demand)
        after = scaler.wanted(look)
        assert least <= after <= most and abs(after - wanted) <= 1
        wanted = after


def test_a_deployment_follows_it_and_asks_for_nodes() -> None:
    script = Script(1, least=1, most=3, autoscale=True)
    script.start_all()
    for number in range(4):
        script.add(f"r{number}")
    script.wait(UP_WAIT_S + UP_LOOKS + 2)
    assert script.deployment.status()["wanted"] == 2 and script.asked == [1, 2]
    script.start_all()
    script.step()
    for number in range(4):
        script.deployment.abort(f"r{number}")
    script.wait(DOWN_S + DEMAND_S)
    script.close_all()
    assert script.deployment.status()["wanted"] == 1 and script.asked == [1, 2, 1]
    assert [*script.states().values()] == ["serving"]


def test_a_long_prompt_alone_needs_no_second_replica() -> None:
    script = Script.serving(1, least=1, most=3, autoscale=True)
    script.add("long", prompt=range(10_000))
    for _ in range(int(UP_WAIT_S) + 3 * UP_LOOKS):
        script.report("replica-1", token_s=0.01, queued_tokens=5000, running=1)
        script.wait(1, reports=False)
    assert script.deployment.status()["wanted"] == 1, "each replica would take as long"
    script.add("behind it")
    for _ in range(int(UP_WAIT_S) + UP_LOOKS + 1):
        script.report("replica-1", token_s=0.01, queued_tokens=5000, running=1)
        script.wait(1, reports=False)
    assert script.deployment.status()["wanted"] == 2


def test_where_no_replica_can_be_started_no_nodes_are_kept_for_it() -> None:
    script = Script.serving(1, least=1, most=3, autoscale=True)
    for number in range(4):
        script.add(f"r{number}")
    script.wait(UP_WAIT_S + UP_LOOKS + 2)
    assert script.asked == [1, 2]
    for _ in range(MAX_FAILURES):  # the requests still wait
        script.wait(MAX_BACKOFF_S + 0.25)
        [name] = script.names
        script.fail_start(name, no_room=True)
    assert script.asked == [1, 2]
    script.wait(2)
    assert script.deployment.status()["wanted"] == 1 and script.asked == [1, 2, 1]
    script.wait(UP_LOOKS + 1)
    assert script.asked == [1, 2, 1, 2] and len(script.names) == 1, "maybe there is room by now"
