"""What is decided when shard groups die, one after another."""

from __future__ import annotations

import threading
from dataclasses import asdict
from typing import Any

import pytest

from headwise.cluster.group import ShardGroupDied
from headwise.cluster.supervisor import MAX_DEATHS, MAX_FAILURES, SOUND_S, GiveUp, Rebuild, Supervisor

DEADLINE_S = 10.0
DEATH = ShardGroupDied(1, "here", "killed")


def test_a_group_that_has_finished_a_step_is_replaced_at_once_however_often_it_dies() -> None:
    supervisor = Supervisor(0.0)
    for at in range(3 * MAX_FAILURES):
        assert supervisor.died(float(at), at, DEATH, has_stepped=True) == Rebuild(0.0)
        supervisor.rebuilt(at + 0.5)
    stats = supervisor.stats()
    assert (stats["count"], stats["num_deaths"], stats["last_seconds"]) == (30, 30, 0.5)
    assert stats["deaths"][-1] == {"epoch": 29, "rank": 1, "node": "here", "cause": "killed"}


def test_groups_that_finish_no_step_wait_longer_each_time_and_are_given_up() -> None:
    supervisor = Supervisor(0.0)
    waits = []
    for at in range(MAX_FAILURES):
        failing = supervisor.died(0.0, at, DEATH, has_stepped=False) if at % 2 else supervisor.failed("no room")
        waits.append(failing)
    assert waits[:6] == [Rebuild(seconds) for seconds in (0.5, 1.0, 2.0, 4.0, 8.0, 10.0)]
    assert waits[-1] == GiveUp("10 shard groups in a row have not finished a step; the last: " + str(DEATH))


def test_a_finished_step_begins_a_new_row() -> None:
    supervisor = Supervisor(0.0, max_failures=3)
    for _ in range(2):
        assert isinstance(supervisor.failed("no room"), Rebuild)
    assert supervisor.died(0.0, 1, DEATH, has_stepped=True) == Rebuild(0.0)
    for _ in range(2):
        assert isinstance(supervisor.failed("no room"), Rebuild)
    assert isinstance(supervisor.failed("no room"), GiveUp)


def test_the_last_deaths_are_remembered() -> None:
    supervisor = Supervisor(0.0)
    for at in range(MAX_DEATHS + 5):
        supervisor.died(0.0, at, DEATH, has_stepped=True)
    supervisor.died(0.0, 99, ShardGroupDied(None, None, "Ray is gone"), has_stepped=True)
    stats = supervisor.stats()
    assert [death["epoch"] for death in stats["deaths"]] == [*range(6, MAX_DEATHS + 5), 99]
    assert stats["deaths_by_rank"] == {"1": MAX_DEATHS + 5, "": 1}


def test_groups_that_have_lived_with_nothing_to_do_are_replaced_however_many_die() -> None:
    supervisor = Supervisor(0.0)
    for at in range(1, 3 * MAX_FAILURES):
        assert supervisor.died(at * (SOUND_S + 1), at, DEATH, has_stepped=False, idle=True) == Rebuild(0.0)
        supervisor.rebuilt(at * (SOUND_S + 1) + 1)
    at = supervisor.num_deaths * (SOUND_S + 1) + 2
    assert supervisor.died(at, 99, DEATH, has_stepped=False, idle=True) == Rebuild(0.5)
    assert supervisor.died(at + 2 * SOUND_S, 99, DEATH, has_stepped=False) == Rebuild(1.0)  # its first step hung


def test_deaths_may_be_read_while_others_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor, added = Supervisor(0.0), list[threading.Thread]()
    for epoch in (1, 2):
        supervisor.died(0.0, epoch, DEATH, has_stepped=True)

    def describe(death: Any) -> dict[str, Any]:
        """In the middle of a reading, another thread adds a death, or waits for the end of the reading."""
        if not added:
            added.append(threading.Thread(target=supervisor.died, args=(0.0, 3, DEATH), kwargs={"has_stepped": True}))
            added[0].start()
            added[0].join(0.2)
        return asdict(death)

    monkeypatch.setattr("headwise.cluster.supervisor.asdict", describe)
    read = [death["epoch"] for death in supervisor.stats()["deaths"]]
    added[0].join(DEADLINE_S)
    assert read == [1, 2] and [death["epoch"] for death in supervisor.stats()["deaths"]] == [1, 2, 3]
