"""Ledger: the jobs in flight that move KV blocks, and what becomes of each once every rank is done with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from headwise.workers.kv.handoff import HandoffJob
from headwise.workers.kv.transfer import BlockKey, Op, Tier, TransferJob, TransferResult

MAX_BATCH = 64
"""Most blocks of a job that copies to a tier: a restore waits for the jobs before it."""

MAX_KEYS = 8192
"""Most blocks of a message to the ranks; with blocks of 1,024 tokens it has half the bytes that a message may have."""


class Outcome(NamedTuple):
    """What came of a job.

    Attributes:
        failed: the digests of the blocks that at least one rank did not move.
        void: :meth:`Ledger.void` was called meanwhile: what was moved is of no use to anybody.
        seconds: of the slowest rank's work.
        error: of a job of a handoff: why it failed on the first rank that said so; empty if it did not.
        num_bytes: that the ranks have sent or received, all together.
        latency_s: from the start of the job to here, without those.
    """

    failed: frozenset[bytes]
    void: bool
    seconds: float
    latency_s: float
    error: str = ""
    num_bytes: int = 0


@dataclass(slots=True)
class _Job:
    """
    Attributes:
        missing: results that have not come, of each rank for each message.
        seconds: of the slowest rank so far, by message.
    """

    done: Callable[[Outcome], None]
    missing: int
    failed: set[bytes] = field(default_factory=set)
    seconds: dict[int, float] = field(default_factory=dict)
    void: bool = False
    error: str = ""
    num_bytes: int = 0
    on_error: Callable[[str], None] | None = None
    started: float = field(default_factory=time.monotonic)

    def add(self, result: TransferResult) -> None:
        self.missing -= 1
        self.failed.update(result.failed)
        if result.error and not self.error:
            self.error = result.error
            if self.on_error is not None:
                self.on_error(result.error)
        self.num_bytes += result.num_bytes
        self.seconds[result.id] = max(result.seconds, self.seconds.get(result.id, 0.0))

    def outcome(self) -> Outcome:
        seconds = sum(self.seconds.values())
        latency_s = max(0.0, time.monotonic() - self.started - seconds)
        return Outcome(frozenset(self.failed), self.void, seconds, latency_s, self.error, self.num_bytes)


class Ledger:
    """Sends jobs to every rank of a group, and puts the ranks' results together. A job is done when every rank is.

    A job of many blocks goes as several messages, and blocks that are to be dropped one by one go together. Used on the
    engine's thread only.
    """

    def __init__(
        self,
        send: Callable[[TransferJob | HandoffJob], None],
        receive: Callable[[float], TransferResult | None],
        num_ranks: int,
    ) -> None:
        """
        Args:
            send: hands a message to every rank; does not wait for it.
            receive: the next result of a rank, waited for at most so many seconds; None if there is none.
        """
        self._send, self._receive, self._num_ranks = send, receive, num_ranks
        self._jobs: dict[int, _Job] = {}  # by the number of each message
        self._drops: dict[Tier, list[BlockKey]] = {}  # not sent yet
        self._next_id = 0
        self._heard = time.monotonic()

    @property
    def silent_s(self) -> float:
        """For how long jobs have been in flight without a rank's result; 0 if none are."""
        return time.monotonic() - self._heard if self._jobs else 0.0

    def heard(self) -> None:
        """The ranks are known to live now."""
        self._heard = time.monotonic()

    @property
    def busy(self) -> bool:
        """Whether a job is in flight, or to be sent."""
        return bool(self._jobs or self._drops)

    def start(
        self,
        op: Op,
        tier: Tier,
        keys: Sequence[BlockKey],
        blocks: Sequence[int] = (),
        done: Callable[[Outcome], None] = lambda outcome: None,
    ) -> None:
        """Starts a job; jobs of one tier run in the order they are started, and after what was dropped before.

        Args:
            keys: at least one.
            blocks: on the device, one for each key; none for DEMOTE and DROP.
            done: called once the job is done, void or not.
        """
        if drops := self._drops.pop(tier, None):
            self.start(Op.DROP, tier, drops)
        if not self._jobs:
            self.heard()
        starts = range(0, len(keys), MAX_KEYS)
        job = _Job(done, len(starts) * self._num_ranks)
        for at in starts:
            self._jobs[self._next_id] = job
            part = slice(at, at + MAX_KEYS)
            self._send(TransferJob(self._next_id, op, tier, list(keys[part]), list(blocks[part])))
            self._next_id += 1

    def hand_over(
        self, job: HandoffJob, done: Callable[[Outcome], None], on_error: Callable[[str], None] | None = None
    ) -> None:
        """Starts a job of a handoff, which gets its number here.

        Args:
            done: called once every rank is done with it.
            on_error: called when the first rank has failed, which others may not know yet.
        """
        if not self._jobs:
            self.heard()
        self._jobs[self._next_id] = _Job(done, self._num_ranks, on_error=on_error)
        self._send(replace(job, id=self._next_id))
        self._next_id += 1

    def drop(self, tier: Tier, keys: Iterable[BlockKey]) -> None:
        """Has the ranks forget a tier's blocks: by :meth:`flush`, or before the tier's next job."""
        if keys := list(keys):
            self._drops.setdefault(tier, []).extend(keys)

    def flush(self) -> None:
        """Sends what is to be dropped."""
        while self._drops:
            tier, keys = self._drops.popitem()
            self.start(Op.DROP, tier, keys)

    def poll(self, timeout_s: float = 0.0) -> None:
        """Finishes the jobs that are done; waits for the first result at most ``timeout_s``. Then sends what is to be
        dropped."""
        while (self._jobs or timeout_s) and (result := self._receive(timeout_s)) is not None:
            timeout_s = 0.0
            self.heard()
            job = self._jobs[result.id]
            job.add(result)
            if not job.missing:
                for number in job.seconds:
                    del self._jobs[number]
                job.done(job.outcome())
        self.flush()

    def void(self) -> None:
        """What the jobs in flight move is of no use any more; each is done when every rank is, all the same."""
        for job in self._jobs.values():
            job.void = True
