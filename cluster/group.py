"""What a group of shards looks like to an engine, wherever its ranks run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from headwise.workers.errors import HeadwiseError
from headwise.workers.plan import StepOutput, StepPlan

Progress = Callable[[int, int], None]
"""Gets (layers loaded, layers)."""


class ShardGroupDied(HeadwiseError):
    """A rank of the group is gone; the whole group is, since no rank can step without the others."""

    def __init__(self, rank: int, node: str, cause: str) -> None:
        self.rank, self.node, self.cause = rank, node, cause
        super().__init__(f"rank {rank} on node {node} died: {cause}")

    def __reduce__(self) -> tuple[type[ShardGroupDied], tuple[int, str, str]]:
        return type(self), (self.rank, self.node, self.cause)


class GroupStartError(HeadwiseError):
    """The group could not be placed or started; the message says what was wanted and what there is."""


class ShardGroup(ABC):
    """All ranks of one tensor-parallel model: the unit of placement and of failure.

    An engine calls :meth:`start` once, then :meth:`submit` and :meth:`collect` in pairs, with as many plans in
    flight as it likes: every rank runs its plans in the order of submission. :meth:`close` may be called at any
    time, more than once, and leaves nothing behind.
    """

    @abstractmethod
    def start(self, progress: Progress | None = None, num_blocks: int | None = None) -> int:
        """Places, connects and loads every rank; returns the number of KV blocks each of them has.

        Args:
            num_blocks: so many, where ``kv_memory`` affords more.

        Raises:
            GroupStartError, ShardGroupDied, CheckpointError, InvalidValueError.
        """

    @abstractmethod
    def submit(self, plan: StepPlan) -> None:
        """Hands every rank a plan; does not wait for it."""

    @abstractmethod
    def collect(self) -> StepOutput:
        """Waits for the output of the oldest plan that was not collected.

        Raises:
            ShardGroupDied: a rank died or failed; the group is of no more use but to be closed.
        """

    @abstractmethod
    def call(self, method: str) -> list[Any]:
        """Runs one of :class:`~headwise.workers.shard.Shard`'s argument-free methods on every rank, after every
        plan submitted before; returns the answers in rank order. No plan may be in flight."""

    @abstractmethod
    def close(self) -> None:
        """Ends every rank and removes what the group made."""
