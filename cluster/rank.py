"""Rank: one rank of a group, whatever it runs in. It is imported before torch is: its own imports stay light."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import msgpack

from headwise.cluster.channel import Kind, ShardChannel
from headwise.cluster.replies import encode_reply
from headwise.workers import failpoints
from headwise.workers.errors import PeerDiedError
from headwise.workers.failpoints import Point
from headwise.workers.spec import ShardSpec

if TYPE_CHECKING:
    from headwise.cluster.group import Progress
    from headwise.workers.collectives import Rendezvous
    from headwise.workers.plan import StepPlan
    from headwise.workers.runner import Launched
    from headwise.workers.shard import Shard

TRANSFERS_END_S = 5.0
"""For the thread that takes transfers to end. It waits for nothing but the channel."""

_LOOKS_EVERY_S = 5e-5
"""For a message, and whether a GPU has computed a step, once half of the time is over that the step before took."""
_RESTS_S = 1e-3
"""Until then: a message is seen at once all the same."""

QUERIES = ("affordable_blocks", "stats", "stored_blocks", "kv_endpoint")
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
    """A shard and the step channel that it serves. Call :meth:`load` and :meth:`serve`, both on one thread;
    :meth:`close` where it does not come to that.

    Attributes:
        shard: once :meth:`load` has made it, until it is closed.
    """

    def __init__(self, spec: ShardSpec, rank: int, num_threads: int) -> None:
        self._spec, self._rank, self._num_threads = spec, rank, num_threads
        self.shard: Shard | None = None
        self._launched: Launched | None = None
        self._step_s = self._rest_until = 0.0

    def load(
        self,
        channel: ShardChannel,
        rendezvous: Rendezvous | dict[str, Any],
        timeout_s: float,
        progress: Progress | None,
        ranks_on_host: Sequence[int],
    ) -> None:
        """Meets the other ranks and loads the weights.

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
        self._use_gpu()
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

    def serve(self) -> None:
        """Does what the channel asks for until it asks to close, then closes the shard.

        Raises: what the shard raises; the engine and the peers are told first.
        """
        assert self.shard is not None, "load() comes first"
        self._use_gpu()
        transfers = threading.Thread(target=self._serve_transfers, args=(self.shard,), name="headwise-transfers")
        transfers.daemon = True
        transfers.start()
        try:
            while (message := self._receive(self.shard)) is None or message[0] != Kind.CLOSE:
                if message is not None:
                    self._serve_one(self.shard, *message)
        except BaseException as error:
            dead, cause = death_of(self._rank, error)
            try:
                self.shard.abort(cause)
            finally:
                self._channel.send(Kind.ERROR, msgpack.packb((dead, cause)))
            raise
        finally:
            self._channel.end_transfers()
            transfers.join(TRANSFERS_END_S)
            self.close()

    def close(self) -> None:
        """Idempotent."""
        shard, self.shard, self._launched = self.shard, None, None
        if shard is not None:
            shard.close()

    def _use_gpu(self) -> None:
        """Has the calling thread compute on this rank's GPU: each thread starts on the first that the process sees."""
        if self._spec.device != "cpu":
            import torch

            torch.cuda.set_device(torch.device(self._spec.device).index or 0)

    def _serve_transfers(self, shard: Shard) -> None:
        """Hands transfers to the shard, which runs them beside its steps: none of them waits for a step to end."""
        from headwise.workers.kv.transfer import decode_job

        try:
            while (payload := self._channel.receive_transfer()) is not None:
                shard.transfer(decode_job(payload))
        except BaseException as error:
            self._channel.fail(error)

    def _receive(self, shard: Shard) -> tuple[Kind, bytes] | None:
        """The next message. A step that is launched is finished meanwhile, once it is computed."""
        while self._launched is not None:
            rests = time.monotonic() < self._rest_until
            if self._launched.computed:
                self._finish(shard)
            elif (message := self._channel.receive(_RESTS_S if rests else 0)) is not None:
                return message
            elif not rests:
                time.sleep(_LOOKS_EVERY_S)
        return self._channel.receive(None)

    def _step(self, shard: Shard, plan: StepPlan) -> None:
        """Launches a step, where it can be before the one before it is finished: then a GPU goes from one to the other
        without a pause."""
        if self._launched is not None and self._launched.precedes(plan):
            self._finish(shard)
        launched = shard.launch(plan)
        self._finish(shard)
        self._launched = launched
        self._rest_until = time.monotonic() + self._step_s / 2

    def _finish(self, shard: Shard) -> None:
        """Waits for the step that is launched, if there is one, and sends what came of it."""
        from headwise.workers.plan import encode_output

        launched, self._launched = self._launched, None
        if launched is None:
            return
        output = shard.finish(launched)
        self._step_s = output.seconds
        dropped = failpoints.ENABLED and failpoints.hit(Point.RANK_REPLY, self._rank)
        if self._rank == 0 and not dropped:
            self._channel.send(Kind.OUTPUT, encode_output(output))

    def _serve_one(self, shard: Shard, kind: Kind, payload: bytes) -> None:
        from headwise.workers.plan import decode_plan

        if kind == Kind.STEP:
            self._step(shard, decode_plan(payload))
            return
        self._finish(shard)
        if kind == Kind.QUERY and payload.decode() in QUERIES:
            self._channel.send(Kind.REPLY, encode_reply(getattr(shard, payload.decode())))
        elif kind == Kind.ALLOCATE:
            self._channel.send(Kind.REPLY, encode_reply(partial(shard.allocate, *msgpack.unpackb(payload))))
        else:
            raise ValueError(f"rank {self._rank} got a message of kind {kind!r} it does not know: {payload[:40]!r}")
