"""Who computes how many tokens this step.

There is no prefill phase and no decode phase: a request has tokens whose KV is not computed yet, many for a new
prompt, one while it decodes, and a step computes some of them under a token budget.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from headwise.runtime.kv.blocks import BlockPool
from headwise.runtime.request import FinishReason, Request, RequestState
from headwise.workers.plan import RowAdmit, StepPlan


class Scheduled(NamedTuple):
    """One request's part in a step. ``samples``: whether the step gives it a token."""

    request: Request
    row: int
    samples: bool


@dataclass(frozen=True, slots=True)
class Schedule:
    """A step: the plan for the shards, and what the engine must know to read the output."""

    plan: StepPlan
    entries: list[Scheduled]


@dataclass(slots=True)
class _Draft:
    """A step being put together: how many more tokens it may compute, and what it does so far."""

    budget: int
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
        pool: BlockPool,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_mixed_prefill_tokens: int | None = None,
    ) -> None:
        """Args: the settings of :class:`~headwise.runtime.config.EngineConfig`; ``max_mixed_prefill_tokens`` None is
        no limit of its own."""
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first
        self.num_preemptions = 0
        self._leaving: list[Request] = []  # no longer running, but a step in flight still computes them
        self._pool, self._block_size, self._budget = pool, block_size, max_num_batched_tokens
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
        draft = _Draft(self._budget)
        decodes: list[Request] = []
        prefills: list[Request] = []
        for request in self.running:
            (prefills if request.num_uncomputed > 1 else decodes).append(request)
        for request in decodes:
            self._compute(request, draft)
        if any(request.streamed for request in draft.counts):
            draft.budget = min(draft.budget, self._mixed_budget)
        for request in prefills:
            self._compute(request, draft)
        self._admit_waiting(draft)
        return self._build(draft) if draft.counts else None

    def complete(self, schedule: Schedule) -> None:
        """The step is done, and is the oldest in flight; its tokens are the engine's to append."""
        for request, _, samples in schedule.entries:
            request.num_in_flight -= 1
            request.num_pending -= samples
        for request in [r for r in self._leaving if not r.num_in_flight]:
            self._leaving.remove(request)
            self._release(request)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Ends a request, in whatever state it is. Idempotent."""
        if request.state is RequestState.FINISHED:
            return
        if request.state is RequestState.RUNNING:
            self._leave(request)
        else:
            self.waiting.remove(request)
        request.state, request.finish_reason = RequestState.FINISHED, reason
        request.metrics.finished = time.monotonic()

    def _compute(self, request: Request, draft: _Draft) -> None:
        """Gives a running request its part of the step, if there is budget and are blocks."""
        count = min(request.num_uncomputed, draft.budget)
        if count <= 0 or request.state is not RequestState.RUNNING:  # preempted for an older one, just now
            return
        missing = self._blocks_for(request.num_computed + count) - len(request.block_ids)
        if missing > 0:
            if not self._make_room(request, missing, draft):
                return
            draft.appends[request] = self._pool.allocate(missing, request.key)
            request.block_ids += draft.appends[request]
        draft.counts[request] = count
        draft.budget -= count

    def _make_room(self, request: Request, missing: int, draft: _Draft) -> bool:
        """Preempts the newest, ``request`` itself at last, until so many blocks are free or soon will be; returns
        whether they are free now."""
        while missing > self._pool.num_free + sum(len(r.block_ids) for r in self._leaving):
            victim = self.running[-1]
            self._preempt(victim)
            draft.budget += draft.counts.pop(victim, 0)
            draft.appends.pop(victim, None)
            if victim is request:
                return False
        return missing <= self._pool.num_free

    def _admit_waiting(self, draft: _Draft) -> None:
        while self.waiting and self._free_rows and draft.budget > 0:
            request = self.waiting[0]
            # A preempted request waits for its tokens in flight: the shards get them with its admission.
            if request.num_in_flight:
                return
            # Blocks for all its tokens and the next one, so that no prefill is preempted half-way by a later one.
            needed = self._blocks_for(request.num_tokens + 1)
            if needed > self._pool.num_free:
                return
            self.waiting.popleft()
            self.running.append(request)
            request.state, request.row = RequestState.RUNNING, self._free_rows.pop()
            request.block_ids = self._pool.allocate(needed, request.key)
            request.metrics.first_scheduled = request.metrics.first_scheduled or time.monotonic()
            draft.counts[request] = min(request.num_uncomputed, draft.budget)
            draft.budget -= draft.counts[request]
            draft.admitted.append(request)

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
            entries.append(Scheduled(request, request.row, samples))
        return Schedule(plan, entries)

    def _preempt(self, request: Request) -> None:
        """Takes everything from a running request; its tokens are computed again when there is room."""
        self._leave(request)
        request.state, request.num_computed = RequestState.WAITING, 0
        request.metrics.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(request)

    def _leave(self, request: Request) -> None:
        self.running.remove(request)
        if request.num_in_flight:
            self._leaving.append(request)
        else:
            self._release(request)

    def _release(self, request: Request) -> None:
        self._pool.free(request.block_ids, request.key)
        request.block_ids = []
        self._dropped.append(request.row)
        self._free_rows.append(request.row)
        request.row = -1

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)
