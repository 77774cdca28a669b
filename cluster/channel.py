"""The step channel between an engine and the ranks of its group: what goes over it, and what each end can do.

A message is a kind and a payload, which its sender encodes. zmq_channel.py carries messages between processes,
queue_channel.py between the threads of one.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod

from headwise.workers.errors import HeadwiseError


class Kind(enum.IntEnum):
    """What a message is: the first five go to ranks, the others come from them."""

    STEP = 1
    QUERY = 2
    CLOSE = 3
    TRANSFER = 4
    ALLOCATE = 5
    OUTPUT = 16
    REPLY = 17
    ERROR = 18
    PROGRESS = 19
    TRANSFERRED = 20


class ChannelError(HeadwiseError):
    """A message could not be sent in time, or the channel cannot be set up."""


class MessageTooLargeError(ChannelError):
    """A message is over the limit, which is its sender's mistake and not its receiver's."""


class EngineChannel(ABC):
    """The engine's end: to each rank one queue for transfers and one for everything else, and one queue from all of
    them. For one thread, but for :meth:`wake`."""

    world_size: int

    @abstractmethod
    def send(self, rank: int, kind: Kind, payload: bytes) -> None:
        """
        Raises:
            MessageTooLargeError: the payload is too large for every rank.
            ChannelError: the rank does not read, or the channel is closed.
        """

    def send_all(self, kind: Kind, payload: bytes) -> None:
        """Sends to every rank, in rank order; raises as :meth:`send`."""
        for rank in range(self.world_size):
            self.send(rank, kind, payload)

    @abstractmethod
    def receive(self, timeout_s: float | None) -> tuple[Kind, int, bytes] | None:
        """The next message and the rank it is from; None when the time is over, :meth:`wake` was called or the channel
        is closed."""

    @abstractmethod
    def wake(self) -> None:
        """Lets a blocked :meth:`receive` return None. May be called on any thread."""


class ShardChannel(ABC):
    """A rank's end. For one thread, but for :meth:`receive_transfer`, which another has to itself, and for
    :meth:`send`, :meth:`fail` and :meth:`end_transfers`."""

    @abstractmethod
    def receive_transfer(self) -> bytes | None:
        """The next transfer, which waits for no step; None after :meth:`end_transfers`."""

    @abstractmethod
    def end_transfers(self) -> None:
        """Has :meth:`receive_transfer` return None. May be called on any thread."""

    @abstractmethod
    def receive(self, timeout_s: float | None) -> tuple[Kind, bytes] | None:
        """The next message that is no transfer, None when the time is over.

        Raises:
            BaseException: the error that :meth:`fail` was called with.
        """

    @abstractmethod
    def send(self, kind: Kind, payload: bytes) -> None:
        """May be called on any thread.

        Raises:
            MessageTooLargeError: the payload is too large.
            ChannelError: the engine does not read, or the channel is closed.
        """

    @abstractmethod
    def fail(self, error: BaseException) -> None:
        """Has :meth:`receive` raise an error that another thread of this rank has met. May be called on any thread."""
