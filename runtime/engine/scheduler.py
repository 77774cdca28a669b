"""Who computes how many tokens this step.

There is no prefill phase and no decode phase: a request has tokens whose KV is not computed yet, many for a new
prompt, one while it decodes, and a step computes some of them under a token budget.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from headwise.runtime.engine.block_tables import Admission, BlockTables
from headwise.runtime.engine.request import Request, RequestState, Seat, seat_of
from headwise.runtime.engine.suspects import Suspects
from headwise.runtime.engine.waiting import Waiting
from headwise.runtime.handoff.inbound import LocalLoad
from headwise.runtime.output import FinishReason
from headwise.workers.plan import MAX_ADMIT_BYTES, RowAdmit, StepPlan, admit_bytes

ROWS_PER_FREE_ROW = 7
"""A tenant may have so many rows for each row that is left free, so that the next tenant finds one: 7 of 8 rows if no
other tenant has any."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A step: the plan for the shards, and what the engine must know to read the output.

    Attributes:
        seats: whose tokens the plan's computes are, in the same order.
        num_tokens: how many all of them compute.
        num_prefilled: those of them that are of prompts; a row that computes one token counts as decoding.
        num_grammars: how many grammars may have to be compiled for it.
    """

    plan: StepPlan
    seats: list[Seat]
    num_tokens: int
    num_prefilled: int
    num_grammars: int


@dataclass(slots=True)
class _Draft:
    """A step being put together: how many more tokens it may compute, how many more bytes the requests that it admits
    may take in its plan, and what it does so far."""

    budget: int
    admit_bytes: int
    counts: dict[Seat, int] = field(default_factory=dict)
    appends: dict[Seat, list[list[int]]] = field(default_factory=dict)
    admitted: list[Seat] = field(default_factory=list)


class Scheduler:
    """Owns every request's state and seat.

    Several steps may be in flight. A request that ends or is preempted meanwhile keeps its seat until the last of
    these steps is done, so that no other request gets a block that a step still writes to. It keeps the seat, too,
    while its blocks are sent to another engine.

    Between :meth:`lose_seats` and :meth:`resume` there is no shard group: requests come, wait and end, and nothing is
    scheduled.
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
        self.waiting = Waiting()
        self.running: list[Request] = []  # oldest first
        self.num_preemptions = 0
        self._leaving: list[Request] = []  # not running any more, but a step or job in flight still uses their blocks
        self._suspects = Suspects()
        self._budget = max_num_batched_tokens
        self._mixed_budget = max_mixed_prefill_tokens or max_num_batched_tokens
        # No more rows than tokens in a step: else those that decode could leave nothing for a prompt, for ever.
        self._num_rows = min(max_num_seqs, max_num_batched_tokens)
        self._has_group = False
        self.resume(tables)

    def add(self, request: Request) -> None:
        self.waiting.add(request)

    @property
    def num_queued_tokens(self) -> int:
        """Tokens of prompts that run or wait, and are not computed yet."""
        running = sum(request.num_uncomputed for request in self.running if request.num_uncomputed > 1)
        return running + self.waiting.num_tokens

    def schedule(self) -> Schedule | None:
        """The next step, or None when there is nothing to compute, or nothing before a step in flight is done.

        Decodes come first, then prefill chunks, then requests that wait, the oldest first each time (of those
        that wait, tenants take turns); what the shards must know of earlier changes travels along.
        """
        draft = _Draft(self._budget, MAX_ADMIT_BYTES)
        if (suspect := self._suspects.alone()) is not None:
            self._compute_alone(suspect, draft)
            return self._build(draft) if draft.counts else None
        decodes, prefills = self._seats_by_kind()
        for seat in decodes:
            if seat.num_slots <= seat.num_computed < seat.num_wanted:
                self._grow(seat, seat.num_computed + 1, draft)
        # Those that have a slot, are not preempted by now, and whose last token is not on the way.
        draft.counts = {s: 1 for s in decodes if s.num_computed < s.num_slots and s.num_computed < s.num_wanted}
        draft.budget -= len(draft.counts)
        if any(seat.request.streamed for seat in draft.counts):
            draft.budget = min(draft.budget, self._mixed_budget)
        for seat in prefills:
            self._compute(seat, draft)
        self._admit_waiting(draft)
        return self._build(draft) if draft.counts else None

    def empty_step(self) -> Schedule:
        """A step that computes nothing, for what else the shards are to do in it."""
        return self._build(_Draft(0, 0))

    def complete(self, schedule: Schedule, failed: Collection[int] = ()) -> None:
        """The step is done, and is the oldest in flight; its tokens are the engine's to append.

        Args:
            failed: the rows whose logits were not finite. What such a row computed is not verified, and no other
                request gets it; to end its request is the engine's part.
        """
        block_size, windowed = self._tables.block_size, self._tables.windowed
        for seat, (row, count) in zip(schedule.seats, schedule.plan.computes, strict=True):
            done = seat.num_done = seat.num_done + count
            # Only what samples verifies; and after the first time, there is a block to verify only where one is full.
            if (done == seat.num_given or (done > seat.num_given and not done % block_size)) and (
                row not in failed and seat.request.finish_reason is not FinishReason.ERROR
            ):
                self._tables.publish(seat.request, done)
            if windowed and done >= seat.gives_at:
                self._tables.give_back(seat)
        self.give_up_seats()

    def give_up_seats(self) -> None:
        """Takes their seats from requests that have left, and whose blocks nothing in flight uses any more."""
        for request in [r for r in self._leaving if not seat_of(r).is_used]:
            self._leaving.remove(request)
            self._release(request)

    def finish(self, request: Request) -> None:
        """Ends a request, in whatever state it is. Idempotent."""
        if request.state is RequestState.FINISHED:
            return
        running = request.state is RequestState.RUNNING
        request.state = RequestState.FINISHED
        request.metrics.finished = time.monotonic()
        self._suspects.forget(request)
        if running:
            self._leave(request)
            return
        self.waiting.remove(request)
        if self._has_group:
            self._tables.forget(request)

    def lose_seats(self, in_flight: Collection[Request], own_error: bool = False) -> Request | None:
        """The shard group is dead, and every seat with it. What ran waits again, in front of what waited, each in its
        order.

        Args:
            in_flight: the requests that the steps in flight compute, and that have not ended.
            own_error: whether the group has died of an error that one of its ranks has met.

        Returns:
            The request that the group has died of, if it is found.
        """
        self.waiting.rewind()  # the group may have died while their turns were looked at
        poisonous = self._suspects.died(in_flight, own_error)
        for request in (*self.running, *self._leaving):
            request.seat = None
        now = time.monotonic()
        for request in reversed(self.running):
            request.state = RequestState.WAITING
            request.metrics.lose(now)
            self.waiting.add_preempted(request)
        self.running, self._leaving = [], []
        self._has_group = False
        return poisonous

    def resume(self, tables: BlockTables) -> None:
        """There is a shard group, with no request on it yet."""
        self._tables, self._num_groups = tables, len(tables.caches)
        tables.load = self._load
        self._free_rows = list(reversed(range(self._num_rows)))
        self._dropped: list[int] = []
        self._next_step = 0
        self._has_group = True

    def take_failed(self) -> list[tuple[Request, str]]:
        """The requests that are to end since the last call, and why: their prompts did not come from another engine."""
        if not self._has_group:
            return []
        failed, self._tables.failed = self._tables.failed, []
        return failed

    @property
    def num_suspects(self) -> int:
        """As :attr:`Engine.num_suspects`."""
        return len(self._suspects)

    def check_integrity(self) -> None:
        """
        Raises:
            IntegrityError: the books of the blocks do not agree with each other, or with what requests hold.
        """
        for _ in self.checks():
            pass

    def checks(self) -> Iterator[None]:
        """:meth:`check_integrity` in parts; ends early if the books change in between."""
        if not self._has_group:
            return
        changes = self._tables.changes
        for _ in self._tables.checks([*self.running, *self._leaving]):
            yield
            if self._tables.changes != changes:
                return

    def _load(self) -> LocalLoad:
        """What a prompt that is computed here would have to wait for, and hold up."""
        prompts = sum(count for request in self.running if (count := request.num_uncomputed) > 1)
        return LocalLoad(prompts, any(request.streamed and request.generated for request in self.running))

    def _seats_by_kind(self) -> tuple[list[Seat], list[Seat]]:
        """Of those that run and are not paused, oldest first: who decodes, and whose prompt is still to be computed."""
        decodes: list[Seat] = []
        prefills: list[Seat] = []
        for request in self.running:
            if not request.paused:
                seat = request.seat
                assert seat is not None
                (prefills if seat.num_given - seat.num_computed > 1 else decodes).append(seat)
        return decodes, prefills

    def _compute(self, seat: Seat, draft: _Draft) -> None:
        """Gives a running request its part of the step, if there is budget and are blocks."""
        count = min(seat.num_uncomputed, draft.budget)
        if count > 0 and self._tables.windowed:
            count = self._tables.fitting(seat, count)
        if count <= 0 or not self._grow(seat, seat.num_computed + count, draft):
            return
        draft.counts[seat] = count
        draft.budget -= count

    def _grow(self, seat: Seat, num_tokens: int, draft: _Draft) -> bool:
        """Sees to it that a running request has blocks for so many tokens. Others may be preempted for it, and itself,
        too; returns whether it has the blocks now."""
        missing = self._tables.missing(seat, num_tokens)
        if max(missing) > 0:
            if not self._make_room(seat, missing, draft):
                return False
            draft.appends[seat] = self._tables.grow(seat, num_tokens)
        return True

    def _make_room(self, seat: Seat, missing: list[int], draft: _Draft) -> bool:
        """Preempts the newest, the request itself at last, until so many blocks are free or soon will be; returns
        whether they are free now."""
        tables = self._tables
        if tables.windowed and seat.is_in_flight:  # which gives blocks back, as others may that are in flight
            return tables.has_room(missing)
        while not tables.has_room(missing, self._leaving, in_flight := self._windows_in_flight()):
            victim = seat_of(self._newest_paused() or self.running[-1])
            self._preempt(victim.request)
            draft.budget += draft.counts.pop(victim, 0)
            draft.appends.pop(victim, None)
            if victim is seat:
                return False
        return not (self._leaving or in_flight) or tables.has_room(missing)

    def _windows_in_flight(self) -> list[Request]:
        """Those that run and may give back blocks when a step in flight is done."""
        if not self._tables.windowed:
            return []
        return [request for request in self.running if seat_of(request).is_in_flight]

    def _compute_alone(self, suspect: Request, draft: _Draft) -> None:
        """Gives the step to one request that the group may die of, once nothing else is in flight. Others keep their
        seats, as long as it finds room beside them."""
        others = [request for request in (*self.running, *self._leaving) if request is not suspect]
        if any(seat_of(request).is_in_flight for request in others):
            return
        if suspect.state is RequestState.RUNNING:
            self.running.remove(suspect)
            self.running.insert(0, suspect)  # whoever gives up blocks for it, it is another
            self._compute(seat_of(suspect), draft)
            return
        if suspect.seat is not None:
            return
        self._tables.begin_round()
        while True:
            row = self._free_rows[-1] if self._free_rows else None
            admission = self._tables.admit(suspect, row, alone=True) if row is not None else Admission.NO_ROOM
            if admission is Admission.SEATED:
                self.waiting.remove(suspect)
                self._begin(suspect, draft)
            if admission is not Admission.NO_ROOM or not self.running:
                return
            self._preempt(self.running[-1])

    def _admit_waiting(self, draft: _Draft) -> None:
        rows_of = self._rows_of_tenants()
        self._tables.begin_round()
        while draft.budget > 0 and (request := self.waiting.head) is not None:
            if request.paused:
                self.waiting.skip()
                continue
            # A preempted request waits for its tokens in flight: the shards get them with its admission.
            if request.seat is not None:
                break
            # Unless nothing else is computed: then a row that is left free is of use to nobody.
            if draft.counts and self._has_its_share(request, rows_of):
                self.waiting.pass_over()
                continue
            size = admit_bytes(request.num_tokens, request.sampling, self._num_groups)
            if draft.admitted and size > draft.admit_bytes:
                break
            admission = self._tables.admit(request, self._free_rows[-1]) if self._free_rows else Admission.NO_ROOM
            if admission is Admission.ROOM_SOON:
                break
            if admission is Admission.NO_ROOM:
                if (victim := self._newest_paused()) is None:
                    break
                self._preempt(victim)
                self.waiting.skip()
                if victim.seat is not None:  # the place is free once the steps in flight are done
                    break
                continue
            if admission is Admission.LATER:
                self.waiting.skip()
                continue
            self.waiting.take()
            rows_of[request.tenant] += 1
            draft.admit_bytes -= size
            self._begin(request, draft)
        self.waiting.rewind()

    def _begin(self, request: Request, draft: _Draft) -> None:
        """A request that has got its seat runs from this step on."""
        self.running.append(request)
        request.state = RequestState.RUNNING
        self._free_rows.pop()
        request.metrics.go_on(time.monotonic())
        seat = seat_of(request)
        draft.counts[seat] = min(seat.num_uncomputed, draft.budget, seat.num_slots - seat.num_computed)
        draft.budget -= draft.counts[seat]
        draft.admitted.append(seat)

    def _rows_of_tenants(self) -> Counter[str]:
        """How many rows each tenant has. Rows of paused requests can be had by others, and count as free."""
        if self.waiting.head is None or not self.waiting.head.tenant:  # tenants are not told apart
            return Counter()
        return Counter(request.tenant for request in self.running if not request.paused)

    def _has_its_share(self, request: Request, rows_of: Counter[str]) -> bool:
        """Whether a request waits because its tenant has many rows. One that had a row before gets it back."""
        if not request.tenant or request.metrics.was_computed:
            return False
        return rows_of[request.tenant] >= ROWS_PER_FREE_ROW * (self._num_rows - rows_of.total())

    def _build(self, draft: _Draft) -> Schedule:
        plan = StepPlan(self._next_step, drops=self._dropped)
        self._next_step += 1
        self._dropped = []
        for seat in draft.admitted:
            request = seat.request
            prompt_len, tokens = len(request.prompt_token_ids), request.prompt_token_ids + request.generated
            blocks, *others = [list(table.block_ids) for table in seat.tables]
            plan.admits.append(
                RowAdmit(seat.row, tokens, prompt_len, seat.num_computed, blocks, request.sampling, tuple(others))
            )
        plan.appends = [(seat.row, block) for seat, (new, *_) in draft.appends.items() for block in new]
        if self._num_groups > 1:
            plan.group_appends = [
                (group, seat.row, block)
                for seat, by_group in draft.appends.items()
                for group, new in enumerate(by_group)
                for block in new
                if group
            ]
        plan.computes = [(seat.row, count) for seat, count in draft.counts.items()]
        for seat, count in draft.counts.items():
            seat.num_computed += count
        num_tokens, prefills = sum(draft.counts.values()), list[Seat]()
        if num_tokens > len(draft.counts):
            prefills = [seat for seat, count in draft.counts.items() if count > 1]
        # A row that computes several tokens and samples has just been seated: its grammar may not be compiled yet.
        grammars = {seat.request.sampling.grammar for seat in prefills if seat.num_computed >= seat.num_given}
        num_prefilled = sum(draft.counts[seat] for seat in prefills)
        return Schedule(plan, list(draft.counts), num_tokens, num_prefilled, len(grammars - {""}))

    def _newest_paused(self) -> Request | None:
        """Whose place others may have: nothing is computed for it anyway."""
        return next((request for request in reversed(self.running) if request.paused), None)

    def _preempt(self, request: Request) -> None:
        """Takes its seat from a running request, whose tokens are computed again when there is room."""
        self._leave(request)
        request.state = RequestState.WAITING
        self.waiting.add_preempted(request)
        request.metrics.num_preemptions += 1
        self.num_preemptions += 1

    def _leave(self, request: Request) -> None:
        self.running.remove(request)
        seat = seat_of(request)
        seat.num_wanted = seat.num_computed  # no step computes it any more, the one that is being put together either
        if seat.is_used:
            self._leaving.append(request)
        else:
            self._release(request)

    def _release(self, request: Request) -> None:
        row = seat_of(request).row
        self._tables.leave(request)
        self._dropped.append(row)
        self._free_rows.append(row)
