"""Transfers: all attempts that an engine computes for others, running or over, by their keys.

An attempt that is over is remembered for a while, so that a call about it that is repeated, or comes late, gets the
answer it would have had. Nothing here does I/O or reads a clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from headwise.runtime.handoff.errors import NotFoundError, RefusedError
from headwise.runtime.handoff.messages import TransferKey
from headwise.runtime.handoff.sending import Answer, Instruction, Sending, State

MAX_REMEMBERED = 8192
"""Most attempts that are over and remembered; those that ended first are forgotten then. A late call about them gets a
slower answer, not a wrong one: what is not known is not sound, and what nobody renews ends."""


class UnknownEpochError(NotFoundError):
    """The attempt belongs to another generation of this engine."""

    def __init__(self, epoch: int, own: int) -> None:
        self.epoch, self.own = epoch, own
        super().__init__(f"prefill_epoch={epoch}: this engine is in epoch {own}; say Hello again")


class TooManyTransfersError(RefusedError):
    """As many transfers as may run do."""

    def __init__(self, running: int, limit: int) -> None:
        self.running, self.limit = running, limit
        super().__init__(f"running={running}: at most {limit} transfers at once; ask again later, or another engine")


class AttemptOverError(RefusedError):
    """The attempt was refused or aborted before, or a newer one of the transfer has come."""


class OtherPromptError(RefusedError):
    """The key has come before, with another prompt."""

    def __init__(self, key: TransferKey) -> None:
        super().__init__(f"attempt={key.attempt}: this attempt came before with another prompt; count attempts up")


class Status(NamedTuple):
    """How an attempt stands; ``state`` is None if it is not known."""

    state: State | None
    reason: str = ""


Order = tuple[TransferKey, Instruction]
"""An instruction, and the attempt it is about."""


class Accepted(NamedTuple):
    """
    Attributes:
        sending: the attempt, or None if it is over and no longer held: its Prefill is a late repetition.
        new: whether it has come for the first time, so that a request is to be started.
        orders: what is to be done about an older attempt.
    """

    sending: Sending | None
    new: bool
    orders: list[Order]


@dataclass(slots=True)
class _Memory:
    """What is left of an attempt that is over.

    Attributes:
        refusal: what its Prefill is answered with, if it never was accepted.
        until: when it is forgotten.
    """

    status: Status
    until: float
    prompt: bytes = b""
    refusal: RefusedError | None = None


class Transfers:
    """The attempts of one generation of an engine. Every call may be repeated, and then gets the same answer.

    Attributes:
        limit: most attempts that run at once.
    """

    def __init__(self, epoch: int, limit: int, memory_s: float) -> None:
        """
        Args:
            epoch: of this engine's generation; keys of another are not known.
            memory_s: how long an attempt that is over is remembered; as long as the longest lease.
        """
        self.limit = limit
        self._epoch, self._memory_s = epoch, memory_s
        self._held: dict[TransferKey, tuple[Sending, bytes]] = {}  # running, or over since the last sweep
        self._over: dict[TransferKey, _Memory] = {}  # the one to forget next comes first
        self._newest: dict[bytes, TransferKey] = {}  # by transfer, of those above

    def __len__(self) -> int:
        """How many attempts are known, running or remembered."""
        return len(self._held) + len(self._over)

    @property
    def running(self) -> int:
        """How many attempts are not over."""
        return sum(not sending.over for sending, _ in self._held.values())

    def get(self, key: TransferKey) -> Sending | None:
        """The attempt that runs, or has only just ended."""
        found = self._held.get(key)
        return found[0] if found else None

    def accept(
        self,
        key: TransferKey,
        prompt: bytes,
        num_blocks: int,
        first_block: int,
        now: float,
        lease_s: float,
        deadline: float | None,
    ) -> Accepted:
        """Prefill came.

        Args:
            prompt: differs between Prefills that ask for different things: a digest of tokens, namespace and fence,
                but not of durations, which a repetition may tell anew.

        Raises:
            NotFoundError, RefusedError: nothing is computed, or is to be any more; the classes above say why.
            ValueError: there is no block to send.
        """
        if key.prefill_epoch != self._epoch:
            raise UnknownEpochError(key.prefill_epoch, self._epoch)
        if (known := self._repeated(key, prompt)) is not None:
            return known
        newest = self._newest.get(key.transfer, key)
        if newest.attempt > key.attempt:
            raise AttemptOverError(f"attempt={key.attempt}: attempt {newest.attempt} of this transfer has come")
        sending = Sending(num_blocks, first_block, now, lease_s, deadline)
        orders = self._supersede(key)
        if (running := self.running) >= self.limit:  # not if an older attempt has made room: no order is lost
            refusal = TooManyTransfersError(running, self.limit)
            self._refuse(key, refusal, now)
            raise refusal
        self._held[key] = (sending, prompt)
        self._newest[key.transfer] = key
        return Accepted(sending, True, orders)

    def commit(self, key: TransferKey, now: float) -> list[Order]:
        """Commit came; an Answer says when :meth:`status` is what it is to be answered with."""
        sending = self.get(key)
        return self._orders(key, sending.commit(now) if sending is not None else [Answer()])

    def renew(self, key: TransferKey, now: float, lease_s: float) -> Status:
        """Renew came for this attempt."""
        if (sending := self.get(key)) is not None:
            sending.renew(now, lease_s)
        return self.status(key)

    def abort(self, key: TransferKey, reason: str, now: float) -> list[Order]:
        """AbortTransfer came. If its Prefill has not, that will be refused."""
        if (sending := self.get(key)) is not None:
            return self._orders(key, sending.abort(reason))
        if key in self._over or key.prefill_epoch != self._epoch:
            return []
        orders = self._supersede(key)
        self._refuse(key, AttemptOverError(reason), now)
        return orders

    def status(self, key: TransferKey) -> Status:
        """How an attempt stands."""
        if (sending := self.get(key)) is not None:
            return Status(sending.state, sending.reason)
        return self._over[key].status if key in self._over else Status(None)

    def sweep(self, now: float) -> list[Order]:
        """Time has passed: ends every attempt whose lease or deadline has run out, and forgets what was remembered
        long enough. To be called about every step, and as often where no step runs."""
        orders: list[Order] = []
        for key, (sending, prompt) in list(self._held.items()):
            orders += self._orders(key, sending.tick(now))
            if sending.over:
                del self._held[key]
                self._remember(key, _Memory(Status(sending.state, sending.reason), now + self._memory_s, prompt))
        while self._over and self._over[next(iter(self._over))].until <= now:
            self._forget_oldest()
        return orders

    def _repeated(self, key: TransferKey, prompt: bytes) -> Accepted | None:
        """The answer to a Prefill that has come before."""
        if (held := self._held.get(key)) is not None:
            sending, before = held
        elif (memory := self._over.get(key)) is not None:
            if memory.refusal is not None:
                raise memory.refusal.with_traceback(None)
            sending, before = None, memory.prompt
        else:
            return None
        if before != prompt:
            raise OtherPromptError(key)
        return Accepted(sending, False, [])

    def _supersede(self, key: TransferKey) -> list[Order]:
        """Ends an older attempt of the same transfer: decode has given it up."""
        older = self._newest.get(key.transfer, key)
        sending = self.get(older)
        if sending is None or older.attempt >= key.attempt:
            return []
        return self._orders(older, sending.abort(f"attempt {key.attempt} came"))

    def _refuse(self, key: TransferKey, refusal: RefusedError, now: float) -> None:
        newest = self._newest.setdefault(key.transfer, key)
        if newest.attempt < key.attempt:
            self._newest[key.transfer] = key
        self._remember(key, _Memory(Status(State.FAILED, str(refusal)), now + self._memory_s, refusal=refusal))

    def _remember(self, key: TransferKey, memory: _Memory) -> None:
        self._over[key] = memory
        if len(self._over) > MAX_REMEMBERED:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        key = next(iter(self._over))
        del self._over[key]
        if self._newest.get(key.transfer) == key:
            del self._newest[key.transfer]

    def _orders(self, key: TransferKey, instructions: list[Instruction]) -> list[Order]:
        return [(key, instruction) for instruction in instructions]
