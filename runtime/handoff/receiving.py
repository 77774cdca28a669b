"""Receiving: an attempt at having a prompt computed by another engine, as the engine that goes on from it sees it.

Events in, instructions out: nothing here does I/O or reads a clock. ``now`` is of a monotonic clock, in seconds.

    OPENING --opened--> ASKING --answered--> FILLING --filled--> COMMITTING --committed--> ENDED   (Publish)
       |                  |                     |                    |
       +------------------+------ a failure ----+--------------------+---> CLOSING --closed--> ENDED   (Free)
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

RETRY_S = 0.5
"""After a Commit that got no answer until it is asked again."""


class State(enum.Enum):
    """What is waited for: the fence on every own rank; the answer to Prefill; the bytes; the answer to Commit; the end
    of the fence; nothing."""

    OPENING = enum.auto()
    ASKING = enum.auto()
    FILLING = enum.auto()
    COMMITTING = enum.auto()
    CLOSING = enum.auto()
    ENDED = enum.auto()


class Cause(enum.StrEnum):
    """Why an attempt failed."""

    REFUSED = enum.auto()  # the peer has nothing of it
    UNREACHABLE = enum.auto()
    TRANSPORT = enum.auto()  # the fence of a rank, or the bytes for it
    LEASE = enum.auto()
    DEADLINE = enum.auto()
    PEER = enum.auto()  # the peer lost it, failed it, or what it computed is not sound
    CANCELLED = enum.auto()


@dataclass(frozen=True, slots=True)
class Open:
    """Open the fence on every own rank."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask the peer to compute and push: Prefill."""


@dataclass(frozen=True, slots=True)
class Commit:
    """Ask the peer whether what it computed is sound."""


@dataclass(frozen=True, slots=True)
class Publish:
    """Every byte is there and sound: the blocks become readable. The fence is over on every rank."""


@dataclass(frozen=True, slots=True)
class Abort:
    """Tell the peer that the attempt is over; no answer is waited for."""

    reason: str


@dataclass(frozen=True, slots=True)
class Close:
    """End the fence on every own rank. Until :meth:`Receiving.closed` its blocks can still be written."""


@dataclass(frozen=True, slots=True)
class Fallback:
    """Compute the prompt here, in other blocks."""

    cause: Cause
    reason: str


@dataclass(frozen=True, slots=True)
class Free:
    """Nobody can write the reserved blocks any more: they may be used for anything."""


Instruction = Open | Ask | Commit | Publish | Abort | Close | Fallback | Free


class Receiving:
    """One attempt. Every event may come in any state, late or twice; what does not belong there changes nothing.

    In its life an attempt gives either Publish or Free, once; a Fallback comes with neither Publish nor a cancel.

    Attributes:
        state: where it is.
        cause: why it failed; None as long as it has not.
        reason: the same in words.
        lease_until: when the lease runs out; None before Ask. The lease of what waits to be closed is of no interest.
    """

    def __init__(self, lease_s: float, deadline: float | None) -> None:
        """
        Args:
            lease_s: how long the attempt lasts after Ask, or after the last Renew that told it stands.
            deadline: when the attempt is given up, whatever its lease.
        """
        self.state = State.OPENING
        self.cause: Cause | None = None
        self.reason = ""
        self.lease_until: float | None = None
        self._lease_s, self._deadline = lease_s, deadline
        self._started = False
        self._filled = False
        self._retry_at: float | None = None

    @property
    def renewable(self) -> bool:
        """Whether the peer is known to know the attempt, so that Renew may ask for it."""
        return self.state in (State.FILLING, State.COMMITTING)

    def start(self, now: float) -> list[Instruction]:
        """The blocks are reserved."""
        if self._started or self.state is not State.OPENING:
            return []
        self._started = True
        return [Open()]

    def opened(self, now: float, error: str = "") -> list[Instruction]:
        """Every own rank has opened the fence, or one could not."""
        if self.state is not State.OPENING:
            return []
        if error:
            return self._fail(Cause.TRANSPORT, error)
        self.state = State.ASKING
        self.lease_until = now + self._lease_s
        return [Ask()]

    def answered(self, now: float, cause: Cause | None = None, reason: str = "") -> list[Instruction]:
        """Prefill was accepted; or it was not, for a cause."""
        if self.state is not State.ASKING:
            return []
        if cause is not None:
            return self._fail(cause, reason)
        self.state = State.FILLING
        return self._commit_if_filled()

    def filled(self, now: float, error: str = "") -> list[Instruction]:
        """Every own rank has every byte, and its fence is over; or one gets no more. May come before the answer."""
        if self.state not in (State.OPENING, State.ASKING, State.FILLING):
            return []
        if error:
            return self._fail(Cause.TRANSPORT, error)
        self._filled = True
        return self._commit_if_filled()

    def committed(self, now: float, sound: bool | None, reason: str = "") -> list[Instruction]:
        """What the peer said to Commit; None if no answer came."""
        if self.state is not State.COMMITTING:
            return []
        if sound is None:
            self._retry_at = now + RETRY_S
            return []
        if not sound:
            return self._fail(Cause.PEER, reason)
        self.state = State.ENDED
        return [Publish()]

    def renewed(self, now: float, stands: bool, reason: str = "") -> list[Instruction]:
        """What the peer said to Renew: whether the attempt goes on or is done there. Without an answer, no event."""
        if not self.renewable:
            return []
        if not stands:
            return self._fail(Cause.PEER, reason)
        self.lease_until = now + self._lease_s
        return []

    def tick(self, now: float) -> list[Instruction]:
        """Time has passed: the deadline, the lease, a Commit that is to be asked again."""
        if self.state in (State.CLOSING, State.ENDED):
            return []
        if self._deadline is not None and now >= self._deadline:
            return self._fail(Cause.DEADLINE, "the deadline has passed")
        if self.lease_until is not None and now >= self.lease_until:
            return self._fail(Cause.LEASE, f"the lease of {self._lease_s:g} s ran out")
        if self._retry_at is not None and now >= self._retry_at:
            self._retry_at = None
            return [Commit()]
        return []

    def cancel(self, now: float) -> list[Instruction]:
        """Nobody wants the prompt any more."""
        if self.state in (State.CLOSING, State.ENDED):
            return []
        return self._fail(Cause.CANCELLED, "cancelled")

    def closed(self, now: float) -> list[Instruction]:
        """Every own rank has ended the fence."""
        if self.state is not State.CLOSING:
            return []
        self.state = State.ENDED
        return [Free()]

    def _commit_if_filled(self) -> list[Instruction]:
        if self.state is not State.FILLING or not self._filled:
            return []
        self.state = State.COMMITTING
        return [Commit()]

    def _fail(self, cause: Cause, reason: str) -> list[Instruction]:
        asked = self.state is not State.OPENING
        self.state, self.cause, self.reason = State.CLOSING, cause, reason
        found: list[Instruction] = []
        if asked and cause is not Cause.REFUSED:
            found.append(Abort(reason))
        found.append(Close())
        if cause is not Cause.CANCELLED:
            found.append(Fallback(cause, reason))
        return found
