"""A group of one rank in the calling process. No Ray: for machines that have none, and for tests."""

from __future__ import annotations

import os
from collections import deque
from typing import Any

from headwise.cluster.group import Progress, ShardGroup, ShardGroupDied
from headwise.workers.collectives import Solo
from headwise.workers.errors import InvalidValueError
from headwise.workers.plan import StepOutput, StepPlan
from headwise.workers.shard import Shard, ShardSpec


class LocalShardGroup(ShardGroup):
    """One rank; a plan is computed when it is submitted."""

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
        self._shard: Shard | None = None
        self._outputs: deque[StepOutput] = deque()

    def start(self, progress: Progress | None = None, num_blocks: int | None = None) -> int:
        self._shard = Shard(self._spec, Solo(), self._num_threads)
        self._shard.load(progress)
        affordable = self._shard.affordable_blocks()
        blocks = min(affordable, num_blocks or affordable)
        self._shard.allocate(blocks)
        return blocks

    def submit(self, plan: StepPlan) -> None:
        assert self._shard is not None, "start() comes first"
        try:
            self._outputs.append(self._shard.step(plan))
        except Exception as error:
            raise ShardGroupDied(0, "localhost", f"{type(error).__name__}: {error}") from error

    def collect(self) -> StepOutput:
        return self._outputs.popleft()

    def call(self, method: str) -> list[Any]:
        assert self._shard is not None, "start() comes first"
        return [getattr(self._shard, method)()]

    def close(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None
