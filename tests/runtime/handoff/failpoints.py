"""Stops a handoff in each of its states, until a test has done what it came for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from headwise.runtime.engine import prefilling
from headwise.runtime.handoff.messages import TransferKey
from headwise.runtime.handoff.service import HandoffService
from headwise.workers.kv.handoff import HandoffJob, HandoffOp
from tests.runtime.handoff.conftest import DEADLINE_S
from tests.runtime.handoff.sides import Sides, handoff_ranks

STATES = ("opening", "asking", "answering", "computing", "between pushes", "pushing", "filled", "committing")


class Failpoint:
    """One handoff comes here, and goes on once :meth:`release` is called.

    Attributes:
        reached: it has come.
    """

    def __init__(self) -> None:
        self.reached, self._go = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._held: list[Callable[[], object]] = []

    @property
    def is_over(self) -> bool:
        return self._go.is_set()

    def hold(self, action: Callable[[], object]) -> None:
        """Does it once the handoff may go on; what is held is done in order."""
        with self._lock:
            if not self._go.is_set():
                self._held.append(action)
                self.reached.set()
                return
        action()

    def wait(self) -> None:
        """Stops the thread that comes here."""
        self.reached.set()
        assert self._go.wait(DEADLINE_S)

    def release(self) -> None:
        with self._lock:
            self._go.set()
            held, self._held = self._held, []
        for action in held:
            action()


@contextmanager
def stopped_at(sides: Sides, state: str) -> Iterator[Failpoint]:
    """Stops the next handoff that comes to a state. Whatever is left of the failpoint is gone in the end."""
    point, undo = Failpoint(), list[Callable[[], None]]()

    def replace(owner: Any, name: str, value: Any) -> Any:
        original = getattr(owner, name)
        undo.append(lambda: setattr(owner, name, original))
        setattr(owner, name, value)
        return original

    _SET[state](sides, point, replace)
    try:
        yield point
    finally:
        point.release()
        for one in undo:
            one()


Replace = Callable[[Any, str, Any], Any]


def _opening(sides: Sides, point: Failpoint, replace: Replace) -> None:
    """The ranks of decode have not heard of the fence. What comes after it waits, too: jobs keep their order."""

    def send(job: Any) -> None:
        if isinstance(job, HandoffJob) and (job.op is HandoffOp.OPEN or point.reached.is_set()) and not point.is_over:
            point.hold(lambda: sides.llm._loop.post(lambda engine: original(job)))
        else:
            original(job)

    original = replace(sides.inbound._ledger, "_send", send)


def _asking(sides: Sides, point: Failpoint, replace: Replace) -> None:
    """Prefill has not heard of the transfer."""
    [peer] = sides.inbound.peers
    original = replace(peer, "ask", lambda *args: point.hold(lambda: original(*args)))


def _answering(sides: Sides, point: Failpoint, replace: Replace) -> None:
    """Prefill has accepted the prompt; decode has not heard of it."""

    def answer(service: HandoffService, method: str, request: Any, peer: str) -> Future[Any]:
        answer: Future[Any] = original(service, method, request, peer)
        if method != "Prefill":
            return answer
        held: Future[Any] = Future()
        answer.add_done_callback(lambda answer: point.hold(lambda: _pass_on(answer, held)))
        return held

    original = replace(HandoffService, "answer", answer)


def _pass_on(answer: Future[Any], to: Future[Any]) -> None:
    if to.set_running_or_notify_cancel():
        to.set_result(answer.result())


def _computing(sides: Sides, point: Failpoint, replace: Replace) -> None:
    """Prefill has queued the prompt, and computes nothing of it."""
    prompts = sides.outbound.prompts

    def start(ask: Any) -> None:
        original(ask)
        _pause(sides, point, ask.key)

    original = replace(prompts, "start", start)


def _between(sides: Sides, point: Failpoint, replace: Replace) -> None:
    """Some blocks are pushed, and the next are not computed."""

    def computed(key: TransferKey, seat: Any, num_tokens: int) -> None:
        original(key, seat, num_tokens)
        if not point.reached.is_set():
            _pause(sides, point, key)

    original = replace(sides.outbound, "computed", computed)


def _pause(sides: Sides, point: Failpoint, key: TransferKey) -> None:
    name, loop = prefilling._name(key), sides.prefill.loop
    loop.engine.pause(name, True)
    point.hold(lambda: loop.post(lambda engine: engine.pause(name, False)))


def _pushing(sides: Sides, point: Failpoint, replace: Replace) -> None:
    """The first blocks are written at decode, and a rank of prefill reads the next."""
    cache = handoff_ranks(sides.prefill_group)[0]._pusher._kv_cache
    calls: list[None] = []

    def read_range(*args: Any) -> None:
        calls.append(None)
        if len(calls) == 2:
            point.wait()
        original(*args)

    original = replace(cache, "read_range", read_range)


def _filled(sides: Sides, point: Failpoint, replace: Replace) -> None:
    """Decode has every byte; prefill has not heard of it."""
    [peer] = sides.inbound.peers
    original = replace(peer, "commit", lambda *args: point.hold(lambda: original(*args)))


def _committing(sides: Sides, point: Failpoint, replace: Replace) -> None:
    """Prefill has answered the Commit; decode has not heard of it."""
    [peer] = sides.inbound.peers

    def commit(key: TransferKey, answered: Callable[[Any], None]) -> None:
        original(key, lambda answer: point.hold(lambda: answered(answer)))

    original = replace(peer, "commit", commit)


_SET: dict[str, Callable[[Sides, Failpoint, Replace], None]] = dict(
    zip(STATES, (_opening, _asking, _answering, _computing, _between, _pushing, _filled, _committing), strict=True)
)
