"""Who computes how many tokens this step.

There is no prefill phase and no decode phase: a request has tokens whose KV is not computed yet, many for a new
prompt, one while it decodes, and a step computes some of them under a token budget.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from headwise.runtime.engine.block_tables import BlockTables, Entry
from headwise.runtime.engine.request import FinishReason, Request, RequestState
from headwise.runtime.kv.eviction import CachedBlock
from headwise.workers.plan import MAX_ADMIT_BYTES, RowAdmit, StepPlan, admit_bytes


class Scheduled(NamedTuple):
    """One request's part in a step.

    Attributes:
        samples: whether the step gives it a token.
        num_computed: its tokens whose KV is computed once the step is done.
        attempt: the request's when the step was made; if it is another now, the step's token is void.
    """

    request: Request
    row: int
    samples: bool
    num_computed: int
    attempt: int

    @property
    def is_void(self) -> bool:
        """Whether the request has ended, or was started over, since."""
        return self.request.state is RequestState.FINISHED or self.attempt != self.request.attempt


@dataclass(frozen=True, slots=True)
class Schedule:
    """A step: the plan for the shards, and what the engine must know to read the output."""

    plan: StepPlan
    entries: list[Scheduled]


@dataclass(slots=True)
class _Draft:
    """A step being put together: how many more tokens it may compute, how many more bytes the requests that it admits
    may take in its plan, and what it does so far."""

    budget: int
    admit_bytes: int
    counts: dict[Request, int] = field(default_factory=dict)
    appends: dict[Request, list[int]] = field(default_factory=dict)
    admitted: list[Request] = field(default_factory=list)


class Scheduler:
    """Owns every request's state, row and blocks.

    Several steps may be in flight. A request that ends or is preempted meanwhile keeps its row and its blocks until
    the last of them is done, so that nothing else ever reads or hands on a block that a step still writes to.
    """

    def __init__(
        self,
        tables: BlockTables,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_mixed_prefill_tokens: int | None = None,
    ) -> None:
        """Args: the settings of :class:`~headwise.runtime.config.EngineConfig`; ``max_mixed_prefill_tokens`` None is
        no limit of its own."""
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first
        self.num_preemptions = 0
        self.num_restarts = 0
        self._leaving: list[Request] = []  # no longer running, but a step in flight still computes them
        self._tables, self._budget = tables, max_num_batched_tokens
        self._mixed_budget = max_mixed_prefill_tokens or max_num_batched_tokens
        # No more rows than tokens in a step: else those that decode could leave nothing for a prompt, for ever.
        self._free_rows = list(reversed(range(min(max_num_seqs, max_num_batched_tokens))))
        self._dropped: list[int] = []
        self._next_step = 0

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self) -> Schedule | None:
        """The next step, or None when there is nothing to compute, or nothing before a step in flight is done.

        Decodes come first, then prefill chunks, then requests that wait, the oldest first each time; what the shards
        must know of earlier changes travels along.
        """
        draft = _Draft(self._budget, MAX_ADMIT_BYTES)
        decodes: list[Request] = []
        prefills: list[Request] = []
        for request in self.running:
            if request.paused:
                continue
            (prefills if request.num_uncomputed > 1 else decodes).append(request)
        for request in decodes:
            self._compute(request, draft)
        if any(request.streamed for request in draft.counts):
            draft.budget = min(draft.budget, self._mixed_budget)
        for request in prefills:
            self._compute(request, draft)
        self._admit_waiting(draft)
        return self._build(draft) if draft.counts else None

    def complete(self, schedule: Schedule, failed: Collection[int] = ()) -> None:
        """The step is done, and is the oldest in flight; its tokens are the engine's to append.

        Args:
            failed: the rows whose logits were not finite. Whoever computed with what such a request shared is started
                over, and so is one that failed itself, but on blocks of another that nobody has verified: what this
                step sampled for them is void. The others are the engine's to end.
        """
        self._fail([entry for entry in schedule.entries if entry.row in failed and entry.samples])
        for entry in schedule.entries:
            request = entry.request
            request.num_in_flight -= 1
            if entry.attempt == request.attempt:
                request.num_pending -= entry.samples
                if entry.samples and entry.row not in failed:
                    self._tables.verify(request, entry.num_computed)
        for request in [r for r in self._leaving if not r.num_in_flight]:
            self._leaving.remove(request)
            self._release(request)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Ends a request, in whatever state it is. Idempotent."""
        if request.state is RequestState.FINISHED:
            return
        running = request.state is RequestState.RUNNING
        request.state, request.finish_reason = RequestState.FINISHED, reason
        request.metrics.finished = time.monotonic()
        if running:
            self._leave(request, share=reason is not FinishReason.ERROR)
        else:
            self.waiting.remove(request)

    def check_integrity(self) -> None:
        """
        Raises:
            IntegrityError: the books of the blocks do not agree with each other, or with what requests hold.
        """
        self._tables.cache.check_integrity(self._tables.computing([*self.running, *self._leaving]))
        if self._tables.tiers is not None:
            self._tables.tiers.check_integrity()

    def _compute(self, request: Request, draft: _Draft) -> None:
        """Gives a running request its part of the step, if there is budget and are blocks."""
        count = min(request.num_uncomputed, draft.budget)
        if count <= 0 or request.state is not RequestState.RUNNING:  # preempted for an older one, just now
            return
        target = request.num_computed + count
        missing = self._tables.missing(request, target)
        if missing > 0:
            if not self._make_room(request, missing, draft):
                return
            draft.appends[request] = self._tables.grow(request, target)
        draft.counts[request] = count
        draft.budget -= count

    def _make_room(self, request: Request, missing: int, draft: _Draft) -> bool:
        """Preempts the newest, ``request`` itself at last, until so many blocks are free or soon will be; returns
        whether they are free now."""
        cache = self._tables.cache
        while missing > cache.num_available + sum(len(r.block_ids) for r in self._leaving):
            victim = self._newest_paused() or self.running[-1]
            self._preempt(victim)
            draft.budget += draft.counts.pop(victim, 0)
            draft.appends.pop(victim, None)
            if victim is request:
                return False
        return missing <= cache.num_available

    def _admit_waiting(self, draft: _Draft) -> None:
        later: list[Request] = []
        while self.waiting and draft.budget > 0:
            request = self.waiting[0]
            if request.paused:
                later.append(self.waiting.popleft())
                continue
            # A preempted request waits for its tokens in flight: the shards get them with its admission.
            if request.num_in_flight:
                break
            size = admit_bytes(request.num_tokens, request.sampling)
            if draft.admitted and size > draft.admit_bytes:
                break
            entry = self._tables.enter(request) if self._free_rows else Entry.NO_ROOM
            if entry is Entry.NO_ROOM:
                if (victim := self._newest_paused()) is None:
                    break
                self._preempt(victim)
                later.append(self.waiting.popleft())
                if victim.num_in_flight:  # its place is free once that is done
                    break
                continue
            self.waiting.popleft()
            if entry is Entry.LATER:
                later.append(request)
                continue
            self.running.append(request)
            request.state, request.row = RequestState.RUNNING, self._free_rows.pop()
            request.metrics.first_scheduled = request.metrics.first_scheduled or time.monotonic()
            draft.counts[request] = min(request.num_uncomputed, draft.budget)
            draft.budget -= draft.counts[request]
            draft.admit_bytes -= size
            draft.admitted.append(request)
        self.waiting.extendleft(reversed(later))

    def _build(self, draft: _Draft) -> Schedule:
        plan = StepPlan(self._next_step, drops=self._dropped)
        self._next_step += 1
        self._dropped = []
        for request in draft.admitted:
            tokens = request.prompt_token_ids + request.generated
            admit = RowAdmit(
                request.row,
                tokens,
                len(request.prompt_token_ids),
                request.num_computed,
                list(request.block_ids),
                request.sampling,
            )
            plan.admits.append(admit)
        plan.appends = [(request.row, block) for request, blocks in draft.appends.items() for block in blocks]
        entries: list[Scheduled] = []
        for request, count in draft.counts.items():
            plan.computes.append((request.row, count))
            request.num_computed += count
            samples = request.num_computed == request.num_tokens
            request.num_pending += samples
            request.num_in_flight += 1
            entries.append(Scheduled(request, request.row, samples, request.num_computed, request.attempt))
            self._tables.share(request)
        return Schedule(plan, entries)

    def _fail(self, entries: Sequence[Scheduled]) -> None:
        """Takes back what rows that are not finite have shared, and starts over whoever relied on it."""
        ended: list[Request] = []
        withdrawn: set[CachedBlock] = set()
        failed = [entry.request for entry in entries if entry.attempt == entry.request.attempt]
        for entry in entries:
            if entry.request not in failed:
                continue
            taken, relied = self._tables.fail(entry.request, failed)
            withdrawn |= taken
            if entry.is_void:
                continue
            if relied:
                entry.request.only_verified = True
                self._start_over(entry.request)
            else:
                ended.append(entry.request)
        for request in [*self.running, *self._leaving]:
            if request not in ended and not withdrawn.isdisjoint(request.chain[: request.num_matched]):
                self._start_over(request)

    def _newest_paused(self) -> Request | None:
        """Whose place others may have: nothing is computed for it anyway."""
        return next((request for request in reversed(self.running) if request.paused), None)

    def _preempt(self, request: Request) -> None:
        """Takes everything from a running request; its tokens are computed again when there is room."""
        self._leave(request, share=True)
        self._wait_again(request)
        request.metrics.num_preemptions += 1
        self.num_preemptions += 1

    def _start_over(self, request: Request) -> None:
        """As preempting, but what is computed of it is not to be trusted, nor are its tokens in flight."""
        if request.state is RequestState.RUNNING:
            self._leave(request, share=False)
            self._wait_again(request)
        request.attempt += 1
        request.num_pending = 0
        self.num_restarts += 1

    def _wait_again(self, request: Request) -> None:
        request.state, request.num_computed = RequestState.WAITING, 0
        self.waiting.appendleft(request)

    def _leave(self, request: Request, share: bool) -> None:
        """``share``: keep what it computed for others."""
        if share:
            self._tables.share(request)
        self.running.remove(request)
        if request.num_in_flight:
            self._leaving.append(request)
        else:
            self._release(request)

    def _release(self, request: Request) -> None:
        self._tables.leave(request)
        self._dropped.append(request.row)
        self._free_rows.append(request.row)
        request.row = -1
