"""The loop: schedule, submit, collect, emit. Single-threaded; :mod:`headwise.runtime.engine.loop` gives it a thread."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, KeysView
from typing import Any, NamedTuple

from headwise.runtime.engine.generation import Generation
from headwise.runtime.engine.request import Request
from headwise.runtime.engine.scheduler import Schedule, Scheduler
from headwise.runtime.engine.text import Delta, TextStream, end, take_token
from headwise.runtime.kv.cost import running_mean
from headwise.runtime.kv.events import KvEvents
from headwise.runtime.kv.eviction import CachedBlock
from headwise.runtime.kv.identity import TokenBlocks
from headwise.runtime.output import FinishReason
from headwise.workers.plan import StepOutput

TRANSFER_WAIT_S = 0.02
"""How long a step that has nothing to compute waits for blocks on their way."""

STEP_HALF_LIFE_S = 3600.0
"""After so long a slow step counts half."""
CHECK_S = 0.002
"""How long a part of the check of an idle engine may hold up a request that comes meanwhile."""

Sink = Callable[[list[Delta]], None]
"""Gets what is new of its requests since the last time, in order."""


class _Live(NamedTuple):
    """A request that waits or runs. ``text``: None where there is no tokenizer."""

    request: Request
    text: TextStream | None
    sink: Sink


class Engine:
    """Runs requests on the shard group of a generation.

    Attributes:
        generation: whose shards compute now.
        events: tell which blocks they hold.
        busy_since: on the monotonic clock, while it is in a step or runs a function; read by other threads.
        token_s: seconds to compute a token of a prompt, of those computed lately; None before the first.
    """

    def __init__(self, generation: Generation, scheduler: Scheduler, events: KvEvents, pipeline_depth: int) -> None:
        """Args: ``pipeline_depth``: how many steps may be in flight; with 2, a step is submitted before the tokens of
        the step before it are seen."""
        self.generation, self.events = generation, events
        self._scheduler, self._depth = scheduler, pipeline_depth
        self.busy_since: float | None = None
        self._in_flight: deque[Schedule] = deque()
        self._live: dict[str, _Live] = {}  # by key
        self._samples: dict[str, dict[str, _Live]] = {}  # by request id, then by key
        self._new: dict[Sink, list[Delta]] = {}
        self.num_steps = 0
        self.num_generated_tokens = 0
        self._seconds = dict.fromkeys(("schedule", "submit", "collect", "emit"), 0.0)
        self._cpu_seconds = 0.0
        self._check: Iterator[None] | None = None  # of the books, while nothing else is to do
        self._check_seconds = self._next_check = 0.0
        self._num_paused = 0
        self.token_s: float | None = None
        self._slowest_step = 0.0, time.monotonic()  # its seconds, and when it was over

    @property
    def slowest_step_s(self) -> float:
        """Seconds of the slowest step, which count less as time goes by. May be read by other threads."""
        seconds, ended = self._slowest_step
        return seconds * math.pow(0.5, (time.monotonic() - ended) / STEP_HALF_LIFE_S)

    @property
    def has_work(self) -> bool:
        return self._is_busy or self._check is not None

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
        started, cpu_started = time.monotonic(), time.thread_time()
        self.generation.pins.expire()
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
        ended = time.monotonic()
        if ended - started > self.slowest_step_s:
            self._slowest_step = ended - started, ended

    def stats(self) -> dict[str, Any]:
        """Counts since the start, and what holds now. A block that is only kept for its content counts as free.

        ``engine_seconds`` is the wall time of all steps by part: ``schedule``, ``submit``, ``collect`` (which waits for
        the shards) and ``emit``; ``engine_cpu_seconds`` is the processor time that the engine's thread spent in them.
        """
        cache, pins, tiers = self.generation.cache, self.generation.pins, self.generation.tiers
        return {
            "num_running": len(self._scheduler.running),
            "num_waiting": len(self._scheduler.waiting),
            "num_blocks": cache.pool.num_blocks,
            "num_free_blocks": cache.num_available,
            "num_steps": self.num_steps,
            "num_generated_tokens": self.num_generated_tokens,
            "num_preemptions": self._scheduler.num_preemptions,
            "engine_seconds": dict(self._seconds),
            "engine_cpu_seconds": self._cpu_seconds,
            "prefix_cache": cache.stats()
            | {"pinned_blocks": pins.num_blocks, "tiers": tiers.stats() if tiers is not None else {}},
            "handoff": self.generation.handoff_stats(),
        }

    def query_shards(self, method: str) -> list[Any]:
        """The answers of every rank, in rank order; the steps in flight are processed first."""
        while self._in_flight:
            self._collect_oldest()
        return self.generation.group.query(method)

    def cached_block(self, digest: bytes) -> CachedBlock | None:
        """A block that the prefix cache has on the device."""
        return self.generation.cache.get(digest)

    def pin(self, blocks: TokenBlocks, num_tokens: int, ttl_s: float) -> int:
        """Keeps the cached blocks of a sequence's first tokens for a time; returns how many tokens they are.

        Raises:
            InvalidValueError: more blocks would be pinned than may be.
        """
        cache, chain = self.generation.cache, list[CachedBlock]()
        cache.match(blocks, num_tokens // cache.block_size, chain)
        self.generation.pins.pin(chain, ttl_s)
        return len(chain) * cache.block_size

    def give_up_seats(self) -> None:
        """Takes their seats from requests that have ended, and whose blocks are not sent to another engine any more."""
        self._scheduler.give_up_seats()

    def leave_peers(self) -> None:
        """No step follows: ends the connections to prefill engines, which would be renewed for ever."""
        if self.generation.inbound is not None:
            self.generation.inbound.close()

    def reset_prefix_cache(self) -> None:
        """Forgets every cached block, pinned ones too, on the device and the tiers below. What runs goes on."""
        self.generation.pins.clear()
        self.generation.cache.clear()
        if self.generation.tiers is not None:
            self.generation.tiers.clear()
        self.events.flush()

    def check_integrity(self) -> None:
        """
        Raises:
            IntegrityError: the books of the KV blocks do not add up.
        """
        self._scheduler.check_integrity()

    def _check_idle(self) -> None:
        """Checks the books while there is nothing else to do: at most a hundredth of the time, and a little at a time,
        for with many blocks it takes a while."""
        if self._is_busy:
            self._check = None
            return
        started = ended = time.monotonic()
        if self._check is None:
            if started < self._next_check:
                return
            self._check, self._check_seconds = self._scheduler.checks(), 0.0
        while self._check is not None and ended - started <= CHECK_S:
            if next(self._check, True):
                self._check = None
            ended = time.monotonic()
        self._check_seconds += ended - started
        self._next_check = ended + 100 * self._check_seconds

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
        return busy or handing_over

    def _end_failed(self) -> bool:
        """Ends requests whose prompts another engine was to compute, and did not. Returns whether there were any."""
        failed = self._scheduler.take_failed()
        for request, reason in failed:
            if (live := self._live.get(request.key)) is not None and live.request is request:
                request.error = reason
                self._emit(live, end(request, live.text, FinishReason.ERROR))
        if failed:
            self._deliver()
        return bool(failed)

    def _submit_next(self) -> bool:
        """Submits a step, if there is anything to compute."""
        started = time.perf_counter()
        schedule = self._scheduler.schedule()
        scheduled = time.perf_counter()
        self._seconds["schedule"] += scheduled - started
        if schedule is None:
            return False
        self.generation.group.submit(schedule.plan)
        self._in_flight.append(schedule)
        self._seconds["submit"] += time.perf_counter() - scheduled
        return True

    def _collect_oldest(self) -> None:
        started = time.perf_counter()
        output = self.generation.group.collect()
        collected = time.perf_counter()
        self._process(self._in_flight.popleft(), output)
        self._seconds["collect"] += collected - started
        self._seconds["emit"] += time.perf_counter() - collected

    def _process(self, schedule: Schedule, output: StepOutput) -> None:
        if output.step != schedule.plan.step:
            raise RuntimeError(f"the output of step {output.step} came where {schedule.plan.step}'s was due")
        self.num_steps += 1
        tokens, failed = dict(output.tokens), dict(output.failed)
        self._push_blocks(schedule, failed)
        # A grammar that fails says nothing against the keys and values that others wait for.
        self._scheduler.complete(schedule, failed.keys() - set(output.verified))
        for request, seat, samples, _ in schedule.rows:
            live = self._live.get(request.key)
            if not samples or live is None or live.request is not request:
                continue  # the request has ended since, so a token of it is void
            if seat.row in failed:
                request.error = failed[seat.row]
                self._emit(live, end(request, live.text, FinishReason.ERROR))
            else:
                self.num_generated_tokens += 1
                self._emit(live, take_token(request, live.text, tokens[seat.row], output.logprobs.get(seat.row)))
        self._learn_cost(schedule, output)
        self._deliver()

    def _push_blocks(self, schedule: Schedule, failed: Collection[int]) -> None:
        """Has the blocks of other engines' prompts sent as far as they are computed; before anybody may lose a seat."""
        if (outbound := self.generation.outbound) is None:
            return
        for request, seat, _, num_computed in schedule.rows:
            if request.transfer is not None and seat.row not in failed and request.key in self._live:
                outbound.computed(request.transfer, seat, num_computed)

    def _learn_cost(self, schedule: Schedule, output: StepOutput) -> None:
        """What a token takes to compute: of steps that mostly compute prompts."""
        prefilled = sum(count for _, count in schedule.plan.computes if count > 1)
        if prefilled < self.generation.cache.block_size or prefilled < len(schedule.plan.computes):
            return
        self.token_s = running_mean(self.token_s, output.seconds / prefilled)
        if self.generation.tiers is not None:
            self.generation.tiers.cost.saw_prefill(prefilled, output.seconds)
        if self.generation.inbound is not None:
            self.generation.inbound.cost.saw_prefill(prefilled, output.seconds)

    def _emit(self, live: _Live, delta: Delta) -> None:
        """Notes a delta for its sink; the last one ends its request."""
        if delta.finished:
            del self._live[live.request.key]
            samples = self._samples[live.request.request_id]
            del samples[live.request.key]
            if not samples:
                del self._samples[live.request.request_id]
            self._num_paused -= live.request.paused
            self._scheduler.finish(live.request)
        self._new.setdefault(live.sink, []).append(delta)

    def _deliver(self) -> None:
        new, self._new = self._new, {}
        for sink, deltas in new.items():
            sink(deltas)
