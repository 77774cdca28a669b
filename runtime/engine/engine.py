"""The loop: schedule, submit, collect, emit. Single-threaded; :mod:`headwise.runtime.engine.loop` gives it a thread."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Collection, KeysView, Sequence
from typing import Any, NamedTuple

from headwise.cluster.group import ShardGroupDied
from headwise.runtime.engine.generation import Generation
from headwise.runtime.engine.idle_check import IdleCheck
from headwise.runtime.engine.pace import MIN_STEP_TIMEOUT_S, Pace
from headwise.runtime.engine.repinning import is_pin, repin
from headwise.runtime.engine.request import Request, RequestState
from headwise.runtime.engine.scheduler import Schedule, Scheduler
from headwise.runtime.engine.text import Delta, TextStream, end, take_token
from headwise.runtime.kv.events import KvEvents
from headwise.runtime.kv.eviction import CachedBlock
from headwise.runtime.kv.identity import TokenBlocks
from headwise.runtime.kv.pins import Pinned
from headwise.runtime.output import FinishReason
from headwise.workers import failpoints
from headwise.workers.failpoints import Point
from headwise.workers.plan import StepOutput

TRANSFER_WAIT_S = 0.02
"""How long a step that has nothing to compute waits for blocks on their way."""

SILENCE_S = MIN_STEP_TIMEOUT_S
"""How long ranks may say nothing of the blocks that they move, until they are asked whether they live."""

Sink = Callable[[list[Delta]], None]
"""Gets what is new of its requests since the last time, in order."""


class _Live(NamedTuple):
    """A request that waits or runs. ``text``: None where there is no tokenizer."""

    request: Request
    text: TextStream | None
    sink: Sink


class Engine:
    """Runs requests on the shard group of a generation; when the group dies, on that of the next.

    Between :meth:`lose_group` and :meth:`resume` it takes requests, and computes none.

    Attributes:
        generation: whose shards compute now; while ``rebuilding``, whose shards have died.
        events: tell which blocks they hold.
        rebuilding: whether the shards are dead, and others are being started. Read by other threads.
        rebuilding_changed: when ``rebuilding`` last changed, on the monotonic clock.
        busy_since: on the monotonic clock, while it is in a step or runs a function; read by other threads.
        pace: how long steps take; read by other threads.
        on_resume: called on the engine's thread with each generation but the first.
        recoveries: tells of the shard groups that have died, for :meth:`stats`.
    """

    def __init__(
        self,
        generation: Generation,
        scheduler: Scheduler,
        events: KvEvents,
        pipeline_depth: int,
        step_timeout_s: float | None = None,
    ) -> None:
        """
        Args:
            pipeline_depth: how many steps may be in flight; with 2, a step is submitted before the tokens of the step
                before it are seen.
            step_timeout_s: how long a step may take before it counts as hanging; None: by what steps took.
        """
        self.generation, self.events = generation, events
        self._scheduler, self._depth = scheduler, pipeline_depth
        self.busy_since: float | None = None
        self.rebuilding, self.rebuilding_changed = False, time.monotonic()
        self.pace = Pace(step_timeout_s)
        self.on_resume: list[Callable[[Generation], None]] = []
        self.recoveries: Callable[[], dict[str, Any]] = dict
        self._in_flight: deque[Schedule] = deque()
        self._live: dict[str, _Live] = {}  # by key
        self._samples: dict[str, dict[str, _Live]] = {}  # by request id, then by key
        self._new: dict[Sink, list[Delta]] = {}
        self.num_steps = 0
        self.num_generated_tokens = 0
        self._seconds = dict.fromkeys(("schedule", "submit", "collect", "emit"), 0.0)
        self._cpu_seconds = 0.0
        self._check = IdleCheck(scheduler.checks)
        self._num_paused = 0
        self._awaited: tuple[float, Schedule] | None = None  # since when the engine waits for which step
        self._checks_fit = generation.tables.windowed  # else whoever asks knows how much the KV memory holds
        self._pinned: list[Pinned] = []  # when the group died
        self._reset_wanted = False
        self._pin_numbers = itertools.count()

    @property
    def has_work(self) -> bool:
        return not self.rebuilding and (self._is_busy or self._check.running or self.generation.graphs.due)

    @property
    def step_limit_s(self) -> float:
        """How long the step that is waited for may take, or any other. May be read by other threads."""
        awaited = self._awaited
        return self._limit_s(awaited[1]) if awaited else self.pace.limit_s(0)

    @property
    def hang(self) -> str | None:
        """Which step makes no progress; None: none. May be read by other threads."""
        if (awaited := self._awaited) is None:
            return None
        since, schedule = awaited
        limit_s = self._limit_s(schedule)
        if time.monotonic() - since <= limit_s:
            return None
        return f"a step with {schedule.num_tokens} tokens has made no progress in {limit_s:.3g} s (--step-timeout)"

    @property
    def _is_busy(self) -> bool:
        waiting = len(self._live) > self._num_paused
        return bool(waiting or self._in_flight or self.generation.ledger.busy or self.generation.handing_over)

    @property
    def num_waiting(self) -> int:
        """Requests that wait to be computed, for the first time or again."""
        return len(self._scheduler.waiting)

    def num_waiting_of(self, tenant: str) -> int:
        """Those of them that a tenant asked for."""
        return self._scheduler.waiting.num_of(tenant)

    @property
    def num_queued_tokens(self) -> int:
        """Tokens of prompts that run or wait, and are not computed yet."""
        return self._scheduler.num_queued_tokens

    @property
    def num_suspects(self) -> int:
        """Requests that were computed when a shard group died, and have got no token since. May be read by other
        threads."""
        return self._scheduler.num_suspects

    @property
    def num_paused(self) -> int:
        """Requests that nobody takes tokens of at present."""
        return self._num_paused

    @property
    def request_ids(self) -> KeysView[str]:
        """Of every request that waits or runs."""
        return self._samples.keys()

    def add(self, request: Request, text: TextStream | None, sink: Sink) -> None:
        """Queues a request, whose key no other may have. Its deltas go to ``sink`` on the engine's thread, once a
        step, together with those of other requests that have the same."""
        live = self._live[request.key] = _Live(request, text, sink)
        self._samples.setdefault(request.request_id, {})[request.key] = live
        self._scheduler.add(request)
        if self._checks_fit:
            self._end_unfit([live])
            self._deliver()

    def abort(self, request_id: str) -> None:
        """Ends every sample of a request that still runs; each gets its last delta. Unknown ids are ignored: the
        request may just have finished."""
        for live in list(self._samples.get(request_id, {}).values()):
            self._emit(live, end(live.request, live.text, FinishReason.ABORT))
        self._deliver()

    def pause(self, request_id: str, paused: bool) -> None:
        """Computes nothing for a request until it is called with False; what is in flight still comes. Others may get
        its row and blocks meanwhile. Unknown ids are ignored."""
        for live in self._samples.get(request_id, {}).values():
            if live.request.paused != paused:
                live.request.paused = paused
                self._num_paused += 1 if paused else -1

    def step(self) -> None:
        """Submits as much as may be in flight and processes the oldest output.

        Raises:
            ShardGroupDied: the group is gone; every request is still known.
        """
        cpu_started = time.thread_time()
        for pins in self.generation.all_pins:
            pins.expire()
        while len(self._in_flight) < self._depth and self._submit_next():
            pass
        moving = self._move_blocks(wait=not self._in_flight)
        failed = self._end_failed()
        if self._in_flight:
            self._collect_oldest()
        elif len(self._live) > self._num_paused and not (moving or failed):
            raise RuntimeError(f"{len(self._live)} requests wait and none can be scheduled: {self.stats()}")
        self._check_idle()
        self.events.flush()
        self._cpu_seconds += time.thread_time() - cpu_started

    def lose_group(self, death: ShardGroupDied) -> None:
        """The shard group is dead, and what its blocks held is gone. Every request waits, and goes on from its tokens
        once there is another group; one that the group has died of before ends."""
        rows = {seat.request.key: seat.request for schedule in self._in_flight for seat in schedule.seats}
        in_flight = [
            live.request for key, request in rows.items() if (live := self._live.get(key)) and live.request is request
        ]
        self.rebuilding, self._awaited = True, None
        self.rebuilding_changed = time.monotonic()
        self.generation.graphs.lose_group(schedule.plan for schedule in self._in_flight)
        self._in_flight.clear()
        self._check.drop()
        self._end_failed()
        self._pinned = self.generation.pins.left()
        self.generation.abandon()
        poisonous = self._scheduler.lose_seats(in_flight, death.own_error)
        if poisonous is not None:
            self._fail(poisonous, f"the shard group died whenever this request was computed, and of no other: {death}")
        for request in [live.request for live in self._live.values() if live.request.transfer is not None]:
            self._fail(request, "the shard group died")  # and with it the blocks that another engine waited for
        self.events.cleared()
        self.events.flush()
        self._deliver()

    def resume(self, generation: Generation) -> None:
        """There is another shard group, and its books are open.

        Raises:
            ShardGroupDied: it is dead by now. The engine still has none, and waits for the next.
        """
        generation.count_on(self.generation)
        self.generation = generation
        self._scheduler.resume(generation.tables)
        self._checks_fit = True  # it may have less KV memory
        self._end_unfit(list(self._live.values()))
        for tell in self.on_resume:
            tell(generation)
        if self._reset_wanted:
            self._reset()  # which may find that this group is dead, too
            self._reset_wanted = False
        self.rebuilding, self.rebuilding_changed = False, time.monotonic()
        for pinned in self._pinned:
            repin(self, pinned, next(self._pin_numbers))
        self._pinned = []
        self.events.flush()
        self._deliver()

    def stats(self) -> dict[str, Any]:
        """Counts since the start, and what holds now. A block that is only kept for its content counts as free.

        ``engine_seconds`` is the wall time of all steps by part: ``schedule``, ``submit``, ``collect`` (which waits for
        the shards) and ``emit``; ``engine_cpu_seconds`` is the processor time that the engine's thread spent in them.
        """
        cache, pins, tiers = self.generation.cache, self.generation.pins, self.generation.tiers
        fullest = self.generation.fullest
        return {
            "epoch": self.events.epoch,
            "kv_policy": self.generation.kv_policy,
            "num_running": len(self._scheduler.running),
            "num_waiting": len(self._scheduler.waiting),
            "num_blocks": 0 if self.rebuilding else fullest.pool.num_blocks,
            "num_free_blocks": 0 if self.rebuilding else fullest.num_available,
            "num_steps": self.num_steps,
            "num_generated_tokens": self.num_generated_tokens,
            "num_preemptions": self._scheduler.num_preemptions,
            "engine_seconds": dict(self._seconds),
            "engine_cpu_seconds": self._cpu_seconds,
            "prefix_cache": cache.stats()
            | {"pinned_blocks": pins.num_blocks, "tiers": tiers.stats() if tiers is not None else {}},
            "kv_groups": [] if self.rebuilding else self.generation.group_stats(),
            "handoff": self.generation.handoff_stats(),
            "recoveries": {"rebuilding": self.rebuilding} | self.recoveries(),
        }

    def query_shards(self, method: str) -> list[Any]:
        """The answers of every rank, in rank order; the steps in flight are processed first. None while the shards are
        being replaced."""
        if self.rebuilding:
            return []
        while self._in_flight:
            self._collect_oldest()
        return self.generation.group.query(method)

    def cached_block(self, digest: bytes) -> CachedBlock | None:
        """A block that the prefix cache has on the device."""
        return None if self.rebuilding else self.generation.cache.get(digest)

    def pin(self, blocks: TokenBlocks, num_tokens: int, ttl_s: float) -> int:
        """Keeps the cached blocks of a sequence's first tokens for a time; returns how many tokens they are. If the
        shards die meanwhile, those tokens are computed again by the next, and kept for the rest of the time.

        Raises:
            InvalidValueError: more blocks would be pinned than may be.
        """
        size = self.generation.cache.block_size
        if self.rebuilding:  # the last step before has computed them
            self._pinned.append(Pinned(blocks, num_tokens // size, ttl_s))
            return num_tokens // size * size
        return self.generation.pin(blocks, num_tokens // size, ttl_s) * size

    def give_up_seats(self) -> None:
        """Takes their seats from requests that have ended, and whose blocks are not sent to another engine any more."""
        self._scheduler.give_up_seats()

    def leave_peers(self) -> None:
        """No step follows: ends the connections to prefill engines, which would be renewed for ever."""
        if self.generation.inbound is not None:
            self.generation.inbound.close()

    def reset_prefix_cache(self) -> None:
        """Forgets every cached block, pinned ones too, on the device and the tiers below. What runs goes on."""
        if self.rebuilding:  # the disk has what it had
            self._pinned, self._reset_wanted = [], True
            return
        self._reset()

    def check_integrity(self) -> None:
        """
        Raises:
            IntegrityError: the books of the KV blocks do not add up.
        """
        self._scheduler.check_integrity()

    def _reset(self) -> None:
        for request_id in [request_id for request_id in self._samples if is_pin(request_id)]:
            self.abort(request_id)
        self.generation.forget_blocks()
        self.events.flush()

    def _check_idle(self) -> None:
        """Checks the books while there is nothing else to do."""
        if self._is_busy:
            self._check.drop()
        else:
            self._check.run()

    def _move_blocks(self, wait: bool) -> bool:
        """Has blocks copied between the device and the tiers, and takes note of what is done.

        Args:
            wait: for something to be done, a little; functions of other threads have to come in between.

        Returns:
            Whether a job or a handoff was or is in flight.
        """
        generation = self.generation
        handing_over = generation.handing_over  # or was: what has come may be computed with from the next step on
        if generation.tiers is not None:
            generation.tiers.pump()
        if generation.inbound is not None:
            generation.inbound.pump()
        if generation.outbound is not None:
            generation.outbound.tick()
        busy = generation.ledger.busy or generation.handing_over
        generation.ledger.poll(TRANSFER_WAIT_S if wait and busy else 0.0)
        if wait and generation.ledger.silent_s > SILENCE_S:
            generation.group.query("stats")  # a rank that hangs does not answer; whose disk is slow, does
            generation.ledger.heard()
        return busy or handing_over

    def _end_failed(self) -> bool:
        """Ends requests whose prompts another engine was to compute, and did not. Returns whether there were any."""
        failed = self._scheduler.take_failed()
        for request, reason in failed:
            self._fail(request, reason)
        if failed:
            self._deliver()
        return bool(failed)

    def _end_unfit(self, live: Sequence[_Live]) -> None:
        """Ends those of some requests that the group has not the KV memory to finish."""
        for request in [one.request for one in live]:
            most = len(request.prompt_token_ids) + request.max_tokens
            capacity = self.generation.tables.capacity_for(request)
            if capacity is not None and most > capacity:
                reason = f"{len(request.prompt_token_ids)} tokens of the prompt and max_tokens={request.max_tokens} do "
                reason += f"not fit: the shards have KV memory for {capacity} tokens of a request"
                self._fail(request, reason)

    def _fail(self, request: Request, reason: str) -> None:
        """Ends a request with an error, unless it has ended."""
        if (live := self._live.get(request.key)) is not None and live.request is request:
            request.error = reason
            self._emit(live, end(request, live.text, FinishReason.ERROR))

    def _submit_next(self) -> bool:
        """Submits a step, if there is anything to compute."""
        started = time.perf_counter()
        schedule, graphs = self._scheduler.schedule(), self.generation.graphs
        if schedule is None and graphs.due and not self._is_busy:
            schedule = self._scheduler.empty_step()
        if schedule is not None:
            # If the shards die of a capture, no request is to be blamed for it.
            graphs.fill(schedule.plan, may_capture=not self._scheduler.num_suspects)
        scheduled = time.perf_counter()
        self._seconds["schedule"] += scheduled - started
        if schedule is None:
            return False
        if failpoints.ENABLED:
            failpoints.hit(Point.ENGINE_SUBMIT)
        self.generation.group.submit(schedule.plan)
        if failpoints.ENABLED:
            failpoints.hit(Point.ENGINE_SUBMITTED)
        self._in_flight.append(schedule)
        self._seconds["submit"] += time.perf_counter() - scheduled
        return True

    def _collect_oldest(self) -> None:
        started = time.perf_counter()
        since, schedule = self._awaited = time.monotonic(), self._in_flight[0]
        output = self.generation.group.collect()
        collected = time.perf_counter()
        if failpoints.ENABLED:
            failpoints.hit(Point.ENGINE_OUTPUT)
        if not schedule.plan.capture:
            self.pace.saw_step(time.monotonic() - since, schedule.num_tokens)
        self._awaited = None
        self._check_order(output)
        self._process(self._in_flight.popleft(), output)
        self._seconds["collect"] += collected - started
        self._seconds["emit"] += time.perf_counter() - collected

    def _limit_s(self, schedule: Schedule) -> float:
        return self.pace.limit_s(schedule.num_tokens, schedule.num_grammars, bool(schedule.plan.capture))

    def _check_order(self, output: StepOutput) -> None:
        """
        Raises:
            ShardGroupDied: an output is lost, and nobody knows what else is.
        """
        due = self._in_flight[0].plan.step
        if output.step != due:
            raise ShardGroupDied(None, None, f"the output of step {output.step} came where that of step {due} was due")

    def _process(self, schedule: Schedule, output: StepOutput) -> None:
        self.num_steps += 1
        tokens, failed, logprobs = dict(output.tokens), dict(output.failed), output.logprobs
        self._push_blocks(schedule, failed)
        # A grammar that fails says nothing against the keys and values that others wait for.
        self._scheduler.complete(schedule, failed.keys() - set(output.verified))
        for seat in schedule.seats:
            request, row = seat.request, seat.row
            if seat.num_done < seat.num_given or request.state is RequestState.FINISHED:
                continue  # it has no token yet; or it has ended since, so that its token is void
            live = self._live[request.key]
            if row in failed:
                request.error = failed[row]
                self._emit(live, end(request, live.text, FinishReason.ERROR))
            else:
                self.num_generated_tokens += 1
                self._emit(live, take_token(request, live.text, tokens[row], logprobs.get(row) if logprobs else None))
        self._learn_cost(schedule, output)
        self._deliver()

    def _push_blocks(self, schedule: Schedule, failed: Collection[int]) -> None:
        """Has the blocks of other engines' prompts sent as far as they are computed; before anybody may lose a seat."""
        if (outbound := self.generation.outbound) is None:
            return
        for seat, (row, count) in zip(schedule.seats, schedule.plan.computes, strict=True):
            transfer = seat.request.transfer
            if transfer is not None and row not in failed and seat.request.state is not RequestState.FINISHED:
                outbound.computed(transfer, seat, seat.num_done + count)

    def _learn_cost(self, schedule: Schedule, output: StepOutput) -> None:
        """What a token takes to compute: of steps that mostly compute prompts, or none, and capture no graph."""
        prefilled = schedule.num_prefilled
        if not prefilled and schedule.seats and not schedule.plan.capture:
            self.pace.saw_decode(output.seconds, len(schedule.seats))
        if prefilled < self.generation.cache.block_size or prefilled < len(schedule.seats) or schedule.plan.capture:
            return
        self.pace.saw_prefill(output.seconds, prefilled)
        if self.generation.tiers is not None:
            self.generation.tiers.cost.saw_prefill(prefilled, output.seconds)
        if self.generation.inbound is not None:
            self.generation.inbound.cost.saw_prefill(prefilled, output.seconds)

    def _emit(self, live: _Live, delta: Delta) -> None:
        """Notes a delta for its sink; the last one ends its request."""
        if not delta.finished:
            self._new.setdefault(live.sink, []).append(delta)
            return
        request = live.request
        del self._live[request.key]
        samples = self._samples[request.request_id]
        del samples[request.key]
        if not samples:
            del self._samples[request.request_id]
        self._num_paused -= request.paused
        self._new.setdefault(live.sink, []).append(delta)
        if request.generated:
            self.generation.graphs.begin()
        self._scheduler.finish(request)  # last: what is on its way for it is ended, and the group may be found dead

    def _deliver(self) -> None:
        new, self._new = self._new, {}
        for sink, deltas in new.items():
            sink(deltas)
