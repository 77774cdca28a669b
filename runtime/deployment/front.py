"""Front: the thread that a deployment runs on, and the threads that start, hear and end replicas."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from headwise.cluster.channel import ChannelError, Kind
from headwise.cluster.group import NoRoomError
from headwise.cluster.replica import Replica, ReplicaFactory
from headwise.runtime.deployment.control import Role
from headwise.runtime.deployment.deployment import Deployment, Heard
from headwise.runtime.deployment.instructions import (
    AskForNodes,
    CancelStart,
    EndReplica,
    GiveUp,
    Instruction,
    Send,
    StartReplica,
)
from headwise.runtime.deployment.messages import Add, KvEvents, KvSnapshot, Output, decode_replica, encode
from headwise.runtime.engine.loop import EngineStoppedError
from headwise.runtime.kv.events import decode_events, decode_snapshot
from headwise.workers.errors import HeadwiseError

T = TypeVar("T")

TICK_S = 0.1
_RECEIVE_S = 0.5
_END_S = 30.0
_HURRY_S = 1.0

_logger = logging.getLogger(__name__)


class NoReplicaError(HeadwiseError):
    """A deployment has no replica, and none can be started any more."""


Settings = Callable[[Role, int], dict[str, Any]]
"""The fields of the EngineConfig of the replica in a place, by its role and the place's number."""


