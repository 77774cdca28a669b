"""Mailbox: the messages of a group's ranks by kind, and the group's death."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Sequence

import msgpack

from headwise.cluster.channel import ChannelError, EngineChannel, Kind, MessageTooLargeError
from headwise.cluster.group import ShardGroupDied
from headwise.workers import failpoints
from headwise.workers.failpoints import Point

CLOSED = "the group is closed"
"""The cause that somebody hears who uses a group after its end."""


class Mailbox:
    """Sends to every rank, sorts by kind what the ranks send, and keeps the first death that anybody reports.

    From a death on nothing is sent, and once everything that came before it is taken, every :meth:`poll` raises it.
    For one thread, but for :attr:`death`, :meth:`declare_dead` and :meth:`wake`.

    Attributes:
        death: what ended the group, as far as that is known.
    """

    def __init__(self, channel: EngineChannel, nodes: Sequence[str]) -> None:
        """Args: ``nodes``: where each rank runs, for messages."""
        self._channel, self._nodes = channel, nodes
        self._received: defaultdict[Kind, deque[tuple[int, bytes]]] = defaultdict(deque)
        self.death: ShardGroupDied | None = None
        self._declaring = threading.Lock()

    def send_all(self, kind: Kind, payload: bytes) -> None:
        """
        Raises:
            ShardGroupDied: a rank died, or does not read what it is sent; or the payload is too large for any.
        """
        if self.death is not None:
            raise self.death
        for rank in range(len(self._nodes)):
            if failpoints.ENABLED and kind == Kind.STEP and failpoints.hit(Point.CHANNEL_PLAN, rank):
                continue
            try:
                self._channel.send(rank, kind, payload)
            except MessageTooLargeError as error:
                raise self.declare_dead(None, str(error)) from None
            except ChannelError as error:
                raise self.declare_dead(rank, str(error)) from None

    def receive(self, kind: Kind) -> tuple[int, bytes]:
        """The rank and payload of the next message of a kind, however long it takes to come; raises as :meth:`poll`."""
        while (message := self.poll(kind, 1.0)) is None:
            pass
        return message

    def poll(self, kind: Kind, timeout_s: float) -> tuple[int, bytes] | None:
        """The rank and payload of the next message of a kind; None if none comes in time, or :meth:`wake` was called.

        Raises:
            ShardGroupDied: a rank died or reported an error.
        """
        deadline = time.monotonic() + timeout_s
        while not self._received[kind]:
            got = self._channel.receive(0 if self.death is not None else max(0.0, deadline - time.monotonic()))
            if got is None:
                if self.death is not None:
                    raise self.death
                return None
            if got[0] == Kind.ERROR:
                dead, cause = msgpack.unpackb(got[2])
                self.declare_dead(dead, cause, own_error=dead == got[1])
            else:
                self._received[got[0]].append((got[1], got[2]))
        return self._received[kind].popleft()

    def wake(self) -> None:
        """Lets a :meth:`poll` that waits, or else the next that would, return None. May be called on any thread."""
        self._channel.wake()

    def declare_dead(self, rank: int | None, cause: str, own_error: bool = False) -> ShardGroupDied:
        """Ends the group, unless a death is known already; returns the first. May be called on any thread.

        Args:
            rank: the one that died; None where none did.
            own_error: whether the rank has said so itself.
        """
        death = ShardGroupDied(rank, None if rank is None else self._nodes[rank], cause, own_error)
        with self._declaring:
            self.death = self.death or death
        self._channel.wake()
        return self.death
