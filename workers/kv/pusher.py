"""Sends KV blocks of this rank to the ranks of other groups, on threads beside the steps."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from headwise.workers import failpoints
from headwise.workers.errors import HeadwiseError, InvalidValueError
from headwise.workers.failpoints import Point
from headwise.workers.kv.cache import KVCache
from headwise.workers.kv.chunk import Chunk
from headwise.workers.kv.handoff import Fence, HandoffJob, HandoffSpec, KvEndpoint, Range
from headwise.workers.kv.kv_transport import (
    Cancellation,
    GrpcTransport,
    KvTransport,
    SharedMemoryTransport,
    UnreadableError,
)
from headwise.workers.kv.routes import head_routes
from headwise.workers.kv.shared_file import host_id
from headwise.workers.kv.transfer import TransferResult

MAX_DESTINATIONS = 64
"""Ranks of decode that are sent to, or were lately."""

IDLE_S = 30.0
"""A destination that nothing was sent to for so long costs no thread, connection and memory any more."""

Connect = Callable[[KvEndpoint], list[KvTransport]]
"""The ways to a rank of decode, best first; at least one."""

_END_S = 2.0
_logger = logging.getLogger(__name__)


def connect(spec: HandoffSpec) -> Connect:
    """The ways there are by ``spec``: shared memory where both ends are on one host, and gRPC."""
    here = host_id() if spec.shared_memory else b""

    def ways(end: KvEndpoint) -> list[KvTransport]:
        grpc = GrpcTransport(end.address, spec)
        return [SharedMemoryTransport(end.address, spec), grpc] if here and here == end.host_id else [grpc]

    return ways


class Pusher:
    """A thread for each destination, so that a slow one holds up nobody else; what it gets is sent in order."""

    def __init__(
        self,
        kv_cache: KVCache,
        heads: Sequence[Range],
        rank: int,
        connect: Connect,
        done: Callable[[TransferResult], None],
        idle_s: float = IDLE_S,
    ) -> None:
        """
        Args:
            heads: the KV heads of each rank of this group.
            rank: this one.
            done: gets the result of each job, on any thread; must neither raise nor wait.
        """
        self._kv_cache, self._heads, self._rank, self._connect, self._done = kv_cache, heads, rank, connect, done
        self._idle_s, self._closed = idle_s, False
        self._changed = threading.Condition()
        self._destinations: dict[KvEndpoint, _Destination] = {}
        self._pushes: list[_Push] = []

    def push(self, job: HandoffJob) -> None:
        """Queue a push; returns at once."""
        push = _Push(job, time.monotonic() + job.timeout_s)
        with self._changed:
            try:
                parts = self._split(push)
                queues = [self._destination(end).queue for end, _ in parts]
            except (InvalidValueError, RuntimeError) as error:  # the latter if the system has no thread
                self._done(TransferResult(job.id, error=str(error)))
                return
            if not parts:
                self._done(TransferResult(job.id))
                return
            push.left = len(parts)
            self._pushes.append(push)
            for queue, (_, part) in zip(queues, parts, strict=True):
                queue.append(part)
            self._changed.notify_all()

    def stop(self, job: HandoffJob) -> None:
        """Ends the pushes of an attempt; the result comes after theirs, and nothing of them is sent after it."""
        with self._changed:
            mine = [push for push in self._pushes if _attempt(push.job.fence) == _attempt(job.fence)]
            stop = _Stop(job.id, len(mine))
            for push in mine:
                push.stops.append(stop)
                self._give_up(push, "it was stopped")
            if not mine:
                self._done(TransferResult(job.id))

    def expire(self) -> float | None:
        """Ends the pushes whose time is over; returns the seconds until the next one's is, if there is one."""
        with self._changed:
            now = time.monotonic()
            for push in [push for push in self._pushes if push.deadline <= now]:
                self._give_up(push, f"it was not through after timeout_s={push.job.timeout_s:g}")
            return min((push.deadline - now for push in self._pushes if not push.error), default=None)

    def close(self) -> bool:
        """Ends what runs. Idempotent. Returns whether the threads have ended."""
        with self._changed:
            self._closed = True
            for push in list(self._pushes):
                self._give_up(push, "the rank ends")
            self._changed.notify_all()
            threads = [destination.thread for destination in self._destinations.values()]
        deadline = time.monotonic() + _END_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _split(self, push: _Push) -> list[tuple[KvEndpoint, _Part]]:
        """
        Raises:
            InvalidValueError: the ranks of decode have a head that this group has not; there are too many of them.
        """
        job = push.job
        parts = []
        routes = head_routes(self._heads, [end.heads for end in job.destinations])
        for rank, end in enumerate(job.destinations):
            mine = [(r.start, r.stop) for r in routes if (r.source, r.destination) == (self._rank, rank)]
            if mine and job.blocks:
                parts.append((end, _Part(push, rank, mine)))
        if len(self._destinations.keys() | {end for end, _ in parts}) > MAX_DESTINATIONS:
            limit = f"a rank sends to at most {MAX_DESTINATIONS} ranks"
            raise InvalidValueError("destinations", len(self._destinations), limit, "try again later")
        return parts

    def _chunks(self, job: HandoffJob, heads: Range, most: int) -> Iterator[Chunk]:
        """Several blocks in each, or where one has more than ``most`` bytes some layers of one."""
        cache, count = self._kv_cache, heads[1] - heads[0]
        num_layers = min(cache.num_layers, max(1, most // cache.range_bytes(1, count, 1)))
        num_blocks = max(1, most // cache.range_bytes(1, count, cache.num_layers))
        for start in range(0, len(job.blocks), num_blocks):
            blocks = min(num_blocks, len(job.blocks) - start)
            for layer in range(0, cache.num_layers, num_layers):
                layers = layer, min(layer + num_layers, cache.num_layers)
                size = cache.range_bytes(blocks, count, layers[1] - layers[0])
                place = (job.first + start, blocks, layers, heads, str(cache.format), size)
                yield Chunk(job.fence, self._rank, 0, False, *place)

    def _destination(self, end: KvEndpoint) -> _Destination:
        if end not in self._destinations:
            destination = _Destination()
            destination.thread = threading.Thread(
                target=self._run, args=(end, destination), name="headwise-kv-push", daemon=True
            )
            destination.thread.start()
            self._destinations[end] = destination
        return self._destinations[end]

    def _run(self, end: KvEndpoint, destination: _Destination) -> None:
        ways: list[KvTransport] = []
        while (part := self._next(end, destination)) is not None:
            error, num_bytes = "", 0
            try:
                ways = ways or self._connect(end)
                num_bytes = self._send(ways, part)
            except Exception as failure:
                known = isinstance(failure, HeadwiseError)
                error = (
                    f"rank {part.rank} at {end.address}: "
                    + ("" if known else f"{type(failure).__name__}: ")
                    + str(failure)
                )
                while ways:  # the next push is not to suffer from what is wrong with these
                    ways.pop().close()
            self._over(destination, part, error, num_bytes)
        for way in ways:
            way.close()

    def _next(self, end: KvEndpoint, destination: _Destination) -> _Part | None:
        with self._changed:
            self._changed.wait_for(lambda: destination.queue or self._closed, self._idle_s)
            if self._closed or not destination.queue:
                del self._destinations[end]
                return None
            destination.running = destination.queue.popleft()
            return destination.running

    def _send(self, ways: list[KvTransport], part: _Part) -> int:
        job = part.push.job

        def read(chunk: Chunk, out: memoryview) -> None:
            if failpoints.ENABLED:
                failpoints.hit(Point.HANDOFF_PUSH, self._rank)
            start, own = chunk.first - job.first, self._heads[self._rank][0]
            heads = chunk.heads[0] - own, chunk.heads[1] - own
            self._kv_cache.read_range(job.blocks[start : start + chunk.num_blocks], heads, chunk.layers, out)

        while True:
            chunks = [chunk for heads in part.heads for chunk in self._chunks(job, heads, ways[0].chunk_bytes)]
            try:
                return ways[0].push(chunks, read, part.cancellation, part.push.deadline)
            except UnreadableError as error:
                if len(ways) == 1:
                    raise
                _logger.warning("KV does not go through shared memory: %s", error)
                ways.pop(0).close()

    def _over(self, destination: _Destination, part: _Part, error: str, num_bytes: int) -> None:
        with self._changed:
            destination.running = None
            push = part.push
            push.left, push.num_bytes = push.left - 1, push.num_bytes + num_bytes
            if error:
                self._give_up(push, error)
            else:
                self._end_if_through(push)

    def _give_up(self, push: _Push, error: str) -> None:
        """What runs of it is cut, and what waits is forgotten: without one of its parts the others are of no use."""
        push.error = push.error or error
        for destination in self._destinations.values():
            mine = [part for part in destination.queue if part.push is push]
            for part in mine:
                destination.queue.remove(part)
            push.left -= len(mine)
            if destination.running is not None and destination.running.push is push:
                destination.running.cancellation.set()
        self._end_if_through(push)

    def _end_if_through(self, push: _Push) -> None:
        if push.left or push not in self._pushes:
            return
        self._pushes.remove(push)
        seconds = time.monotonic() - push.begun
        self._done(TransferResult(push.job.id, seconds=seconds, error=push.error, num_bytes=push.num_bytes))
        for stop in push.stops:
            stop.left -= 1
            if not stop.left:
                self._done(TransferResult(stop.id))


@dataclass(eq=False, slots=True)
class _Stop:
    id: int
    left: int


@dataclass(eq=False, slots=True)
class _Push:
    """
    Attributes:
        left: its parts that run or wait.
        stops: the jobs that wait for its end.
    """

    job: HandoffJob
    deadline: float
    begun: float = field(default_factory=time.monotonic)
    left: int = 0
    error: str = ""
    num_bytes: int = 0
    stops: list[_Stop] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _Part:
    """What a push has for one rank."""

    push: _Push
    rank: int
    heads: list[Range]
    cancellation: Cancellation = field(default_factory=Cancellation)


class _Destination:
    """A rank of decode: what waits to be sent to it, in order, and what is."""

    def __init__(self) -> None:
        self.queue: deque[_Part] = deque()
        self.running: _Part | None = None
        self.thread: threading.Thread


def _attempt(fence: Fence) -> tuple[bytes, int, int]:
    return fence.transfer, fence.attempt, fence.epoch
