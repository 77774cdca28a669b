"""Decode graphs: when each is captured, and which steps use one."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.cluster.group import ShardGroupDied
from headwise.runtime.engine.graphs import MAX_DEATHS, STEPS_PER_CAPTURE, Graphs
from headwise.runtime.engine.pace import CAPTURE_S, MIN_STEP_TIMEOUT_S
from headwise.runtime.engine.scheduler import Schedule
from headwise.workers.cuda.buckets import bucket_of, buckets_of
from headwise.workers.plan import StepOutput, StepPlan
from tests.effort import examples
from tests.plain_group import Bench, PlainGroup, make_request


class Watched(PlainGroup):
    """Remembers the plans that it got."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[StepPlan] = []

    def submit(self, plan: StepPlan) -> None:
        self.seen.append(plan)
        super().submit(plan)

    @property
    def captures(self) -> list[int]:
        return [plan.capture for plan in self.seen if plan.capture]


def decodes(rows: int) -> StepPlan:
    return StepPlan(0, computes=[(row, 1) for row in range(rows)])


@pytest.mark.parametrize("depth", [1, 2])
def test_an_idle_engine_captures_all_graphs_the_largest_first_once_a_request_is_served(depth: int) -> None:
    group = Watched()
    bench = Bench(group=group, depth=depth, graph_rows=20)
    assert not bench.engine.has_work
    bench.add(make_request("one", [1, 2, 3], 6))
    while "one#0" not in bench.ended:
        assert group.captures == [] and all(plan.bucket == 0 for plan in group.seen)
        bench.step()
    assert bench.engine.has_work
    bench.run()
    assert group.captures == [24, 16, 8, 4, 2, 1] == list(reversed(buckets_of(20)))
    assert all(not plan.computes and plan.bucket == 0 for plan in group.seen if plan.capture)
    assert group.max_in_flight <= depth
    bench.check_idle()


def test_a_request_that_comes_is_served_between_two_captures() -> None:
    group = Watched()
    bench = Bench(group=group, graph_rows=20)
    bench.add(make_request("first", [1, 2, 3], 2))
    while len(group.captures) < 2:
        bench.step()
    bench.add(make_request("second", [1, 2, 3, 4], 3))
    for _ in range(3):
        bench.step()
    assert "second#0" in bench.ended and len(group.captures) == 2
    bench.run()
    assert len(group.captures) == 6


def test_under_load_one_of_sixteen_steps_captures() -> None:
    group = Watched()
    bench = Bench(group=group, depth=2, blocks=100, graph_rows=8)
    bench.add(make_request("short", [1, 2, 3], 2))
    bench.add(make_request("long", [4, 5, 6], 100))
    bench.run()
    steps = [plan.step for plan in group.seen if plan.capture and plan.computes]
    assert group.captures == [8, 4, 2, 1]
    assert [b - a for a, b in pairwise(steps)] == [STEPS_PER_CAPTURE] * 3
    of_one = [plan for plan in group.seen if plan.step > steps[-1]]
    assert of_one and all(plan.bucket == 1 for plan in of_one), "a row alone uses the last that was captured"
    assert all(plan.bucket == 0 for plan in group.seen if plan.step <= steps[-1] and len(plan.computes) == 1)


def test_a_step_that_computes_a_prompt_uses_no_graph() -> None:
    graphs = Graphs(8)
    graphs.begin()
    while graphs.due:
        graphs.fill(StepPlan(0))
    for plan, bucket in [
        (decodes(3), 4),
        (decodes(8), 8),
        (StepPlan(0, computes=[(0, 1), (1, 7)]), 0),
        (StepPlan(0), 0),
    ]:
        graphs.fill(plan)
        assert (plan.bucket, plan.capture) == (bucket, 0)


