"""The front's thread, with replicas that are a test's."""

from __future__ import annotations

import threading
from typing import Any

from headwise.cluster.group import GroupStartError
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

    def has_room(self, settings: dict[str, Any]) -> bool:
        return False

    def ask_for_nodes(self, num_replicas: int) -> None:
        self.asked.append(num_replicas)

    def close(self) -> None:
        pass


def test_what_is_due_is_done_while_more_comes_all_the_time() -> None:
    ticked, stop = threading.Event(), threading.Event()

    class Ticks(Deployment):
        busy = False

        def tick(self) -> None:
            super().tick()
            if self.busy:
                ticked.set()

    front = Front(Ticks(ReplicaOptions(1), 4, 8), NoReplicas(), lambda role, place: {}, lambda error: None)

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
