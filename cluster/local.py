"""A group of one rank in the calling process. No Ray: for machines that have none, and for tests."""

from __future__ import annotations

import os
import queue
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from headwise.cluster.group import Progress, ShardGroup, ShardGroupDied
from headwise.workers.collectives import Solo
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.transfer import TransferJob, TransferResult
from headwise.workers.plan import StepOutput, StepPlan
from headwise.workers.shard import Shard
from headwise.workers.spec import ShardSpec


class LocalShardGroup(ShardGroup):
    """One rank, on a thread of its own from loading on.

    One thread for all of it, because OpenMP keeps a team of threads for each thread that computes: with a second
    team on the same cores, libgomp lets the waiting ones sleep instead of spin, and each of a step's hundreds of
    parallel regions would wait for them to wake (a third of the speed at batch 1).
    """

    def __init__(self, spec: ShardSpec, cpus: float | None = None) -> None:
        """Args: ``cpus``: threads to compute with; None is all cores.

        Raises:
            InvalidValueError: the spec asks for more than one rank.
        """
        if spec.tensor_parallel_size != 1:
            raise InvalidValueError(
                "tensor_parallel_size", spec.tensor_parallel_size, 'executor="local" has one rank', 'use executor="ray"'
            )
        self._spec, self._num_threads = spec, max(1, int(cpus or os.cpu_count() or 1))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="headwise-shard")
        self._shard: Shard | None = None
        self._outputs: deque[Future[StepOutput]] = deque()
        self._transferred: queue.SimpleQueue[TransferResult] = queue.SimpleQueue()

    def start(self, progress: Progress | None = None, num_blocks: int | None = None) -> int:
        return self._thread.submit(self._start, progress, num_blocks).result()

    def submit(self, plan: StepPlan) -> None:
        assert self._shard is not None, "start() comes first"
        self._outputs.append(self._thread.submit(self._shard.step, plan))

    def collect(self) -> StepOutput:
        try:
            return self._outputs.popleft().result()
        except Exception as error:
            raise ShardGroupDied(0, "localhost", f"{type(error).__name__}: {error}") from error

    def query(self, method: str) -> list[Any]:
        assert self._shard is not None, "start() comes first"
        return [self._thread.submit(getattr(self._shard, method)).result()]

    def transfer(self, job: TransferJob) -> None:
        assert self._shard is not None, "start() comes first"
        self._shard.transfer(job)

    def transferred(self, timeout_s: float) -> TransferResult | None:
        try:
            return self._transferred.get(timeout=timeout_s) if timeout_s else self._transferred.get_nowait()
        except queue.Empty:
            return None

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        if self._shard is not None:
            self._shard.close()
            self._shard = None

    def _start(self, progress: Progress | None, num_blocks: int | None) -> int:
        self._shard = Shard(self._spec, Solo(), self._num_threads, self._transferred.put)
        self._shard.load(progress)
        affordable = self._shard.affordable_blocks()
        blocks = min(affordable, num_blocks or affordable)
        self._shard.allocate(blocks)
        return blocks
