"""AsyncModel: requests to a model from an asyncio program. Each is a stream that holds a bounded number of increments.

What computes them runs on a thread of its own: an engine of this process (aio.py), or the front of a deployment.
"""

from __future__ import annotations

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar, get_args

from headwise.runtime.config import EngineConfig
from headwise.runtime.engine.engine import Sink
from headwise.runtime.engine.request import Request, RequestState
from headwise.runtime.engine.text import Delta, TextStream
from headwise.runtime.engine.waiting import share
from headwise.runtime.handoff.service import HandoffService
from headwise.runtime.inputs.processor import InputProcessor, check_request_id
from headwise.workers.errors import HeadwiseError, InvalidValueError

T = TypeVar("T")
Lane = Literal["text", "grammar"]

MAX_BUFFERED = 64
"""Deltas of each sample that may wait in a stream before its request is paused; the steps in flight add a few."""


class QueueFullError(HeadwiseError):
    """Too many requests wait: this engine is busy. Try again later, or ask another engine."""

    def __init__(self, waiting: int, limit: int) -> None:
        self.waiting, self.limit = waiting, limit
        super().__init__(
            f"{waiting} requests wait, max_queued_requests={limit} (--max-queued-requests); try again later"
        )


class TenantBusyError(HeadwiseError):
    """A tenant has its share of something that tenants share; others are served. Try again later."""


class Computes(Protocol):
    """What computes requests, on its own thread: see :class:`~headwise.runtime.engine.engine.Engine`."""

    @property
    def num_waiting(self) -> int: ...

    def num_waiting_of(self, tenant: str) -> int: ...

    def add(self, request: Request, text: TextStream | None, sink: Sink) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def pause(self, request_id: str, paused: bool) -> None: ...

    def reset_prefix_cache(self) -> None: ...

    def stats(self) -> dict[str, Any]: ...


E = TypeVar("E", bound=Computes)
E_co = TypeVar("E_co", bound=Computes, covariant=True)


class Loop(Protocol[E_co]):
    """That thread: see :class:`~headwise.runtime.engine.loop.EngineLoop`."""

    def submit(self, function: Callable[[E_co], T]) -> Future[T]: ...

    def post(self, function: Callable[[E_co], object]) -> None: ...

    def close(self) -> None: ...

    def hurry(self) -> None: ...