@examples(100)
@given(max_rows=st.integers(1, 70), steps=st.lists(st.integers(0, 70), max_size=300))
def test_a_graph_is_used_only_after_its_capture(max_rows: int, steps: list[int]) -> None:
    graphs, captured = Graphs(max_rows), set[int]()
    for at, rows in enumerate(min(rows, max_rows) for rows in steps):
        if at == 5:
            graphs.begin()
        plan = decodes(rows)
        graphs.fill(plan)
        expected = bucket_of(rows) if rows and bucket_of(rows) in captured else 0
        assert plan.bucket == expected and plan.capture not in captured
        if plan.capture:
            assert at >= 5 and plan.capture == max(set(buckets_of(max_rows)) - captured)
            captured.add(plan.capture)
    assert graphs.due is (len(steps) > 5 and captured != set(buckets_of(max_rows)))


def test_a_new_generation_has_no_graphs() -> None:
    group = Watched()
    bench = Bench(group=group, graph_rows=4)
    bench.add(make_request("one", [1, 2, 3], 2))
    bench.run()
    assert group.captures == [4, 2, 1]
    bench.add(make_request("two", [1, 2, 3], 20))
    bench.step()
    bench.step()
    assert group.seen[-1].bucket == 1
    bench.engine.lose_group(ShardGroupDied(0, "here", "a test"))
    again = Watched()
    bench.resume(again)
    assert not bench.engine.generation.graphs.due
    while "two#0" not in bench.ended:
        bench.step()
        assert again.captures == [] and again.seen[-1].bucket == 0
    bench.run()
    assert again.captures == [4, 2, 1]


def test_a_device_without_graphs_has_none() -> None:
    group = Watched()
    bench = Bench(group=group)
    for number in range(3):
        bench.add(make_request(str(number), [1, 2, 3], 40))
    bench.run()
    assert all((plan.bucket, plan.capture) == (0, 0) and plan.computes for plan in group.seen)


def test_a_request_that_never_had_a_token_does_not_begin_captures() -> None:
    bench = Bench(graph_rows=4)
    bench.add(make_request("one", [1, 2, 3], 2))
    bench.engine.abort("one")
    assert not bench.engine.generation.graphs.due


def test_a_capture_may_take_long_and_tells_nothing_of_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    group, limits = Watched(), list[float]()
    bench = Bench(group=group, graph_rows=2)
    bench.engine.pace.saw_step(0.001, 1)
    collect = group.collect

    def look() -> StepOutput:
        limits.append(bench.engine.step_limit_s)
        return collect()

    monkeypatch.setattr(group, "collect", look)
    bench.add(make_request("one", [1, 2, 3], 1))
    bench.run()
    assert limits == [MIN_STEP_TIMEOUT_S, MIN_STEP_TIMEOUT_S + CAPTURE_S, MIN_STEP_TIMEOUT_S + CAPTURE_S]
    assert bench.engine.num_steps == 3


@pytest.mark.parametrize("capture", [0, 8])
def test_what_a_prompt_costs_is_not_learned_while_a_graph_is_captured(capture: int) -> None:
    bench = Bench()
    plan = StepPlan(0, computes=[(0, 64)], capture=capture)
    bench.engine._learn_cost(Schedule(plan, [], 64, 64, 0), StepOutput(0, seconds=3.2))
    assert bench.engine.pace.token_s == (None if capture else 0.05)


def test_shards_that_die_again_and_again_of_captures_have_no_graphs_at_last(caplog: pytest.LogCaptureFixture) -> None:
    bench, last = Bench(group=Watched(), graph_rows=4), Watched()
    for number in range(MAX_DEATHS):
        bench.add(make_request(str(number), [1, 2, 3], 2))
        while f"{number}#0" not in bench.ended:
            bench.step()
        bench.engine._submit_next()
        assert bench.engine._in_flight[-1].plan.capture
        bench.engine.lose_group(ShardGroupDied(0, "here", "a test"))
        assert "graphs" not in caplog.text
        bench.resume(last := Watched())
    bench.add(make_request("last", [1, 2, 3], 20))
    bench.run()
    assert last.captures == [] and all(plan.bucket == 0 for plan in last.seen) and "last#0" in bench.ended
    assert "died 2 times while they captured graphs" in caplog.text


def test_no_graph_is_captured_beside_a_request_that_shards_may_have_died_of() -> None:
    graphs = Graphs(1)
    graphs.begin()
    plan = StepPlan(0)
    graphs.fill(plan, may_capture=False)
    assert plan.capture == 0
    graphs.fill(plan)
    assert plan.capture == 1
