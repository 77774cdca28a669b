"""EngineLoop: the thread an engine runs on, and the way in for every other thread.

A typed error that a function raises, as where an argument is wrong or a queue is full, goes to the function's caller
alone. After a shard's death the loop runs on without shards, until it has others. Every other error ends the loop, and
so do books that do not add up: nobody knows then what state the engine is in.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from headwise.cluster.group import ShardGroupDied
from headwise.runtime.engine.engine import Engine
from headwise.runtime.engine.recovery import Recovery
from headwise.runtime.kv.blocks import IntegrityError
from headwise.workers.errors import HeadwiseError

T = TypeVar("T")


class EngineStoppedError(HeadwiseError):
    """The engine was closed, or failed; no request can run on it any more."""


_HURRY_S = 1.0


class EngineLoop:
    """Steps an engine while it has work and sleeps while it has none. Thread-safe."""

    def __init__(
        self, engine: Engine, on_failure: Callable[[BaseException], None], recovery: Recovery | None = None
    ) -> None:
        """
        Args:
            on_failure: gets the error that ended the loop, on its thread, before it reaches a caller of :meth:`run`.
            recovery: finds the engine other shards when its own have died; started here. None: their death ends the
                loop.
        """
        self._engine, self._on_failure, self._recovery = engine, on_failure, recovery
        self._functions: queue.SimpleQueue[tuple[Callable[[Engine], Any], Future[Any] | None] | None]
        self._functions = queue.SimpleQueue()
        self._failing: Future[Any] | None = None
        self._closing = False
        self._lock = threading.Lock()
        self._ended: BaseException | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="headwise-engine", daemon=True)
        self._thread.start()
        if recovery is not None:
            try:
                recovery.start(self)
            except BaseException:  # such as no more threads
                self.close()
                raise

    @property
    def engine(self) -> Engine:
        """The engine, for code that runs on its thread."""
        return self._engine

    @property
    def ended(self) -> BaseException | None:
        """What ended the loop; None while it runs. May be read on any thread."""
        return self._ended

    def run(self, function: Callable[[Engine], T], timeout_s: float | None = None) -> T:
        """Runs ``function`` on the engine's thread between two steps and returns what it returns.

        Raises:
            HeadwiseError: ``function`` raised it; the engine runs on.
            EngineStoppedError: the loop was closed, or the engine failed, maybe in ``function``.
            ShardGroupDied: a shard died, and the loop has ended.
            TimeoutError: no answer in time; the function may still run.
        """
        return self.submit(function).result(timeout_s)

    def submit(self, function: Callable[[Engine], T]) -> Future[T]:
        """As :meth:`run`, but the answer is the future's. A function whose future is cancelled in time does not run.

        Raises:
            EngineStoppedError, ShardGroupDied: the loop has ended.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._ended is not None:
                raise self._ended
            self._functions.put((function, future))
        return future

    def post(self, function: Callable[[Engine], object]) -> None:
        """As :meth:`run`, but waits for nothing and raises nothing; after the loop's end, does nothing. There is no
        caller to tell, so whatever error ``function`` raises ends the loop.

        Takes no lock: it may run anywhere, in a finalizer on the engine's own thread too.
        """
        self._functions.put((function, None))

    def close(self, timeout_s: float = 30.0) -> None:
        """Ends the loop after the step in progress; close the engine's group next, which ends a step that took longer
        than ``timeout_s``. Idempotent."""
        self._closing = True
        self._functions.put(None)
        # A forgotten LLM may be collected on the engine's thread, which cannot wait for itself.
        if threading.current_thread() is not self._thread:
            self._over.wait(timeout_s)
            self._thread.join(_HURRY_S)

    def hurry(self) -> None:
        """Has :meth:`close`, now or later, wait only a moment for the step in progress, which may never end."""
        self._over.set()

    def _work(self) -> None:
        ended: BaseException = EngineStoppedError("the engine is closed")
        try:
            while self._run_functions():
                if self._engine.has_work:
                    self._step()
        except ShardGroupDied as death:
            if not self._closing:  # else the group was closed under a step that did not end
                ended = death
        except BaseException as error:
            detail = f": {error}" if isinstance(error, HeadwiseError) else ""
            ended = EngineStoppedError(f"the engine has failed: {type(error).__name__}{detail}")
            ended.__cause__ = error
        try:
            self._end(ended)
        finally:
            self._over.set()
            self._engine.leave_peers()

    def _step(self) -> None:
        self._engine.busy_since = time.monotonic()
        try:
            self._engine.step()
        except ShardGroupDied as death:
            if not self._goes_on(death):
                raise
        finally:
            self._engine.busy_since = None

    def _goes_on(self, death: ShardGroupDied) -> bool:
        """Whether the engine goes on after the death of its group, for now without one."""
        return not self._closing and self._recovery is not None and self._recovery.lost(death)

    def _run_functions(self) -> bool:
        """Runs the functions that wait, or waits for one if the engine has nothing to do; False once closed."""
        while True:
            try:
                item = self._functions.get(block=not self._engine.has_work)
            except queue.Empty:
                return True
            if item is None:
                return False
            self._run_one(*item)

    def _run_one(self, function: Callable[[Engine], Any], future: Future[Any] | None) -> None:
        if future is not None and not future.set_running_or_notify_cancel():
            return  # nobody waits for it any more, as when a client's deadline is over
        self._engine.busy_since = time.monotonic()
        try:
            result = self._call(function)
        except BaseException as error:
            if future is None and self._is_known(error):
                return
            if future is None or not self._is_for_caller(error):
                self._failing = future
                raise
            future.set_exception(error)
        else:
            if future is not None:
                future.set_result(result)
        finally:
            self._engine.busy_since = None

    def _call(self, function: Callable[[Engine], T]) -> T:
        """Runs a function; once more, on an engine without shards, if the shards have died in it."""
        try:
            return function(self._engine)
        except ShardGroupDied as death:
            if self._recovery is None or self._engine.rebuilding or not self._goes_on(death):
                raise
        return function(self._engine)

    def _is_for_caller(self, error: BaseException) -> bool:
        if isinstance(error, ShardGroupDied):
            # The group that was to take another's place has died before it could.
            return self._recovery is not None and self._engine.rebuilding
        return isinstance(error, HeadwiseError) and not isinstance(error, IntegrityError)

    def _is_known(self, error: BaseException) -> bool:
        """Whether it is the death after which the engine waits for another group."""
        engine = self._engine
        return self._recovery is not None and engine.rebuilding and error is engine.generation.group.death

    def _end(self, error: BaseException) -> None:
        try:
            self._on_failure(error)
        finally:
            with self._lock:  # no function comes after it
                self._ended = error
            if self._failing is not None:
                self._failing.set_exception(error)
            while not self._functions.empty():
                item = self._functions.get()
                if item is not None and item[1] is not None and item[1].set_running_or_notify_cancel():
                    item[1].set_exception(error)


def is_hung(engine: Engine) -> bool:
    """Whether the current step, or a call between two steps, makes no progress. May be called on any thread."""
    since = engine.busy_since
    return since is not None and time.monotonic() - since > engine.step_limit_s
