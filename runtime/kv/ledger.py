"""Ledger: the jobs in flight that move KV blocks, and what becomes of each once every rank is done with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from headwise.workers.kv.transfer import BlockKey, Op, Tier, TransferJob, TransferResult

MAX_BATCH = 64
"""Most blocks of a job that copies to a tier: a restore waits for the jobs before it."""


class Outcome(NamedTuple):
    """What came of a job.

    Attributes:
        failed: the digests of the blocks that at least one rank did not move.
        void: :meth:`Ledger.void` was called meanwhile: what was moved is of no use to anybody.
        seconds: of the slowest rank's work.
        latency_s: from the start of the job to here, without those.
    """

    failed: frozenset[bytes]
    void: bool
    seconds: float
    latency_s: float


@dataclass(slots=True)
class _Job:
    done: Callable[[Outcome], None]
    results: list[TransferResult] = field(default_factory=list)
    void: bool = False
    started: float = field(default_factory=time.monotonic)


class Ledger:
    """Sends jobs to every rank of a group, and puts the ranks' results together. A job is done when every rank is.

    Used on the engine's thread only.
    """

    def __init__(
        self,
        send: Callable[[TransferJob], None],
        receive: Callable[[float], TransferResult | None],
        num_ranks: int,
    ) -> None:
        """
        Args:
            send: hands a job to every rank; does not wait for it.
            receive: the next result of a rank, waited for at most so many seconds; None if there is none.
        """
        self._send, self._receive, self._num_ranks = send, receive, num_ranks
        self._jobs: dict[int, _Job] = {}
        self._next_id = 0

    @property
    def busy(self) -> bool:
        """Whether a job is in flight."""
        return bool(self._jobs)

    def start(
        self,
        op: Op,
        tier: Tier,
        keys: list[BlockKey],
        blocks: Sequence[int] = (),
        done: Callable[[Outcome], None] = lambda outcome: None,
    ) -> None:
        """Starts a job; jobs of one tier run in the order they are started.

        Args:
            blocks: on the device, one for each key; none for DEMOTE and DROP.
            done: called once the job is done, void or not.
        """
        self._jobs[self._next_id] = _Job(done)
        self._send(TransferJob(self._next_id, op, tier, keys, list(blocks)))
        self._next_id += 1

    def poll(self, timeout_s: float = 0.0) -> None:
        """Finishes the jobs that are done; waits for the first result at most ``timeout_s`` if a job is in flight."""
        while self._jobs and (result := self._receive(timeout_s)) is not None:
            timeout_s = 0.0
            job = self._jobs[result.id]
            job.results.append(result)
            if len(job.results) == self._num_ranks:
                del self._jobs[result.id]
                job.done(_outcome(job))

    def void(self) -> None:
        """What the jobs in flight move is of no use any more; each is done when every rank is, all the same."""
        for job in self._jobs.values():
            job.void = True


def _outcome(job: _Job) -> Outcome:
    failed = frozenset(digest for result in job.results for digest in result.failed)
    seconds = max(result.seconds for result in job.results)
    return Outcome(failed, job.void, seconds, max(0.0, time.monotonic() - job.started - seconds))
