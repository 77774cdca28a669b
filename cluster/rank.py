"""Rank: one rank of a group, whatever it runs in. It is imported before torch is: its own imports stay light."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgpack

from headwise.cluster.channel import Kind, ShardChannel
from headwise.workers.errors import PeerDiedError
from headwise.workers.spec import ShardSpec

if TYPE_CHECKING:
    from headwise.cluster.group import Progress
    from headwise.workers.collectives import Rendezvous
    from headwise.workers.shard import Shard

QUERIES = ("stats", "stored_blocks", "kv_endpoint")
"""The methods of Shard that a group may ask every rank for."""


def death_of(rank: int, error: BaseException) -> tuple[int, str]:
    """The rank that died where ``error`` ended ``rank``, and the cause, in text that any message can carry."""
    if isinstance(error, PeerDiedError):
        return error.rank, sayable(error.cause)
    return rank, sayable(f"{type(error).__name__}: {error}")


def sayable(text: str) -> str:
    """``text`` with halves of surrogate pairs escaped: a path may hold them, and no message can."""
    return text.encode(errors="backslashreplace").decode()


class Rank:
    """A shard and the step channel that it serves. Call :meth:`load`, :meth:`allocate` and :meth:`serve`, all on one
    thread; :meth:`close` where it does not come to that.

    Attributes:
        shard: once :meth:`load` has made it, until it is closed.
    """

    def __init__(self, spec: ShardSpec, rank: int, num_threads: int) -> None:
        self._spec, self._rank, self._num_threads = spec, rank, num_threads
        self.shard: Shard | None = None

    def load(
        self,
        channel: ShardChannel,
        rendezvous: Rendezvous | dict[str, Any],
        timeout_s: float,
        progress: Progress | None,
        ranks_on_host: Sequence[int],
    ) -> int:
        """Meets the other ranks and loads the weights; returns how many KV blocks this rank affords.

        Args:
            timeout_s: for all ranks to meet.
            progress: called on rank 0 alone.
            ranks_on_host: of this group, this one included.

        Raises: as :func:`headwise.workers.collectives.connect` and :class:`~headwise.workers.shard.Shard`.
        """
        from headwise.workers import collectives
        from headwise.workers.kv.transfer import encode_result
        from headwise.workers.shard import Shard

        spec, self._channel = self._spec, channel
        peers = collectives.connect(rendezvous, self._rank, spec.tensor_parallel_size, timeout_s, spec.device)
        self.shard = Shard(
            spec,
            peers,
            self._num_threads,
            on_transfer=lambda result: channel.send(Kind.TRANSFERRED, encode_result(result)),
            on_failure=channel.fail,
            ranks_on_host=ranks_on_host,
        )
        self.shard.load(progress if self._rank == 0 else None)
        return self.shard.affordable_blocks()

    def allocate(self, num_blocks: int) -> None:
        """Takes the KV memory; the same number of blocks on every rank."""
        assert self.shard is not None, "load() comes first"
        self.shard.allocate(num_blocks)

    def serve(self) -> None:
        """Does what the channel asks for until it asks to close, then closes the shard.

        Raises: what the shard raises; the engine and the peers are told first.
        """
        assert self.shard is not None, "load() comes first"
        try:
            for message in self._messages():
                self._serve_one(self.shard, *message)
        except BaseException as error:
            dead, cause = death_of(self._rank, error)
            try:
                self.shard.abort(cause)
            finally:
                self._channel.send(Kind.ERROR, msgpack.packb((dead, cause)))
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Idempotent."""
        shard, self.shard = self.shard, None
        if shard is not None:
            shard.close()

    def _messages(self) -> Iterator[tuple[Kind, bytes]]:
        """What the channel brings until it asks to close. A transfer goes before the steps that wait: it runs beside
        steps, and in no order with them."""
        waiting: deque[tuple[Kind, bytes]] = deque()
        while True:
            while (message := self._channel.receive(0 if waiting else None)) is not None:
                if message[0] == Kind.TRANSFER:
                    yield message
                else:
                    waiting.append(message)
            if waiting and waiting[0][0] == Kind.CLOSE:
                return
            if waiting:
                yield waiting.popleft()

    def _serve_one(self, shard: Shard, kind: Kind, payload: bytes) -> None:
        from headwise.workers.kv.transfer import decode_job
        from headwise.workers.plan import decode_plan, encode_output

        if kind == Kind.STEP:
            output = shard.step(decode_plan(payload))
            if self._rank == 0:
                self._channel.send(Kind.OUTPUT, encode_output(output))
        elif kind == Kind.TRANSFER:
            shard.transfer(decode_job(payload))
        elif kind == Kind.QUERY and payload.decode() in QUERIES:
            self._channel.send(Kind.REPLY, msgpack.packb(getattr(shard, payload.decode())()))
        else:
            raise ValueError(f"rank {self._rank} got a message of kind {kind!r} it does not know: {payload[:40]!r}")