class AsyncModel(ABC, Generic[E]):
    """A model that is loaded, for one asyncio event loop. Create it and call its methods in that loop's thread.

    Attributes:
        inputs: checks prompts and parameters, and makes requests of them.
        config: the settings it was built with.
        model_path: the model's directory.
        dtype: the dtype of the weights, once ``auto`` is resolved.
        failure: the error that ended what computes; None while that runs.
    """

    def __init__(
        self, config: EngineConfig, model_path: Path, dtype: str, inputs: InputProcessor, max_queued_requests: int
    ) -> None:
        self.config, self.model_path, self.dtype, self.inputs = config, model_path, dtype, inputs
        self.failure: BaseException | None = None
        self.max_queued_requests = max_queued_requests
        self._numbers = itertools.count()
        self._streams: dict[str, _Stream] = {}
        self._new: deque[list[Delta]] = deque()
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._ended = asyncio.Event()
        self._lanes = {lane: ThreadPoolExecutor(1, f"headwise-{lane}") for lane in get_args(Lane)}

    @property
    @abstractmethod
    def _loop(self) -> Loop[E]: ...

    @property
    @abstractmethod
    def num_blocks(self) -> int:
        """How many KV blocks there are."""

    @property
    @abstractmethod
    def max_running(self) -> int:
        """Most requests that are ever computed at the same time."""

    @property
    @abstractmethod
    def is_handing_over(self) -> bool:
        """Whether a prompt is computed for a peer."""

    @property
    @abstractmethod
    def pause_reason(self) -> str | None:
        """Why requests are not computed just now, but will be; None if they are."""

    @property
    @abstractmethod
    def hang(self) -> str | None:
        """Why nobody knows whether requests will be computed; None if they will."""

    @abstractmethod
    def handoff_service(self) -> HandoffService | None:
        """What other engines have this one compute prompts by; None where its role is not to do that."""

    @property
    def ended(self) -> asyncio.Event:
        """Is set once what computes has ended. Ask for it in the event loop."""
        self._attach()
        return self._ended

    @property
    def num_streams(self) -> int:
        """How many requests run or wait now."""
        return len(self._streams)

    def next_number(self) -> int:
        """The number of a new request, for its name and its default seed."""
        return next(self._numbers)

    async def off_loop(self, function: Callable[[], T], lane: Lane | None = None) -> T:
        """Runs a function that checks a request on another thread, so that the event loop does not wait for it.

        Args:
            lane: for checks that may take long; those of one lane run one after another. None is for quick checks,
                which never wait for those of a lane.
        """
        executor = self._lanes[lane] if lane is not None else None
        return await asyncio.get_running_loop().run_in_executor(executor, function)

    async def stream(self, requests: Sequence[Request]) -> AsyncGenerator[list[Delta]]:
        """Runs the samples of one request; yields their new increments until each sample has had its last.

        Leaving the stream early, by a cancellation too, aborts the samples that still run. While the caller does not
        take what is yielded, the request is paused after MAX_BUFFERED increments a sample.

        Raises:
            InvalidValueError: a request with this id still runs, these ran before, are not the samples of one request,
                or are more than may ever wait.
            QueueFullError: too many requests wait.
            TenantBusyError: too many requests of the tenant wait.
            EngineStoppedError, ShardGroupDied: the engine has ended.
        """
        request_id = requests[0].request_id
        if request_id in self._streams:
            raise InvalidValueError("request_id", request_id, "a request with this id still runs")
        self._check_samples(requests)
        stream = self._streams[request_id] = _Stream(requests)
        try:
            await self.run(lambda engine: self._add(engine, requests))
            while stream.running:
                deltas = await stream.take()
                if stream.paused:
                    stream.paused = False
                    self._loop.post(partial(_pause, request_id, False))
                yield deltas
        finally:
            del self._streams[request_id]
            if stream.running:
                self._loop.post(lambda engine: engine.abort(request_id))

    def abort(self, request_id: str) -> None:
        """Ends a request; its stream yields the last increments, with the finish_reason ``abort``.

        Raises:
            InvalidValueError: request_id is no string.
        """
        check_request_id(request_id)
        self._loop.post(lambda engine: engine.abort(request_id))

    async def reset_prefix_cache(self) -> None:
        """Empties the prefix cache; see :meth:`headwise.runtime.llm.LLM.reset_prefix_cache`."""
        await self.run(lambda engine: engine.reset_prefix_cache())

    async def run(self, function: Callable[[E], T]) -> T:
        """Runs ``function`` on the thread that computes, between two steps; returns or raises what ``function`` does.

        Raises:
            EngineStoppedError, ShardGroupDied: the engine has ended.
        """
        self._attach()
        return await asyncio.wrap_future(self.submit(function))

    def submit(self, function: Callable[[E], T]) -> Future[T]:
        """As :meth:`run`, but for any thread, and returns a future."""
        return self._loop.submit(function)

    async def stats(self) -> dict[str, Any]:
        """What is held and was done: ``Engine.stats``, without those of the shards."""
        return await self.run(lambda engine: engine.stats())

    def stats_within(self, timeout_s: float) -> dict[str, Any]:
        """As :meth:`stats`, for any thread but the event loop's.

        Raises:
            TimeoutError: the engine did not answer in time.
        """
        return self.submit(lambda engine: engine.stats()).result(timeout_s)

    async def close(self) -> None:
        """Ends the requests that run, and what computes them. Idempotent."""
        await asyncio.to_thread(self.shutdown)

    def shutdown(self) -> None:
        """As :meth:`close`, for where no event loop runs."""
        for executor in self._lanes.values():
            executor.shutdown(cancel_futures=True)
        self._loop.close()

    def hurry(self) -> None:
        """From now on, :meth:`close` waits only a moment for the step in progress."""
        self._loop.hurry()

    def _check_samples(self, requests: Sequence[Request]) -> None:
        """
        Raises:
            InvalidValueError: these are not the samples of one request, or more than may ever wait.
        """
        if len({request.key for request in requests if request.request_id == requests[0].request_id}) < len(requests):
            raise InvalidValueError("requests", len(requests), "must be the samples of one request, each once")
        limit, of_tenant = self.max_queued_requests, ""
        if requests[0].tenant:
            limit, of_tenant = share(limit, 0), "a tenant may have half of "
        if len(requests) > limit:
            text = f"max_queued_requests={self.max_queued_requests} (--max-queued-requests) may wait, each sample one"
            raise InvalidValueError("n", len(requests), of_tenant + text)

    def _add(self, engine: E, requests: Sequence[Request]) -> None:
        if any(request.state is not RequestState.WAITING for request in requests):
            raise InvalidValueError("requests", requests[0].request_id, "ran before; make new ones")
        waiting, limit, tenant = engine.num_waiting, self.max_queued_requests, requests[0].tenant
        if waiting + len(requests) > limit:
            raise QueueFullError(waiting, limit)
        own = engine.num_waiting_of(tenant)
        if tenant and own + len(requests) > (most := share(limit, waiting - own)):
            raise TenantBusyError(
                f"{own} requests of tenant {tenant} wait; half of what others leave free of the queue may, "
                f"now {most} of max_queued_requests={limit} (--max-queued-requests); try again later"
            )
        for request in requests:
            engine.add(request, self.inputs.text_stream(request.params), self._take)

    def _take(self, deltas: list[Delta]) -> None:
        """Called on the engine's thread, once a step for all streams: the event loop is woken once a step."""
        self._new.append(deltas)
        # In this order: if more than one is there, whoever takes the others has not looked for the last time.
        if len(self._new) == 1:
            self._call_soon(self._distribute)

    def _distribute(self) -> None:
        while self._new:
            for delta in self._new.popleft():
                stream = self._streams.get(delta.request.request_id)
                if stream is None or delta.request not in stream.requests:
                    continue  # left, and maybe another has its id now
                stream.put(delta)
                limit = MAX_BUFFERED * len(stream.requests)
                if stream.num_buffered >= limit and not stream.paused and stream.running:
                    stream.paused = True
                    self._loop.post(partial(_pause, delta.request.request_id, True))

    def _attach(self) -> None:
        """Has the running event loop told when the engine ends, or tells it now if the engine has ended already."""
        self._event_loop = asyncio.get_running_loop()
        if self.failure is not None:
            self._tell()

    def _fail(self, error: BaseException) -> None:
        """Called on the engine's thread when the engine has ended."""
        self.failure = error  # before the event loop is looked for: one that comes in between looks for the failure
        self._call_soon(self._tell)

    def _tell(self) -> None:
        assert self.failure is not None
        self._distribute()  # what came before the end
        self._ended.set()
        for stream in self._streams.values():
            stream.fail(self.failure)

    def _call_soon(self, callback: Callable[[], None]) -> None:
        if self._event_loop is not None:
            with suppress(RuntimeError):  # the event loop is closed, and nobody waits there any more
                self._event_loop.call_soon_threadsafe(callback)


def _pause(request_id: str, paused: bool, engine: Computes) -> None:
    engine.pause(request_id, paused)


class _Stream:
    """The increments of one request's samples that the caller has not taken yet. Used on the event loop only."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = frozenset(requests)
        self.running, self.paused = len(requests), False
        self._deltas: list[Delta] = []
        self._error: BaseException | None = None
        self._ready = asyncio.Event()

    @property
    def num_buffered(self) -> int:
        return len(self._deltas)

    def put(self, delta: Delta) -> None:
        self._deltas.append(delta)
        self._ready.set()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._ready.set()

    async def take(self) -> list[Delta]:
        """Everything that is there; waits until there is something."""
        await self._ready.wait()
        self._ready.clear()
        if not self._deltas and self._error is not None:
            self.running = 0
            raise self._error
        deltas, self._deltas = self._deltas, []
        self.running -= sum(delta.finished for delta in deltas)
        if self._error is not None:
            self._ready.set()
        return deltas
