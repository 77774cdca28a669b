"""The loop: schedule, submit, collect, emit. Single-threaded; :mod:`headwise.runtime.engine.loop` gives it a thread."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from headwise.cluster.group import ShardGroup
from headwise.runtime.engine.block_tables import BlockTables
from headwise.runtime.engine.request import FinishReason, Request
from headwise.runtime.engine.scheduler import Schedule, Scheduler
from headwise.runtime.kv.events import KvEvents
from headwise.runtime.kv.eviction import CachedBlock
from headwise.runtime.kv.identity import TokenBlocks
from headwise.runtime.kv.pins import Pins
from headwise.runtime.output import TextStream
from headwise.workers.plan import StepOutput, TokenLogprobs


class Delta(NamedTuple):
    """What is new of a request since the last one.

    Attributes:
        text: None where there is no tokenizer. It may lag behind the tokens, by an unfinished character or what may
            become a stop string.
        finished: this is the last one; the request holds why.
    """

    request: Request
    token_ids: list[int]
    text: str | None
    logprobs: TokenLogprobs | None
    finished: bool


TRANSFER_WAIT_S = 0.02
"""How long a step that has nothing to compute waits for blocks on their way."""

Sink = Callable[[list[Delta]], None]
"""Gets what is new of its requests since the last time, in order."""


class Engine:
    """Runs requests on a shard group.

    Attributes:
        events: of its prefix cache.
        busy_since: on the monotonic clock, while it is in a step or makes a call; read by other threads.
    """

    def __init__(
        self,
        group: ShardGroup,
        tables: BlockTables,
        scheduler: Scheduler,
        pipeline_depth: int,
        pins: Pins,
        events: KvEvents,
    ) -> None:
        """
        Args:
            pipeline_depth: how many steps may be in flight; with 2, a step is submitted before the tokens of the one
                before it are seen.
            pins, events: of the prefix cache in ``tables``.
        """
        self._group, self._scheduler, self._depth = group, scheduler, pipeline_depth
        self._tables, self._cache, self._tiers, self._pins = tables, tables.cache, tables.tiers, pins
        self.events = events
        self.busy_since: float | None = None
        self._in_flight: deque[Schedule] = deque()
        self._live: dict[str, tuple[Request, TextStream | None, Sink]] = {}
        self._new: dict[Sink, list[Delta]] = {}
        self.num_steps = 0
        self.num_generated_tokens = 0
        self._seconds = dict.fromkeys(("schedule", "submit", "collect", "emit"), 0.0)
        self._cpu_seconds = 0.0
        self._next_check = 0.0
        self._num_paused = 0

    @property
    def has_work(self) -> bool:
        moving = self._tiers is not None and self._tiers.busy
        return bool(len(self._live) > self._num_paused or self._in_flight or moving)

    @property
    def num_waiting(self) -> int:
        """Requests that wait to be computed, for the first time or again."""
        return len(self._scheduler.waiting)

    @property
    def num_paused(self) -> int:
        """Requests that nobody takes tokens of at present."""
        return self._num_paused

    @property
    def request_ids(self) -> set[str]:
        """Of every request that waits or runs."""
        return {request.request_id for request, _, _ in self._live.values()}

    def add(self, request: Request, text: TextStream | None, sink: Sink) -> None:
        """Queues a request, whose key no other may have. Its deltas go to ``sink`` on the engine's thread, once a
        step, together with those of other requests that have the same."""
        self._live[request.key] = (request, text, sink)
        self._scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """Ends every sample of a request that still runs; each gets its last delta. Unknown ids are ignored: the
        request may just have finished."""
        for request in [r for r, _, _ in self._live.values() if r.request_id == request_id]:
            self._emit(request, [], None, FinishReason.ABORT)
        self._deliver()

    def pause(self, request_id: str, paused: bool) -> None:
        """Computes nothing for a request until it is called with False; what is in flight still comes. Others may get
        its row and blocks meanwhile. Unknown ids are ignored."""
        for request, _, _ in self._live.values():
            if request.request_id == request_id and request.paused != paused:
                request.paused = paused
                self._num_paused += 1 if paused else -1

    def step(self) -> None:
        """Submits as much as may be in flight and processes the oldest output.

        Raises:
            ShardGroupDied: the group is gone; every request is still known.
        """
        cpu_started = time.thread_time()
        self._pins.expire()
        while len(self._in_flight) < self._depth and self._submit_next():
            pass
        moving = self._move_blocks(wait=not self._in_flight)
        if self._in_flight:
            self._collect_oldest()
        elif len(self._live) > self._num_paused and not moving:
            raise RuntimeError(f"{len(self._live)} requests wait and none can be scheduled: {self.stats()}")
        self.events.flush()
        self._cpu_seconds += time.thread_time() - cpu_started

    def stats(self) -> dict[str, Any]:
        """Counts since the start, and what holds now. A block that is only kept for its content counts as free.

        ``engine_seconds`` is the wall time of all steps by part: ``schedule``, ``submit``, ``collect`` (which waits for
        the shards) and ``emit``; ``engine_cpu_seconds`` is the processor time that the engine's thread spent in them.
        """
        return {
            "num_running": len(self._scheduler.running),
            "num_waiting": len(self._scheduler.waiting),
            "num_blocks": self._cache.pool.num_blocks,
            "num_free_blocks": self._cache.num_available,
            "num_steps": self.num_steps,
            "num_generated_tokens": self.num_generated_tokens,
            "num_preemptions": self._scheduler.num_preemptions,
            "num_restarts": self._scheduler.num_restarts,
            "engine_seconds": dict(self._seconds),
            "engine_cpu_seconds": self._cpu_seconds,
            "prefix_cache": self._cache.stats()
            | {"pinned_blocks": self._pins.num_blocks}
            | {"tiers": self._tiers.stats() if self._tiers is not None else {}},
        }

    def call_shards(self, method: str) -> list[Any]:
        """The answers of every rank, in rank order; the steps in flight are processed first."""
        while self._in_flight:
            self._collect_oldest()
        return self._group.call(method)

    def cached_block(self, digest: bytes) -> CachedBlock | None:
        """A block that the prefix cache has on the device."""
        return self._cache.get(digest)

    def pin(self, blocks: TokenBlocks, num_tokens: int, ttl_s: float) -> int:
        """Keeps the cached blocks of a sequence's first tokens for a time; returns how many tokens they are.

        Raises:
            InvalidValueError: more blocks would be pinned than may be.
        """
        chain: list[CachedBlock] = []
        self._cache.match(blocks, num_tokens // self._cache.block_size, chain)
        self._pins.pin(chain, ttl_s)
        return len(chain) * self._cache.block_size

    def reset_prefix_cache(self) -> None:
        """Forgets every cached block, pinned ones too, on the device and the tiers below. What runs goes on."""
        self._pins.clear()
        self._cache.clear()
        if self._tiers is not None:
            self._tiers.clear()
        self.events.flush()

    def check_integrity(self) -> None:
        """
        Raises:
            IntegrityError: the books of the KV blocks do not add up.
        """
        self._scheduler.check_integrity()

    def _check_idle(self) -> None:
        """Checks the books, at most a hundredth of the time: with many blocks that takes a while."""
        started = time.monotonic()
        if started >= self._next_check:
            self.check_integrity()
            ended = time.monotonic()
            self._next_check = ended + 100 * (ended - started)

    def _move_blocks(self, wait: bool) -> bool:
        """Has blocks copied between the device and the tiers, and takes note of what is done.

        Args:
            wait: for something to be done, a little; calls from other threads have to come in between.

        Returns:
            Whether anything was or is under way.
        """
        tiers = self._tiers
        if tiers is None:
            return False
        tiers.pump()
        while tiers.outbox:
            self._group.transfer(tiers.outbox.popleft())
        if not tiers.busy:
            return False
        result = self._group.transferred(TRANSFER_WAIT_S if wait else 0)
        while result is not None:
            tiers.finished(result)
            result = self._group.transferred(0)
        return True

    def _submit_next(self) -> bool:
        """Submits a step, if there is anything to compute."""
        started = time.perf_counter()
        schedule = self._scheduler.schedule()
        scheduled = time.perf_counter()
        self._seconds["schedule"] += scheduled - started
        if schedule is None:
            return False
        self._group.submit(schedule.plan)
        self._in_flight.append(schedule)
        self._seconds["submit"] += time.perf_counter() - scheduled
        return True

    def _collect_oldest(self) -> None:
        started = time.perf_counter()
        output = self._group.collect()
        collected = time.perf_counter()
        self._process(self._in_flight.popleft(), output)
        self._seconds["collect"] += collected - started
        self._seconds["emit"] += time.perf_counter() - collected

    def _process(self, schedule: Schedule, output: StepOutput) -> None:
        if output.step != schedule.plan.step:
            raise RuntimeError(f"the output of step {output.step} came where {schedule.plan.step}'s was due")
        self.num_steps += 1
        tokens, failed = dict(output.tokens), dict(output.failed)
        self._scheduler.complete(schedule, failed.keys())
        for entry in schedule.entries:
            request = entry.request
            if not entry.samples or entry.is_void:
                continue
            if entry.row in failed:
                request.error = failed[entry.row]
                self._emit(request, [], None, FinishReason.ERROR)
            else:
                self._take_token(request, tokens[entry.row], output.logprobs.get(entry.row))
        self._learn_cost(schedule, output)
        self._deliver()
        if not self.has_work:
            self._check_idle()

    def _learn_cost(self, schedule: Schedule, output: StepOutput) -> None:
        """What a token takes to compute: of steps that mostly compute prompts."""
        if self._tiers is None:
            return
        prefilled = sum(count for _, count in schedule.plan.computes if count > 1)
        if prefilled >= self._cache.block_size and prefilled >= len(schedule.plan.computes):
            self._tiers.cost.saw_prefill(prefilled, output.seconds)

    def _take_token(self, request: Request, token: int, logprobs: TokenLogprobs | None) -> None:
        request.generated.append(token)
        if logprobs is not None and not request.streamed:
            request.logprobs.append(logprobs)
        self.num_generated_tokens += 1
        if len(request.generated) == 1:
            request.metrics.first_token = time.monotonic()
        reason = self._stop_token(request, token)
        if reason is None and len(request.generated) >= request.max_tokens:
            reason = FinishReason.LENGTH
        self._emit(request, [token], logprobs, reason)

    def _stop_token(self, request: Request, token: int) -> FinishReason | None:
        """A stop token ends the request once min_tokens are there; end-of-sequence too, unless it is ignored."""
        if token not in request.sampling.stop_token_ids or len(request.generated) <= request.params.min_tokens:
            return None
        if token in (request.params.stop_token_ids or ()):
            request.stop_reason = token
        return FinishReason.STOP

    def _emit(
        self, request: Request, token_ids: list[int], logprobs: TokenLogprobs | None, reason: FinishReason | None
    ) -> None:
        """Turns new tokens into text, ends the request if there is a reason to, and notes its delta."""
        _, stream, sink = self._live[request.key]
        text: str | None = None
        if stream is not None:
            # A stop token is one of the tokens, but no part of the text unless that is asked for.
            hidden = reason is FinishReason.STOP and not request.params.include_stop_str_in_output
            searching = len(request.generated) > request.params.min_tokens
            text, stop = stream.add([] if hidden else token_ids, searching)
            if reason is not None and stop is None:
                rest, stop = stream.flush(searching)
                text += rest
            if stop is not None and reason in (None, FinishReason.LENGTH):
                reason, request.stop_reason = FinishReason.STOP, stop
        if reason is not None:
            del self._live[request.key]
            self._num_paused -= request.paused
            self._scheduler.finish(request, reason)
        self._new.setdefault(sink, []).append(Delta(request, token_ids, text, logprobs, reason is not None))

    def _deliver(self) -> None:
        new, self._new = self._new, {}
        for sink, deltas in new.items():
            sink(deltas)