class Front:
    """Carries out what a deployment wants done, and tells it what happens. Thread-safe.

    Attributes:
        on_change: called on the front's thread when replicas have come or gone.
    """

    def __init__(
        self,
        deployment: Deployment,
        factory: ReplicaFactory,
        settings: Settings,
        on_failure: Callable[[BaseException], None],
        check: Callable[[dict[str, Any]], object],
        vocab_size: int,
    ) -> None:
        """
        Args:
            on_failure: gets the error that ended the front, on its thread.
            check: gets what a replica says of itself, on any thread; raises HeadwiseError if it is of no use.
            vocab_size: of the model. A replica that sends another token counts as dead.
        """
        self.deployment, self._factory, self._settings, self._on_failure = deployment, factory, settings, on_failure
        self._check, self._vocab_size = check, vocab_size
        self.on_change: Callable[[], None] = lambda: None
        self.start_error: HeadwiseError | None = None
        self._functions: queue.SimpleQueue[tuple[Callable[[Deployment], Any], Future[Any] | None] | None]
        self._functions = queue.SimpleQueue()
        self._replicas: dict[str, _Hold] = {}
        self._workers: set[threading.Thread] = set()
        self._lock, self._asking, self._nodes_for = threading.Lock(), threading.Lock(), 0
        self._closing = self._hurried = False
        self._ended: BaseException | None = None
        self._settled = threading.Event()
        self._ticked = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="headwise-front", daemon=True)
        self._thread.start()

    def await_start(self) -> dict[str, Any]:
        """Waits until each replica has started, or could not. Returns what one of them says of itself.

        Raises:
            HeadwiseError: none could.
        """
        while not self._settled.wait(0.5) and self._ended is None:
            pass
        for about in self.deployment.abouts:
            return about
        raise self.start_error or self._ended or NoReplicaError("no replica has started")

    def run(self, function: Callable[[Deployment], T], timeout_s: float | None = None) -> T:
        """Runs ``function`` on the front's thread; returns or raises what it does, or raises as :meth:`submit`.

        Raises:
            TimeoutError: it was not done in time; unless it has begun, it never will be.
        """
        future = self.submit(function)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise

    def submit(self, function: Callable[[Deployment], T]) -> Future[T]:
        """As :meth:`run`, but the answer is the future's.

        Raises:
            EngineStoppedError, NoReplicaError: the front has ended.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._ended is not None:
                raise self._ended
            self._functions.put((function, future))
        return future

    def post(self, function: Callable[[Deployment], object]) -> None:
        """As :meth:`run`, but waits for nothing and raises nothing; after the front's end, does nothing."""
        if self._ended is None:  # else nobody takes it out again, and replicas may still say a lot
            self._functions.put((function, None))

    def close(self) -> None:
        """Ends the requests and the replicas. Idempotent."""
        with self._lock:
            self._closing = True
        self._functions.put(None)
        self._thread.join(_END_S)
        with self._lock:
            holds = [*self._replicas.values()]
        ending = [threading.Thread(target=hold.close, args=(not self._hurried,)) for hold in holds]
        for thread in ending:
            thread.start()
        self._factory.close()  # what is being started ends, too
        began = time.monotonic()
        for thread in [*ending, *self._workers]:  # for all together so long as for one
            limit_s = _HURRY_S if self._hurried else _END_S
            thread.join(max(0.0, began + limit_s - time.monotonic()))

    def hurry(self) -> None:
        """From now on, :meth:`close` does not wait for replicas to end by themselves."""
        self._hurried = True

    def _work(self) -> None:
        ended: BaseException = EngineStoppedError("the deployment is closed")
        try:
            while self._run_functions():
                if (now := time.monotonic()) - self._ticked >= TICK_S:
                    self._ticked = now
                    self.deployment.tick()
                self._carry_out()
        except NoReplicaError as error:
            ended = error
        except BaseException as error:
            _logger.exception("the front has failed")
            ended = EngineStoppedError(f"the front has failed: {type(error).__name__}")
            ended.__cause__ = error
        self._end(ended)

    def _run_functions(self) -> bool:
        """Runs the functions that wait, or waits for one, until something is due; False once closed."""
        due = self._ticked + TICK_S
        try:
            item = self._functions.get(timeout=max(0.0, due - time.monotonic()))
            while True:
                if item is None:
                    return False
                self._run_one(*item)
                if time.monotonic() >= due:  # more may come all the time, and clients wait for what is there
                    return True
                item = self._functions.get_nowait()
        except queue.Empty:
            return True

    def _run_one(self, function: Callable[[Deployment], Any], future: Future[Any] | None) -> None:
        if future is None:
            function(self.deployment)
            return
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function(self.deployment))
        except HeadwiseError as error:
            future.set_exception(error)
        except BaseException as error:
            future.set_exception(error)
            raise

    def _end(self, error: BaseException) -> None:
        try:
            self._on_failure(error)
        finally:
            with self._lock:
                self._ended = error
            while not self._functions.empty():
                item = self._functions.get()
                if item is not None and item[1] is not None and item[1].set_running_or_notify_cancel():
                    item[1].set_exception(error)
            self._settled.set()

    def _carry_out(self) -> None:
        out = self.deployment.out
        while out:
            todo = out[:]
            out.clear()
            for instruction in todo:
                self._follow(instruction)
        for sink, deltas in self.deployment.take_deltas().items():
            sink(deltas)
        if not self._settled.is_set() and self.deployment.settled:
            self._settled.set()

    def _follow(self, instruction: Instruction) -> None:
        """
        Raises:
            NoReplicaError: the deployment is over.
        """
        match instruction:
            case Send():
                self._send(instruction)
            case StartReplica():
                self._in_background(lambda: self._start(instruction))
            case CancelStart(name):
                self._in_background(lambda: self._factory.cancel(name))
            case EndReplica(name, ask):
                self._in_background(lambda: self._close(name, ask and not self._hurried))
            case AskForNodes(replicas):
                self._nodes_for = replicas
                self._in_background(self._ask_for_nodes)
            case GiveUp(reason):
                raise NoReplicaError(reason)

    def _send(self, instruction: Send) -> None:
        hold, message = self._replicas.get(instruction.replica), instruction.message
        if hold is None:
            return
        try:
            hold.replica.channel.send(0, Kind.STEP, encode(message))
        except ChannelError as error:
            self.deployment.died(instruction.replica, str(error))
        except ValueError as error:
            if not isinstance(message, Add):
                raise
            self.deployment.unsendable(message.number, f"the request is too large to be sent to a replica: {error}")

    def _in_background(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except Exception:
                _logger.exception("a replica could not be looked after")
            finally:
                self._workers.discard(thread)

        thread = threading.Thread(target=run, name="headwise-replicas", daemon=True)
        self._workers.add(thread)
        thread.start()

    def _ask_for_nodes(self) -> None:
        with self._asking:  # one after another, and the last for as many as are wanted by then
            self._factory.ask_for_nodes(self._nodes_for)

    def _start(self, instruction: StartReplica) -> None:
        name, settings = instruction.name, self._settings(instruction.role, instruction.place)

        def died(name: str, cause: str) -> None:
            self.post(lambda deployment: deployment.died(name, cause))

        try:
            if instruction.extra and not self._factory.has_room(settings):
                raise NoRoomError("there is no room for one more replica")
            replica = self._factory.start(name, settings, died)
            try:
                self._check(replica.about)
            except HeadwiseError:
                replica.close()
                raise
        except Exception as error:
            problem, no_room = str(error), isinstance(error, NoRoomError)
            if not isinstance(error, HeadwiseError):
                _logger.exception("%s could not be started", name)
                problem = f"{type(error).__name__}: {error}"
            elif self.start_error is None:
                self.start_error = error
            self.post(lambda deployment: self._failed_to_start(deployment, name, problem, no_room))
            return
        hold = _Hold(replica, self.post, self._vocab_size)
        with self._lock:
            closing = self._closing
            if not closing:
                self._replicas[name] = hold
        if closing:
            hold.close(ask=False)
        else:
            self.post(lambda deployment: self._started(deployment, hold))

    def _started(self, deployment: Deployment, hold: _Hold) -> None:
        replica = hold.replica
        if deployment.started(replica.name, replica.node, replica.pid, replica.about):
            hold.listen()
            self.on_change()
        else:
            self._in_background(lambda: self._close(replica.name, False))

    def _failed_to_start(self, deployment: Deployment, name: str, problem: str, no_room: bool) -> None:
        deployment.start_failed(name, problem, no_room)
        deployment.closed(name)

    def _close(self, name: str, ask: bool) -> None:
        hold = self._replicas.get(name)
        try:
            if hold is not None:
                hold.close(ask)
        finally:
            with self._lock:
                self._replicas.pop(name, None)
            self.post(lambda deployment: self._closed(deployment, name))

    def _closed(self, deployment: Deployment, name: str) -> None:
        deployment.closed(name)
        self.on_change()


class _Hold:
    """A replica that has started, and the thread that hears it."""

    def __init__(
        self, replica: Replica, post: Callable[[Callable[[Deployment], object]], None], vocab_size: int
    ) -> None:
        self.replica, self._post, self._vocab_size = replica, post, vocab_size
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="headwise-hear", daemon=True)

    def listen(self) -> None:
        """Begins to tell the deployment what the replica says."""
        if not self._over.is_set():
            self._thread.start()

    def close(self, ask: bool) -> None:
        """Ends the replica; waits until it is gone, for a limited time."""
        try:
            self.replica.close(ask)
        finally:
            self._over.set()
            self.replica.channel.wake()
            if self._thread.is_alive():
                self._thread.join(_END_S)

    def _listen(self) -> None:
        name, channel = self.replica.name, self.replica.channel
        while not self._over.is_set():
            got = channel.receive(_RECEIVE_S)
            if got is None:
                continue
            try:
                heard = _heard(got[0], got[2], self._vocab_size)
            except ValueError as error:
                cause = f"it has sent what is no message: {error}"
                self._post(lambda deployment, cause=cause: deployment.died(name, cause))  # type: ignore[misc]
                return
            self._post(lambda deployment, heard=heard: deployment.heard(name, heard))  # type: ignore[misc]


def _heard(kind: Kind, payload: bytes, vocab_size: int) -> Heard:
    """
    Raises:
        ValueError: it is no message of a replica.
    """
    if kind != Kind.OUTPUT:
        raise ValueError(f"kind {kind.name}")
    message = decode_replica(payload)
    if isinstance(message, KvEvents):
        return decode_events(message.data)
    if isinstance(message, KvSnapshot):
        return decode_snapshot(message.data)
    if isinstance(message, Output):
        for delta in message.deltas:
            if max(delta.token_ids, default=0) >= vocab_size:
                raise ValueError(f"the model has no token {max(delta.token_ids)}")
    return message
