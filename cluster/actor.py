"""The Ray actor that holds one shard. It is imported before torch is: its own imports stay light."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

import msgpack
import ray

from headwise.cluster.channel import Kind, ShardChannel, ShardEndpoint

if TYPE_CHECKING:
    from headwise.workers.collectives import Rendezvous
    from headwise.workers.shard import Shard
from headwise.workers.spec import ShardSpec

QUERIES = ("stats", "stored_blocks")
"""The methods of Shard that a group may ask every rank for."""


class ShardActor:
    """One rank. The group calls :meth:`load`, :meth:`allocate` and :meth:`run`, which returns when the group closes."""

    def __init__(self, rank: int, spec: ShardSpec, num_threads: int) -> None:
        # The thread pools of OpenMP, MKL and Numba read these once, when torch and numba are imported.
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
            os.environ[name] = str(num_threads)
        self._rank, self._spec, self._num_threads = rank, spec, num_threads
        self._shard: Shard | None = None
        self._rendezvous: Rendezvous | None = None

    def place(self) -> dict[str, Any]:
        """Where this rank runs."""
        return {
            "node_id": ray.get_runtime_context().get_node_id(),
            "address": ray.util.get_node_ip_address(),
            "pid": os.getpid(),
        }

    def open_rendezvous(self, kind: str, host: str) -> dict[str, Any]:
        """Rank 0: binds where the ranks meet, and tells where that is."""
        from headwise.workers import collectives

        self._rendezvous = collectives.open_rendezvous(kind, self._spec.tensor_parallel_size, host)
        return self._rendezvous.publish()

    def load(self, endpoint: ShardEndpoint, published: dict[str, Any], timeout_s: float) -> int:
        """Meets the other ranks and loads the weights; returns how many KV blocks this rank affords."""
        from headwise.workers import collectives
        from headwise.workers.kv.transfer import encode_result
        from headwise.workers.shard import Shard
        from headwise.workers.warmup import WarmUpError, ensure_warm

        if self._spec.device == "cpu":
            with contextlib.suppress(WarmUpError):
                ensure_warm()  # has been done where the engine is, which may be another machine
        self._channel = ShardChannel(endpoint)
        rendezvous = self._rendezvous or published
        peers = collectives.connect(
            rendezvous, self._rank, self._spec.tensor_parallel_size, timeout_s, self._spec.device
        )
        self._rendezvous = None
        send = self._channel.sender()
        self._shard = Shard(
            self._spec,
            peers,
            self._num_threads,
            lambda result: send(Kind.TRANSFERRED, encode_result(result)),
        )
        self._shard.load(self._report if self._rank == 0 else None)
        return self._shard.affordable_blocks()

    def allocate(self, num_blocks: int) -> None:
        """Takes the KV memory; the same number of blocks on every rank."""
        assert self._shard is not None, "load() comes first"
        self._shard.allocate(num_blocks)

    def run(self) -> None:
        """Serves the step channel until the group closes it; an error is reported to the engine and the peers."""
        assert self._shard is not None, "load() comes first"
        try:
            while True:
                message = self._channel.receive(None)
                if message is None or message[0] == Kind.CLOSE:
                    break
                self._serve(self._shard, *message)
        except BaseException as error:
            self._fail(self._shard, error)
            raise
        finally:
            self._shard.close()
            self._channel.close()

    def _serve(self, shard: Shard, kind: Kind, payload: bytes) -> None:
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

    def _fail(self, shard: Shard, error: BaseException) -> None:
        from headwise.workers.errors import PeerDiedError

        dead = error.rank if isinstance(error, PeerDiedError) else self._rank
        cause = error.cause if isinstance(error, PeerDiedError) else f"{type(error).__name__}: {error}"
        shard.abort(cause)
        self._channel.send(Kind.ERROR, msgpack.packb((dead, cause)))

    def _report(self, done: int, total: int) -> None:
        self._channel.send(Kind.PROGRESS, msgpack.packb((done, total)))
