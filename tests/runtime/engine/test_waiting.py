"""Whose turn it is: tenants one after the other, the requests of each in the order they came."""

from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from headwise.runtime.engine.request import Request
from headwise.runtime.engine.waiting import Waiting, share
from headwise.runtime.sampling_params import SamplingParams
from headwise.workers.plan import RowSampling
from tests.effort import examples

TENANTS = st.sampled_from("abcd")


def request(name: str, tenant: str = "") -> Request:
    return Request(name, [1], SamplingParams(), RowSampling(), 1, tenant=tenant)


def names(waiting: Waiting) -> list[str]:
    """All that wait, in the order of their turns; none waits any more then."""
    taken = []
    while waiting.head is not None:
        taken.append(waiting.take().request_id)
    return taken


def filled(*requests: str) -> Waiting:
    """Whose names start with their tenant's."""
    waiting = Waiting()
    for name in requests:
        waiting.add(request(name, name[0]))
    return waiting


def test_tenants_take_turns_and_each_sends_its_oldest() -> None:
    assert names(filled("a1", "a2", "a3", "b1", "c1", "b2")) == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_a_tenant_that_comes_later_does_not_wait_for_all_who_came_before() -> None:
    waiting = filled(*(f"a{i}" for i in range(100)))
    assert waiting.take().request_id == "a0"
    waiting.add(request("b0", "b"))
    assert [waiting.take().request_id for _ in range(3)] == ["a1", "b0", "a2"]


def test_who_was_preempted_goes_first_and_costs_its_tenant_no_turn() -> None:
    waiting = filled("a1", "b1", "b2")
    for name in ("b8", "a9"):
        waiting.add_preempted(request(name, name[0]))
    assert names(waiting) == ["a9", "b8", "a1", "b1", "b2"]


def test_who_is_skipped_keeps_place_and_turn() -> None:
    waiting = filled("a1", "a2", "b1", "b2")
    waiting.add_preempted(request("b9", "b"))
    waiting.skip()  # b9
    waiting.skip()  # a1
    assert waiting.take().request_id == "a2"
    waiting.skip()  # b1
    waiting.skip()  # b2
    assert waiting.head is None and len(waiting) == 4
    waiting.rewind()
    assert names(waiting) == ["b9", "b1", "a1", "b2"]


def test_a_tenant_that_is_passed_over_keeps_its_turn() -> None:
    waiting = filled("a1", "a2", "a3", "b1", "b2")
    waiting.skip()
    waiting.pass_over()
    assert waiting.take().request_id == "b1"
    waiting.rewind()
    assert names(waiting) == ["a1", "b2", "a2", "a3"]


def test_who_is_removed_is_gone_wherever_it_stood() -> None:
    waiting, gone = filled("a1", "b1"), [request("a2", "a"), request("c1", "c"), request("b9", "b")]
    waiting.add(gone[0])
    waiting.add(gone[1])
    waiting.add_preempted(gone[2])
    for one in gone:
        waiting.remove(one)
    assert len(waiting) == 2 and waiting.num_of("c") == 0 and names(waiting) == ["a1", "b1"]


@examples(200)
@given(data=st.data())
def test_one_tenant_alone_has_the_order_of_a_plain_queue(data: st.DataObject) -> None:
    """Of a deque: new requests at its end, preempted ones at its front, skipped ones back where they were."""
    waiting, queue, number = Waiting(), deque[Request](), 0
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(("add", "add", "preempt", "remove", "pass")))
        if action in ("add", "preempt"):
            one, number = request(str(number)), number + 1
            (waiting.add if action == "add" else waiting.add_preempted)(one)
            (queue.append if action == "add" else queue.appendleft)(one)
        elif action == "remove" and queue:
            one = data.draw(st.sampled_from(list(queue)))
            waiting.remove(one)
            queue.remove(one)
        elif action == "pass":
            later: list[Request] = []
            for skips in data.draw(st.lists(st.booleans(), max_size=len(queue))):
                assert waiting.head is queue[0]
                if skips:
                    waiting.skip()
                    later.append(queue.popleft())
                else:
                    assert waiting.take() is queue.popleft()
            waiting.rewind()
            queue.extendleft(reversed(later))
        assert len(waiting) == len(queue) and waiting.head is (queue[0] if queue else None)
    assert names(waiting) == [one.request_id for one in queue]


@examples(200)
@given(data=st.data())
def test_everybody_is_served_within_a_round(data: st.DataObject) -> None:
    """Between two turns of a tenant, every other that waited all the time and was not skipped had one. And of each
    tenant the oldest that was not skipped goes first."""
    waiting, lines, number = Waiting(), {tenant: list[Request]() for tenant in "abcd"}, 0
    served_since = {tenant: set[str]() for tenant in "abcd"}  # whose turn came since this tenant waits, or its turn
    for _ in range(data.draw(st.integers(1, 30))):
        for tenant in data.draw(st.lists(TENANTS, max_size=6)):
            one, number = request(str(number), tenant), number + 1
            if not lines[tenant]:
                served_since[tenant] = set()
            lines[tenant].append(one)
            waiting.add(one)
        skipped: dict[str, list[Request]] = {tenant: [] for tenant in "abcd"}
        for _ in range(data.draw(st.integers(0, 6))):
            head = waiting.head
            if head is None:
                break
            line = lines[head.tenant]
            assert head is line[len(skipped[head.tenant])], "not the oldest of its tenant"
            if data.draw(st.integers(0, 3)) == 0:
                skipped[head.tenant].append(head)
                waiting.skip()
                continue
            waiting.take()
            line.remove(head)
            for tenant in "abcd":
                if tenant != head.tenant and len(lines[tenant]) > len(skipped[tenant]):
                    assert head.tenant not in served_since[tenant] or skipped[tenant], f"{tenant} was left out"
                    served_since[tenant].add(head.tenant)
            served_since[head.tenant] = set()
        waiting.rewind()
        for tenant in "abcd":
            if skipped[tenant]:
                served_since[tenant] = set()
    assert sorted(names(waiting)) == sorted(one.request_id for line in lines.values() for one in line)


@examples(100)
@given(limit=st.integers(1, 2000), tenants=st.integers(1, 50))
def test_shares_leave_room_for_the_next_tenant(limit: int, tenants: int) -> None:
    held = [0] * tenants
    growing = True
    while growing and sum(held) < limit:
        growing = False
        for index in range(tenants):
            if sum(held) < limit and held[index] < share(limit, sum(held) - held[index]):
                held[index] += 1
                growing = True
    assert max(held) - min(held) <= 1 or limit < 2 * tenants
    assert sum(held) < limit or limit <= 2 * tenants
