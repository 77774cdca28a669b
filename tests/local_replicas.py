"""Replicas whose engines run in this process, on a queue channel: a front and real engines, without Ray's start-up."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from typing import Any

from headwise.cluster.channel import Kind
from headwise.cluster.queue_channel import QueueEngineChannel
from headwise.cluster.replica import OnDeath, Replica, ReplicaFactory
from headwise.runtime.deployment.host import ReplicaHost


class LocalReplica(Replica):
    def __init__(self, name: str, settings: dict[str, Any], on_death: OnDeath) -> None:
        self.name, self.node, self.pid = name, "localhost", os.getpid()
        self._on_death = on_death
        self.channel: QueueEngineChannel = QueueEngineChannel(1)
        self.host = ReplicaHost(settings)
        self.about = self.host.about
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="headwise-engine", daemon=True)
        self._thread.start()

    def die(self, cause: str = "killed") -> None:
        """Ends as if its process had been killed: nothing more is heard of it."""
        self.channel.rank(0).fail(RuntimeError(cause))
        self._thread.join(30.0)

    def close(self, ask: bool = True) -> None:
        self._closing = True
        self.channel.send(0, Kind.CLOSE, b"")
        self._thread.join(30.0)

    def _serve(self) -> None:
        cause = "its run() returned"
        try:
            self.host.serve(self.channel.rank(0))
        except Exception as error:
            cause = str(error)
        with suppress(Exception):
            self.host.close()
        if not self._closing:
            self._on_death(self.name, cause)


class LocalReplicas(ReplicaFactory):
    """Attributes: ``started``: all replicas so far; ``wanted_nodes``: what was asked of an autoscaler."""

    def __init__(self) -> None:
        self.started: list[LocalReplica] = []
        self.wanted_nodes: list[int] = []

    def start(self, name: str, settings: dict[str, Any], on_death: OnDeath) -> LocalReplica:
        replica = LocalReplica(name, settings, on_death)
        self.started.append(replica)
        return replica

    def cancel(self, name: str) -> None:
        pass  # it will not take long

    def has_room(self, settings: dict[str, Any]) -> bool:
        return True

    def ask_for_nodes(self, num_replicas: int) -> None:
        self.wanted_nodes.append(num_replicas)

    def close(self) -> None:
        for replica in self.started:
            replica.close()
