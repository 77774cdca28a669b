"""Outbound: prefill's side of handoffs. Prompts of other engines are computed as requests of this one, and their blocks
are pushed while the rest is computed.

Other engines' calls come on threads of their own, and are answered without waiting for a step to end: a step may take
longer than a lease. What they ask of the engine is done on its thread.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from headwise.runtime.handoff.errors import NotFoundError
from headwise.runtime.handoff.messages import Ask, Load, Status, TransferKey
from headwise.runtime.handoff.messages import State as StateThere
from headwise.runtime.handoff.sending import Answer, End, Push, Sending, State, Stop
from headwise.runtime.handoff.transfers import Order, Transfers
from headwise.runtime.handoff.transfers import Status as Standing
from headwise.runtime.kv.ledger import Ledger, Outcome
from headwise.workers.kv.handoff import Fence, HandoffJob, HandoffOp, KvEndpoint

MAX_TRANSFERS = 256
"""That run at once: each has a request that runs or waits."""
MAX_LEASE_S = 120.0


class Seat(Protocol):
    """A request's place, whose blocks stay while ``num_moving`` is not 0."""

    num_moving: int

    @property
    def block_ids(self) -> list[int]: ...


class Prompts(Protocol):
    """What computes the prompts: the engine."""

    def check(self, ask: Ask) -> None:
        """
        Raises:
            InvalidValueError: the engine cannot compute this prompt.
        """

    def start(self, ask: Ask) -> None:
        """Queues a prompt; :meth:`Outbound.computed` and :meth:`Outbound.ended` tell of it."""

    def end(self, key: TransferKey) -> None:
        """Nobody wants a prompt any more."""

    def moved(self) -> None:
        """The ``num_moving`` of a seat has become less."""

    def load(self) -> Load:
        """How busy the engine is."""


@dataclass(slots=True)
class _Transfer:
    fence: Fence
    destinations: list[KvEndpoint]
    waiting: list[Future[Status]] = field(default_factory=list)  # Commits
    push_s: float = 0.0
    computed: float | None = None  # when
    sent: bool = False


