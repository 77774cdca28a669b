"""The front's thread, with replicas that are a test's."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from headwise.cluster.group import GroupStartError, NoRoomError
from headwise.cluster.queue_channel import QueueEngineChannel
from headwise.cluster.replica import OnDeath, Replica, ReplicaFactory
from headwise.runtime.deployment.deployment import Deployment
from headwise.runtime.deployment.front import Front
from headwise.runtime.deployment.options import ReplicaOptions

DEADLINE_S = 30.0


class NoReplicas(ReplicaFactory):
    """None can be started. Attributes: ``asked``: for so many nodes, each time."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def start(self, name: str, settings: dict[str, Any], on_death: OnDeath) -> Replica:
        raise GroupStartError("there is no room")

    def cancel(self, name: str) -> None:
        pass

    def has_room(self, settings: dict[str, Any]) -> bool:
        return False

    def ask_for_nodes(self, num_replicas: int) -> None:
        self.asked.append(num_replicas)

    def close(self) -> None:
        pass


def front_of(deployment: Deployment, factory: ReplicaFactory) -> Front:
    return Front(deployment, factory, lambda role, place: {}, lambda error: None, lambda about: None, vocab_size=8)


class Idle(Replica):
    """Computes nothing."""

    def __init__(self, name: str) -> None:
        self.name, self.node, self.pid = name, "here", 1
        self.about = {"num_blocks": 1, "block_size": 4, "max_model_len": 4}
        self.channel = QueueEngineChannel(1)
        self.closed = threading.Event()

    def close(self, ask: bool = True) -> None:
        self.closed.set()


class OneReplica(NoReplicas):
    """There is one, and for each further one an error."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.first, self._error, self.failed = Idle("replica-1"), error, threading.Event()

    def has_room(self, settings: dict[str, Any]) -> bool:
        return True

    def start(self, name: str, settings: dict[str, Any], on_death: OnDeath) -> Replica:
        if name == self.first.name:
            return self.first
        self.failed.set()
        raise self._error


def test_who_was_told_that_it_took_too_long_can_count_on_it() -> None:
    goes_on = threading.Event()
    front = front_of(Deployment(ReplicaOptions(1), 4, 8), NoReplicas())
    try:
        front.post(lambda deployment: goes_on.wait(DEADLINE_S))
        with pytest.raises(TimeoutError):
            front.run(lambda deployment: deployment.scale(3), 0.01)
        goes_on.set()
        assert front.run(lambda deployment: deployment.status())["wanted"] == 1
    finally:
        goes_on.set()
        front.close()


def test_after_its_end_the_front_keeps_nothing() -> None:
    front = front_of(Deployment(ReplicaOptions(1), 4, 8), NoReplicas())
    front.close()
    for _ in range(10):
        front.post(lambda deployment: deployment.tick())
    assert front._functions.empty()


def test_the_end_waits_for_all_replicas_together_no_longer_than_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwise.runtime.deployment.front._HURRY_S", 0.2)
    over, count = threading.Event(), 30

    class Hangs(Idle):
        def close(self, ask: bool = True) -> None:
            over.wait(DEADLINE_S)

    class Hanging(NoReplicas):
        def start(self, name: str, settings: dict[str, Any], on_death: OnDeath) -> Replica:
            return Hangs(name)

    front = front_of(Deployment(ReplicaOptions(count), 4, 8), Hanging())
    front.await_start()
    front.hurry()
    began = time.monotonic()
    try:
        front.close()
        assert time.monotonic() - began < 0.2 * count / 2
    finally:
        over.set()


def test_the_last_number_of_nodes_is_asked_for_last() -> None:
    overtaken, asked_last = threading.Event(), threading.Event()

    class Slow(NoReplicas):
        def ask_for_nodes(self, num_replicas: int) -> None:
            if num_replicas == 1:
                overtaken.wait(1.0)  # which must not happen
            super().ask_for_nodes(num_replicas)
            overtaken.set()
            if len(self.asked) == 2:
                asked_last.set()

    factory = Slow()
    front = front_of(Deployment(ReplicaOptions(1), 4, 8), factory)
    try:
        front.run(lambda deployment: deployment.scale(3))
        assert asked_last.wait(DEADLINE_S) and factory.asked[-1] == 3
    finally:
        front.close()


@pytest.mark.parametrize("room", [False, True])
def test_the_old_one_goes_first_only_where_the_next_lacks_its_room(room: bool) -> None:
    error = GroupStartError("it died while it started") if room else NoRoomError("1 rank wants 1 CPU")
    factory = OneReplica(error)
    front = front_of(Deployment(ReplicaOptions(1), 4, 8), factory)
    try:
        front.await_start()
        front.run(lambda deployment: deployment.restart())
        deadline = time.monotonic() + DEADLINE_S
        while front.run(lambda deployment: deployment.status())["restarting"] and not factory.first.closed.is_set():
            assert time.monotonic() < deadline
        assert factory.failed.is_set() and factory.first.closed.is_set() is not room
    finally:
        front.close()


def test_what_is_due_is_done_while_more_comes_all_the_time() -> None:
    ticked, stop = threading.Event(), threading.Event()

    class Ticks(Deployment):
        busy = False

        def tick(self) -> None:
            super().tick()
            if self.busy:
                ticked.set()

    front = front_of(Ticks(ReplicaOptions(1), 4, 8), NoReplicas())

    def again(deployment: Deployment) -> None:
        assert isinstance(deployment, Ticks)
        deployment.busy = True
        if not stop.is_set():
            front.post(again)

    front.post(again)
    try:
        assert ticked.wait(DEADLINE_S)
    finally:
        stop.set()
        front.close()
