"""What a group of shards looks like to an engine, wherever its ranks run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from headwise.workers.errors import HeadwiseError
from headwise.workers.kv.handoff import HandoffJob
from headwise.workers.kv.transfer import TransferJob, TransferResult
from headwise.workers.plan import StepOutput, StepPlan

Progress = Callable[[int, int], None]
"""Gets (layers loaded, layers)."""


class ShardGroupDied(HeadwiseError):
    """A rank of the group is gone; the whole group is, since no rank can step without the others.

    Attributes:
        rank, node: None where the group has ended for no rank's sake, as when it is closed.
        own_error: whether the rank itself has met an error and said so; else something has ended it, or made it hang.
    """

    def __init__(self, rank: int | None, node: str | None, cause: str, own_error: bool = False) -> None:
        self.rank, self.node, self.cause, self.own_error = rank, node, cause, own_error
        who = "the shard group has ended" if rank is None else f"rank {rank} on node {node} died"
        super().__init__(f"{who}: {cause}")

    def __reduce__(self) -> tuple[type[ShardGroupDied], tuple[int | None, str | None, str, bool]]:
        return type(self), (self.rank, self.node, self.cause, self.own_error)


class GroupStartError(HeadwiseError):
    """The group could not be placed or started; the message says what was wanted and what there is."""


class NoRoomError(GroupStartError):
    """What the cluster has free is too little, and may be enough once others have ended."""


class ShardGroup(ABC):
    """All ranks of one tensor-parallel model: the unit of placement and of failure.

    An engine calls :meth:`load` and :meth:`allocate` once, then :meth:`submit` and :meth:`collect` in pairs, with as
    many plans in flight as it likes: every rank runs its plans in the order of submission. :meth:`close` may be called
    at any time, on any thread, more than once, and leaves nothing behind; whoever waits for the group gets
    ShardGroupDied.
    """

    def start(self, progress: Progress | None = None, num_blocks: int | None = None) -> int:
        """:meth:`load`, then :meth:`allocate`."""
        self.load(progress)
        return self.allocate(num_blocks)

    @abstractmethod
    def load(self, progress: Progress | None = None) -> None:
        """Places and connects every rank, and loads the weights. A group may wait in this state for as long as it
        likes; :attr:`death` tells whether it still lives.

        Raises:
            GroupStartError, ShardGroupDied, CheckpointError, InvalidValueError.
        """

    @abstractmethod
    def allocate(self, num_blocks: int | None = None, in_haste: bool = False) -> int:
        """Takes the KV memory of every rank; returns the number of KV blocks each of them has, 0 if ``kv_memory``
        affords none.

        Args:
            num_blocks: so many, where ``kv_memory`` affords more.
            in_haste: streams wait: most of the memory is taken beside the steps.

        Raises:
            ShardGroupDied, InvalidValueError.
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
    def query(self, method: str) -> list[Any]:
        """What one of :class:`~headwise.workers.shard.Shard`'s argument-free methods returns on every rank, in rank
        order. No plan may be in flight.

        Raises:
            ShardGroupDied: as :meth:`collect`.
        """

    @abstractmethod
    def transfer(self, job: TransferJob | HandoffJob) -> None:
        """Hands every rank KV blocks to move beside the steps; does not wait for it.

        Jobs of one tier run in the order of submission, and in no order with plans: no plan in flight, and none
        submitted before the job is done, may write to a block that is loaded or rely on it.
        """

    @abstractmethod
    def transferred(self, timeout_s: float) -> TransferResult | None:
        """The next result of a rank for one of its jobs, waited for at most so long, and not once :meth:`wake` is
        called; None if none has come. A job is done when every rank's result is there.

        Raises:
            ShardGroupDied: as :meth:`collect`.
        """

    @property
    def places(self) -> list[tuple[str, int]]:
        """The node and the process id of each rank, by rank; empty before :meth:`load`. May be read on any thread."""
        return []

    def wake(self) -> None:  # noqa: B027 - for groups that wait for something in transferred()
        """Lets a :meth:`transferred` that waits return None. May be called on any thread."""

    @property
    def death(self) -> ShardGroupDied | None:
        """What ended the group, as far as that is noticed without a call. May be read on any thread."""
        return None

    def give_up(self, cause: str) -> None:  # noqa: B027 - for groups whose ranks may hang
        """Counts the group as dead, whose ranks make no progress: whoever waits for it gets ShardGroupDied. May be
        called on any thread."""

    def hurry(self) -> None:  # noqa: B027 - for groups whose close() waits long
        """Has :meth:`close`, now or later, wait only a moment for what a rank is at, which may never end. May be called
        on any thread."""

    @abstractmethod
    def close(self) -> None:
        """Ends every rank and removes what the group made."""


class GroupFactory(ABC):
    """Makes the groups of one engine one after another, on resources that outlive each of them."""

    @abstractmethod
    def make(self) -> ShardGroup:
        """A group that is not started yet. Those made before must be closed, or stay in the state of
        :meth:`ShardGroup.load` until they are the only one; a group on GPUs must be the only one.

        Raises:
            NoRoomError: there is no room for its ranks.
        """

    @abstractmethod
    def close(self) -> None:
        """Gives the resources back; the last group must be closed. Idempotent."""
