"""A seed has one schedule: the same questions, requests and faults each time; another seed has others."""

from __future__ import annotations

from itertools import islice, pairwise
from pathlib import Path

import pytest

from headwise.runtime.chaos.faults import Abilities, Injection, Kind, injections
from headwise.runtime.chaos.workload import NUM_QUESTIONS, Way, asks, questions
from headwise.workers.failpoints import DROPPABLE, Action, Point, arm
from headwise.workers.model.attention import PART_KEYS

RANKS = Abilities(ranks=2, processes=True, tiers=True, disk=True, hangs_s=8.0)
THREADS = Abilities(ranks=1, processes=False, tiers=False, disk=False, hangs_s=8.0)


def first(able: Abilities, seed: int = 1, count: int = 2000) -> list[Injection]:
    return list(islice(injections(seed, able), count))


def test_a_seed_has_one_schedule() -> None:
    assert first(RANKS) == first(RANKS) != first(RANKS, seed=2)
    assert list(islice(asks(1, 0), 50)) == list(islice(asks(1, 0), 50)) != list(islice(asks(1, 1), 50))
    assert questions(1, 256, 128, True) == questions(1, 256, 128, True) != questions(2, 256, 128, True)


@pytest.mark.parametrize("structured", [False, True])
def test_questions_are_of_every_kind_and_fit_the_model(structured: bool) -> None:
    asked = questions(3, 256, 128, structured)
    assert len(asked) == NUM_QUESTIONS
    assert any(one.params.temperature == 0 for one in asked) and any(one.params.seed is not None for one in asked)
    assert any(one.params.n > 1 for one in asked)
    assert any(one.params.structured_outputs is not None for one in asked) == structured
    for one in asked:
        assert one.params.max_tokens is not None and len(one.prompt) + one.params.max_tokens <= 128
        assert one.prompt and all(0 <= token < 256 for token in one.prompt)


def test_some_contexts_are_divided_and_some_grow_until_they_are() -> None:
    for seed in range(5):
        asked = questions(seed, 256, 1024, True)
        ends = [len(one.prompt) + (one.params.max_tokens or 0) for one in asked]
        assert 3 <= sum(end > PART_KEYS for end in ends) < NUM_QUESTIONS - 3
        assert any(len(one.prompt) < PART_KEYS < end for one, end in zip(asked, ends, strict=True))


def test_clients_ask_in_every_way() -> None:
    asked = list(islice(asks(1, 0), 300))
    assert {ask.way for ask in asked} == set(Way)
    for ask in asked:
        assert all(0 <= number < NUM_QUESTIONS for number in ask.questions)
        assert (len(ask.questions) == 1) or ask.way is Way.WHOLE
        assert (ask.increments > 0) == (ask.way in (Way.LEAVE, Way.ABORT))


def test_every_fault_is_drawn_and_makes_sense(tmp_path: Path) -> None:
    drawn = first(RANKS)
    assert {one.kind for one in drawn} == set(Kind)
    points = {one.point for one in drawn if one.point is not None}
    # The token is for a poison, and who hands over is another engine.
    assert points == {p for p in Point if p != Point.STEP_TOKEN and not p.startswith("handoff.")}
    assert {one.fault.action for one in drawn if one.fault is not None} == set(Action)
    for one in drawn:
        if one.point is not None and one.fault is not None:
            arm(tmp_path, one.point, one.fault, one.ranks[0] if one.ranks else None)  # refuses what makes no sense
            assert one.fault.action is not Action.DROP or one.point in DROPPABLE
    assert not any(a.hasty and b.hasty for a, b in pairwise(drawn))


def test_threads_are_not_killed_and_ranks_without_tiers_have_no_fault_in_them() -> None:
    drawn = first(THREADS)
    assert {one.kind for one in drawn} == {Kind.POINT}
    actions = {one.fault.action for one in drawn if one.fault is not None}
    assert not actions & {Action.KILL, Action.EXIT, Action.STOP}
    points = {one.point for one in drawn if one.point is not None}
    assert not any(point.startswith(("kv.", "collective.", "load.")) for point in points)
