"""A replica as its front sees it: an engine in a process of its own, maybe on another host; and who starts such."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from headwise.cluster.channel import EngineChannel

OnDeath = Callable[[str, str], object]
"""Gets a replica's name and what it died of."""


class Replica(ABC):
    """The front's hold on an engine that has started.

    Attributes:
        name: no other replica of the front ever had it.
        node: the address of the host that its process is on.
        pid: of its process there.
        about: what the engine says of itself: ``num_blocks``, ``block_size``, ``tensor_parallel_size``, ``dtype``,
            ``max_model_len``, ``epoch``, ``shards`` (a dict of ``rank``, ``node`` and ``pid`` for each), and
            ``handoff_address``, None where it computes no prompts for others.
        channel: to the engine, as to a group of one rank: Kind.STEP carries messages to it, Kind.OUTPUT those from it.
            A send that raises ChannelError is as good as its death.
    """

    name: str
    node: str
    pid: int
    about: dict[str, Any]
    channel: EngineChannel

    @abstractmethod
    def close(self, ask: bool = True) -> None:
        """Ends its process, with its ranks, and the channel; waits until they are gone, for a limited time. Call it for
        one that has died, too. What dies from now on is not told. Idempotent, for any thread.

        Args:
            ask: have the engine end by itself, for a few seconds, before its process is killed.
        """


class ReplicaFactory(ABC):
    """Starts replicas. For any thread."""

    @abstractmethod
    def start(self, name: str, settings: dict[str, Any], on_death: OnDeath) -> Replica:
        """Starts an engine and waits until it can compute.

        Args:
            name: for people, and for ``on_death``; no two starts have the same.
            settings: the fields of an EngineConfig.
            on_death: called once, on any thread, when the process dies or its engine ends, unless close() came first.

        Raises:
            NoRoomError: it finds no room.
            HeadwiseError: it cannot be started, as an engine in this process would say it; or it was cancelled.
        """

    @abstractmethod
    def cancel(self, name: str) -> None:
        """Has :meth:`start` give up a replica that nobody wants any more, if it is still starting, or will be."""

    @abstractmethod
    def has_room(self, settings: dict[str, Any]) -> bool:
        """Whether one more such engine would find room now, as far as can be told."""

    @abstractmethod
    def ask_for_nodes(self, num_replicas: int) -> None:
        """Has the cluster's autoscaler provide room for so many replicas in all, beside those that only compute prompts
        for others; 0 takes the request back. Does nothing where there is no autoscaler, and after :meth:`close`."""

    @abstractmethod
    def close(self) -> None:
        """Ends what start() has begun, replicas that were not closed among it. Idempotent."""
