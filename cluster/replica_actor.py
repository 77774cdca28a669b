"""The Ray actor that holds the engine of one replica."""

from __future__ import annotations

import os
from typing import Any, Protocol

import psutil
import ray

from headwise.cluster.channel import ShardChannel
from headwise.cluster.engine_watch import EngineProcess, EngineWatch
from headwise.cluster.zmq_channel import ShardEndpoint, ZmqShardChannel
from headwise.workers.leftovers import remove_own
from headwise.workers.machine import free_host_memory
from headwise.workers.processes import ProcessId

FRONT_TIMEOUT_S = 60.0
"""How long an engine waits for a front that does not read, as its process is stopped. If it ended, so would all others
at once, and each would have to load its weights again."""


class Host(Protocol):
    """An engine that serves a channel, as runtime/deployment/host.py has it."""

    about: dict[str, Any]

    def __init__(self, settings: dict[str, Any]) -> None: ...

    def serve(self, channel: ShardChannel) -> None: ...

    def close(self) -> None: ...


class ReplicaActor:
    """One replica. Its front calls :meth:`load` and :meth:`run`, which returns when the front closes the channel."""

    def __init__(self, front: EngineProcess) -> None:
        """Args: ``front``: with whose process this one ends; where it cannot see that, Ray ends it."""
        # The ranks compute, each in a process of its own; torch, which is imported later, needs no threads here.
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
            os.environ[name] = "1"
        self._host: Host | None = None
        # Ray kills the ranks and the warden, which else would remove what it leaves, with it.
        self._watch = EngineWatch(front, remove_own)

    def place(self) -> dict[str, Any]:
        """Where this replica runs, and how many bytes of memory are free there."""
        return {
            "node_id": ray.get_runtime_context().get_node_id(),
            "address": ray.util.get_node_ip_address(),
            "pid": os.getpid(),
            "born": psutil.Process().create_time(),
            "process": ProcessId.of(os.getpid()),
            "free_memory": free_host_memory(),
        }

    def load(self, host: type[Host], settings: dict[str, Any]) -> dict[str, Any]:
        """Starts the engine; returns what it says of itself.

        Args:
            host: the engine's class.
            settings: what it is made with.

        Raises: what the class raises.
        """
        self._host = host(settings)
        return self._host.about

    def run(self, endpoint: ShardEndpoint) -> None:
        """Serves the channel until the front closes it, then ends the engine.

        Raises:
            HeadwiseError: what the engine has ended with.
        """
        assert self._host is not None, "load() comes first"
        channel = ZmqShardChannel(endpoint, FRONT_TIMEOUT_S)
        try:
            self._host.serve(channel)
        finally:
            channel.close()
            self._host.close()
