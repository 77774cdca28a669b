"""Who computes how many tokens this step.

There is no prefill phase and no decode phase: a request has tokens whose KV is not computed yet, many for a new
prompt, one while it decodes, and a step computes some of them under a token budget.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from headwise.runtime.kv.blocks import BlockPool
from headwise.runtime.request import FinishReason, Request, RequestState
from headwise.workers.plan import RowAdmit, StepPlan


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One request's part in a step. ``samples``: whether the step gives it a token."""

    request: Request
    row: int
    samples: bool


@dataclass(frozen=True, slots=True)
class Schedule:
    """A step: the plan for the shards, and what the engine must know to read the output."""

    plan: StepPlan
    entries: list[Scheduled]


class Scheduler:
    """Owns every request's state, row and blocks."""

    def __init__(self, pool: BlockPool, block_size: int, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first
        self.num_preemptions = 0
        self._pool, self._block_size, self._budget = pool, block_size, max_num_batched_tokens
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._dropped: list[int] = []
        self._next_step = 0

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self) -> Schedule | None:
        """The next step, or None when there is nothing to compute. Decodes come first, then prefill chunks, then
        requests that wait; what the shards must know of earlier changes travels along."""
        counts: dict[Request, int] = {}
        appends: dict[Request, list[int]] = {}
        admitted: list[Request] = []
        budget = self._schedule_running(counts, appends)
        self._admit_waiting(counts, admitted, budget)
        return self._build(counts, appends, admitted) if counts else None

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Ends a request and frees what it holds, in whatever state it is. Idempotent.

        Its blocks may go to another request at once, even while a step in flight still writes to them: every shard
        runs its steps in order, so whoever gets a block writes it later.
        """
        if request.state is RequestState.FINISHED:
            return
        if request.state is RequestState.RUNNING:
            self.running.remove(request)
            self._release(request)
        else:
            self.waiting.remove(request)
        request.state, request.finish_reason = RequestState.FINISHED, reason
        request.metrics.finished = time.monotonic()

    def _schedule_running(self, counts: dict[Request, int], appends: dict[Request, list[int]]) -> int:
        """Fills ``counts`` from the running requests and returns what is left of the budget."""
        budget = self._budget
        for request in sorted(self.running, key=lambda r: r.num_uncomputed > 1):
            count = min(request.num_uncomputed, budget)
            if count <= 0 or request.row < 0:  # or preempted for an older one, above
                continue
            missing = self._blocks_for(request.num_computed + count) - len(request.block_ids)
            while missing > self._pool.num_free and request.row >= 0:
                victim = self.running[-1]
                self._preempt(victim)
                budget += counts.pop(victim, 0)
                appends.pop(victim, None)
            if request.row < 0:
                continue
            if missing > 0:
                appends[request] = self._pool.allocate(missing, request.key)
                request.block_ids += appends[request]
            counts[request] = count
            budget -= count
        return budget

    def _admit_waiting(self, counts: dict[Request, int], admitted: list[Request], budget: int) -> None:
        while self.waiting and self._free_rows and budget > 0:
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
            counts[request] = min(request.num_uncomputed, budget)
            budget -= counts[request]
            admitted.append(request)

    def _build(
        self, counts: dict[Request, int], appends: dict[Request, list[int]], admitted: list[Request]
    ) -> Schedule:
        plan = StepPlan(self._next_step, drops=self._dropped)
        self._next_step += 1
        self._dropped = []
        for request in admitted:
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
        plan.appends = [(request.row, block) for request, blocks in appends.items() for block in blocks]
        entries: list[Scheduled] = []
        for request, count in counts.items():
            plan.computes.append((request.row, count))
            request.num_computed += count
            samples = request.num_computed == request.num_tokens
            request.num_pending += samples
            request.num_in_flight += 1
            entries.append(Scheduled(request, request.row, samples))
        return Schedule(plan, entries)

    def _preempt(self, request: Request) -> None:
        """Takes everything from a running request; its tokens are computed again when there is room."""
        self.running.remove(request)
        self._release(request)
        request.state, request.num_computed = RequestState.WAITING, 0
        request.metrics.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        self._pool.free(request.block_ids, request.key)
        request.block_ids = []
        self._dropped.append(request.row)
        self._free_rows.append(request.row)
        request.row = -1

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)
