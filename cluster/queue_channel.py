"""The step channel within one process: queues between threads."""

from __future__ import annotations

from queue import Empty, SimpleQueue

from headwise.cluster.channel import EngineChannel, Kind, ShardChannel


class QueueEngineChannel(EngineChannel):
    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._replies: SimpleQueue[tuple[Kind, int, bytes] | None] = SimpleQueue()
        self._ranks = [QueueShardChannel(rank, self._replies) for rank in range(world_size)]

    def rank(self, rank: int) -> QueueShardChannel:
        """The end of that rank."""
        return self._ranks[rank]

    def send(self, rank: int, kind: Kind, payload: bytes) -> None:
        if kind == Kind.TRANSFER:
            self._ranks[rank].transfers.put(payload)
        else:
            self._ranks[rank].messages.put((kind, payload))

    def receive(self, timeout_s: float | None) -> tuple[Kind, int, bytes] | None:
        try:
            return self._replies.get(timeout=timeout_s)
        except Empty:
            return None

    def wake(self) -> None:
        self._replies.put(None)


class QueueShardChannel(ShardChannel):
    def __init__(self, rank: int, replies: SimpleQueue[tuple[Kind, int, bytes] | None]) -> None:
        self._rank, self._replies = rank, replies
        self.messages: SimpleQueue[tuple[Kind, bytes] | BaseException] = SimpleQueue()
        self.transfers: SimpleQueue[bytes | None] = SimpleQueue()

    def receive_transfer(self) -> bytes | None:
        return self.transfers.get()

    def end_transfers(self) -> None:
        self.transfers.put(None)

    def receive(self, timeout_s: float | None) -> tuple[Kind, bytes] | None:
        try:
            message = self.messages.get(timeout=timeout_s)
        except Empty:
            return None
        if isinstance(message, BaseException):
            raise message
        return message

    def send(self, kind: Kind, payload: bytes) -> None:
        self._replies.put((kind, self._rank, payload))

    def fail(self, error: BaseException) -> None:
        self.messages.put(error)
