"""The Ray actor that holds one rank. It is imported before torch is: its own imports stay light."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgpack
import psutil
import ray

from headwise.cluster.channel import Kind
from headwise.cluster.engine_watch import EngineProcess, EngineWatch
from headwise.cluster.rank import Rank
from headwise.cluster.zmq_channel import ShardEndpoint, ZmqShardChannel
from headwise.workers.errors import InvalidValueError
from headwise.workers.machine import usable_cores
from headwise.workers.processes import ProcessId
from headwise.workers.spec import ShardSpec

if TYPE_CHECKING:
    from headwise.workers.collectives import Rendezvous


def index_of_gpu(ids: Sequence[str], visible: str | None) -> int:
    """Which of the GPUs that this process sees is the one that Ray has given to it.

    Ray leaves a process only its own to see, which is then the first, unless
    RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1 tells it not to.

    Args:
        ids: of the GPUs that Ray has given, as it writes them.
        visible: the value of CUDA_VISIBLE_DEVICES, None where that is not set.

    Raises:
        InvalidValueError: the process does not see it, or Ray has given another number of them.
    """
    seen = visible.split(",") if visible is not None else None
    if len(ids) != 1 or (seen is not None and ids[0] not in seen):
        limit = f"a rank computes on one GPU that it sees, and Ray has given it {list(ids)}"
        raise InvalidValueError("CUDA_VISIBLE_DEVICES", visible, limit, "unset it where Ray starts")
    return int(ids[0]) if seen is None else seen.index(ids[0])


class ShardActor:
    """One rank. The group calls :meth:`load` and :meth:`run`, which returns when the group closes."""

    def __init__(self, rank: int, spec: ShardSpec, num_threads: int, engine: EngineProcess) -> None:
        """Args: ``engine``: with whose process this one ends."""
        num_threads = min(num_threads, usable_cores())  # Ray may have been told of more CPUs than there are
        # The thread pools of OpenMP, MKL and Numba read these once, when torch and numba are imported.
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
            os.environ[name] = str(num_threads)
        self._spec, self._number, self._num_threads = spec, rank, num_threads
        self._rendezvous: Rendezvous | None = None
        self._meeting: dict[str, Any] | None = None
        self._watch = EngineWatch(engine, self._leave)

    def place(self) -> dict[str, Any]:
        """Where this rank runs."""
        return {
            "node_id": ray.get_runtime_context().get_node_id(),
            "address": ray.util.get_node_ip_address(),
            "pid": os.getpid(),
            "born": psutil.Process().create_time(),
            "process": ProcessId.of(os.getpid()),
        }

    def open_rendezvous(self, kind: str, host: str) -> dict[str, Any]:
        """Rank 0: binds where the ranks meet, and tells where that is."""
        from headwise.workers import collectives

        self._rendezvous = collectives.open_rendezvous(kind, self._spec.tensor_parallel_size, host)
        self._meeting = self._rendezvous.publish()
        return self._meeting

    def load(
        self,
        endpoint: ShardEndpoint,
        published: dict[str, Any],
        timeout_s: float,
        ranks_on_host: Sequence[int],
        processes: Sequence[ProcessId],
    ) -> None:
        """As :meth:`Rank.load <headwise.cluster.rank.Rank.load>`; progress goes over the channel.

        Args:
            processes: of all ranks; those on this host end with the engine.

        Raises:
            InvalidValueError: also where this process does not see the GPU that Ray has given to it.
        """
        from headwise.workers.warmup import WarmUpError, ensure_warm

        self._watch.end_with(processes)
        self._meeting = published
        if self._spec.device == "cpu":
            with contextlib.suppress(WarmUpError):
                ensure_warm()  # has been done where the engine is, which may be another machine
        self._rank = Rank(self._placed_spec(), self._number, self._num_threads)
        channel = self._channel = ZmqShardChannel(endpoint)
        rendezvous, self._rendezvous = self._rendezvous, None
        self._rank.load(
            channel,
            rendezvous or published,
            timeout_s,
            lambda done, total: channel.send(Kind.PROGRESS, msgpack.packb((done, total))),
            ranks_on_host,
        )

    def run(self) -> None:
        """Serves the step channel until the group closes it."""
        try:
            self._rank.serve()
        finally:
            self._channel.close()

    def _placed_spec(self) -> ShardSpec:
        """With the GPU that Ray has given to this process."""
        if self._spec.device != "cuda":
            return self._spec
        ids = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        return replace(self._spec, device=f"cuda:{index_of_gpu(ids, os.environ.get('CUDA_VISIBLE_DEVICES'))}")

    def _leave(self) -> None:
        """Removes where the ranks meet, if they have not met."""
        if self._meeting is not None:
            from headwise.workers.collectives import Rendezvous

            Rendezvous(**self._meeting).close()