class Outbound:
    """The prompts that one generation of an engine computes for others.

    Attributes:
        prompts: computes them; set by whoever makes the engine.
        post: runs a function on the engine's thread, soon; set by whoever gives the engine a thread.
        lock: is held while other engines' calls are answered, on any thread. :meth:`tick`, :meth:`computed` and
            :meth:`ended`, which are for the engine's thread, take it themselves.
    """

    prompts: Prompts

    def __init__(self, ledger: Ledger, epoch: int, block_size: int) -> None:
        self._ledger, self._epoch, self._block_size = ledger, epoch, block_size
        self._transfers = Transfers(epoch, MAX_TRANSFERS, MAX_LEASE_S)
        self._running: dict[TransferKey, _Transfer] = {}
        self._decoders: dict[int, list[KvEndpoint]] = {}  # by epoch
        self._counts: Counter[str] = Counter()
        self._seconds = {"push": 0.0, "hidden": 0.0}
        self.post: Callable[[Callable[[], object]], object] = lambda function: function()
        self.lock = threading.RLock()
        self._abandoned = ""

    @property
    def busy(self) -> bool:
        """Whether a transfer runs, whose lease may run out."""
        return bool(self._running)

    def hello(self, epoch: int, endpoints: list[KvEndpoint]) -> Load:
        """Takes note of a decode engine's ranks."""
        self._decoders[epoch] = endpoints
        return self.load()

    def forget(self, epoch: int) -> None:
        """Forgets a decode engine; its transfers are aborted."""
        self._decoders.pop(epoch, None)
        for key in [key for key in self._running if key.decode_epoch == epoch]:
            self.abort(key, "the engine that asked for it has been forgotten")

    def accept(self, ask: Ask) -> tuple[float, Load]:
        """Queues a prompt; returns when its last block is expected to be computed, in seconds from now.

        Raises:
            InvalidValueError: this engine cannot compute the prompt.
            NotFoundError, RefusedError: it does not; see :mod:`headwise.runtime.handoff.transfers`.
        """
        if self._abandoned:
            raise NotFoundError(self._abandoned)
        self.prompts.check(ask)
        endpoints = self._decoders.get(ask.key.decode_epoch)
        if endpoints is None:
            raise NotFoundError(f"decode_epoch={ask.key.decode_epoch}: that engine has to say Hello first")
        now, num_blocks = time.monotonic(), len(ask.token_ids) // self._block_size
        deadline = now + ask.deadline_s
        accepted = self._transfers.accept(
            ask.key, _digest(ask), num_blocks, ask.first_block, now, min(ask.lease_s, MAX_LEASE_S), deadline
        )
        self._follow(accepted.orders)
        if accepted.new:
            fence = Fence(ask.key.transfer, ask.key.attempt, ask.key.decode_epoch, ask.fence, ask.ticket)
            self._running[ask.key] = _Transfer(fence, endpoints)
            self._counts["accepted"] += 1
            self.post(lambda: self.prompts.start(ask))
        load = self.load()
        return load.queued_tokens * load.token_s, load

    def renew(self, keys: Sequence[TransferKey], lease_s: float) -> list[Status]:
        """Renews leases; returns how each transfer stands."""
        now = time.monotonic()
        return [_status(self._transfers.renew(key, now, min(lease_s, MAX_LEASE_S))) for key in keys]

    def statuses(self, keys: Sequence[TransferKey]) -> list[Status]:
        """How transfers stand."""
        return [_status(self._transfers.status(key)) for key in keys]

    def load(self) -> Load:
        """How busy the engine is."""
        return self.prompts.load()

    def commit(self, key: TransferKey) -> Future[Status]:
        """Whether what was computed is sound: the future's result once that is known."""
        answer: Future[Status] = Future()
        answer.set_running_or_notify_cancel()
        if key in self._running:
            self._running[key].waiting.append(answer)
            self._follow(self._transfers.commit(key, time.monotonic()))
            self._settle(key)
        else:
            answer.set_result(_status(self._transfers.status(key)))
        return answer

    def abort(self, key: TransferKey, reason: str) -> None:
        """Ends a transfer. Unknown ones are remembered: the call may have overtaken the one that starts it."""
        self._follow(self._transfers.abort(key, reason, time.monotonic()))
        self._settle(key)

    def computed(self, key: TransferKey, seat: Seat, num_tokens: int) -> None:
        """The first tokens of a prompt are computed, and their blocks are in its seat."""
        with self.lock:
            if (sending := self._sending(key)) is None:
                return
            for push in sending.computed(num_tokens // self._block_size):
                if isinstance(push, Push):
                    self._push(key, seat, push, sending.first_block)

    def ended(self, key: TransferKey, error: str | None) -> None:
        """A prompt's request has ended.

        Args:
            error: why it has no logits that are finite; None if it has.
        """
        with self.lock:
            if (sending := self._sending(key)) is None:
                return
            transfer = self._running[key]
            transfer.computed = time.monotonic()
            self._follow([(key, i) for i in (sending.verified() if error is None else sending.failed(error))])
            self._look_if_sent(transfer, sending)
            self._settle(key)

    def tick(self) -> None:
        """Ends what has taken too long. Called once a step."""
        with self.lock:
            self._follow(self._transfers.sweep(time.monotonic()))
            for key in list(self._running):
                self._settle(key)

    def abandon(self, reason: str) -> None:
        """The ranks are dead, and the blocks that they held. Whoever waits for a transfer is told so."""
        with self.lock:
            self._abandoned = reason
            for transfer in self._running.values():
                for answer in transfer.waiting:
                    answer.set_result(Status(StateThere.FAILED, reason))
            self._counts["failed"] += len(self._running)
            self._running.clear()

    def count_on(self, before: Outbound) -> None:
        """Counts go on from those of the generation before."""
        self._counts.update(before._counts)
        for name, seconds in before._seconds.items():
            self._seconds[name] += seconds

    def stats(self) -> dict[str, Any]:
        """Counts since the start: transfers ``accepted``, ``committed`` and ``failed``; ``pushes``, those that failed
        (``push_failures``), and the ``bytes`` sent; ``push_seconds``, and how many of those were ``hidden_seconds``
        behind the computing of the rest of the prompt. And how many are ``in_flight`` now."""
        return {
            "role": "prefill",
            **{name: self._counts[name] for name in ("accepted", "committed", "failed", "pushes", "push_failures")},
            "bytes": self._counts["bytes"],
            "push_seconds": self._seconds["push"],
            "hidden_seconds": self._seconds["hidden"],
            "in_flight": len(self._running),
        }

    def _sending(self, key: TransferKey) -> Sending | None:
        return self._transfers.get(key) if key in self._running else None

    def _follow(self, orders: Sequence[Order]) -> None:
        for key, instruction in orders:
            transfer = self._running.get(key)
            match instruction:
                case Stop() if transfer is not None:
                    self.post(partial(self._stop, transfer.fence))
                case End():
                    self.post(partial(self.prompts.end, key))
                case Answer() if transfer is not None:
                    self._answer(key, transfer)

    def _stop(self, fence: Fence) -> None:
        if self._abandoned:
            return
        self._ledger.hand_over(HandoffJob(0, HandoffOp.STOP, fence), lambda outcome: None)

    def _answer(self, key: TransferKey, transfer: _Transfer) -> None:
        status, waiting = _status(self._transfers.status(key)), transfer.waiting
        transfer.waiting = []
        for answer in waiting:
            answer.set_result(status)

    def _look_if_sent(self, transfer: _Transfer, sending: Sending) -> None:
        """Once all is computed and sent, counts the seconds of its pushes that nobody had to wait for."""
        if sending.state in (State.PUSHED, State.COMMITTED) and not transfer.sent and transfer.computed is not None:
            transfer.sent = True
            waited = time.monotonic() - transfer.computed
            self._seconds["hidden"] += max(0.0, transfer.push_s - waited)

    def _settle(self, key: TransferKey) -> None:
        """Forgets a transfer that is over; what remembers how it ended is its registry."""
        transfer, sending = self._running.get(key), self._transfers.get(key)
        if transfer is None or (sending is not None and not sending.over):
            return
        self._answer(key, transfer)
        del self._running[key]
        status = self._transfers.status(key)
        self._counts["committed" if not status.reason else "failed"] += 1

    def _push(self, key: TransferKey, seat: Seat, push: Push, first_block: int) -> None:
        transfer = self._running[key]
        seat.num_moving += 1
        job = HandoffJob(
            0,
            HandoffOp.PUSH,
            transfer.fence,
            seat.block_ids[push.first : push.first + push.count],
            push.first - first_block,
            destinations=transfer.destinations,
            timeout_s=2 * MAX_LEASE_S,
        )
        self._counts["pushes"] += 1
        self._ledger.hand_over(job, partial(self._pushed, key, seat, push.count))

    def _pushed(self, key: TransferKey, seat: Seat, count: int, outcome: Outcome) -> None:
        seat.num_moving -= 1
        self.prompts.moved()
        with self.lock:
            self._counts["bytes"] += outcome.num_bytes
            self._counts["push_failures"] += bool(outcome.error)
            self._seconds["push"] += outcome.seconds
            if (sending := self._sending(key)) is not None:
                transfer = self._running[key]
                transfer.push_s += outcome.seconds
                self._follow([(key, i) for i in sending.pushed(count, outcome.error)])
                self._look_if_sent(transfer, sending)
                self._settle(key)


_STATES = {
    None: StateThere.UNKNOWN,
    State.COMPUTING: StateThere.COMPUTING,
    State.PUSHED: StateThere.PUSHED,
    State.COMMITTED: StateThere.COMMITTED,
    State.FAILED: StateThere.FAILED,
}


def _status(standing: Standing) -> Status:
    return Status(_STATES[standing.state], standing.reason)


def _digest(ask: Ask) -> bytes:
    """Of all that a repeated call has to have in common with the first, which durations are not."""
    message = replace(ask, deadline_s=0.0, lease_s=0.0).message()
    return hashlib.sha256(message.SerializeToString(deterministic=True)).digest()
