"""Sending: an attempt at computing a prompt for another engine, as the engine that computes sees it.

Events in, instructions out: nothing here does I/O or reads a clock. ``now`` is of a monotonic clock, in seconds.

    COMPUTING --every block pushed, and verified--> PUSHED --commit--> COMMITTED
        |                                             |
        +----------------- a failure -----------------+--> FAILED
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class State(enum.Enum):
    """Computing or pushing; waiting for Commit; told that it is sound; told, or to be told, that it is not."""

    COMPUTING = enum.auto()
    PUSHED = enum.auto()
    COMMITTED = enum.auto()
    FAILED = enum.auto()


@dataclass(frozen=True, slots=True)
class Push:
    """Send blocks, from every rank to those of the peer.

    The blocks have to be held until it is known what came of it: the request may end before, and whoever gets a block
    then would have its own keys and values sent as sound ones.

    Attributes:
        first: the place of the first of them; the prompt's first block is 0.
        count: at least 1.
    """

    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End the pushes of this attempt that run or wait on the ranks."""


@dataclass(frozen=True, slots=True)
class End:
    """End the request that computes the prompt, unless it has ended."""

    reason: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The Commit that waits can be answered with the state and reason."""


Instruction = Push | Stop | End | Answer


class Sending:
    """One attempt. Every event may come in any state, late or twice; what does not belong there changes nothing.

    Attributes:
        num_blocks: full blocks of the prompt.
        first_block: how many of them the peer has already.
        state: where it is.
        reason: why it failed.
        lease_until: when the lease runs out, unless it is renewed.
    """

    def __init__(self, num_blocks: int, first_block: int, now: float, lease_s: float, deadline: float | None) -> None:
        """
        Args:
            deadline: when the attempt is given up, whatever its lease.

        Raises:
            ValueError: there is no block to send.
        """
        if not 0 <= first_block < num_blocks:
            raise ValueError(f"first_block={first_block}: at least 0, and below the {num_blocks} blocks of the prompt")
        self.num_blocks, self.first_block = num_blocks, first_block
        self.state = State.COMPUTING
        self.reason = ""
        self.lease_until = now + lease_s
        self._deadline = deadline
        self._told = first_block  # blocks before this place are pushed, or told to be
        self._under_way = 0
        self._verified = False
        self._commit_waits = False

    @property
    def over(self) -> bool:
        """Whether nothing can change any more."""
        return self.state in (State.COMMITTED, State.FAILED)

    def computed(self, num_blocks: int) -> list[Instruction]:
        """The first so many blocks of the prompt are computed."""
        until = min(num_blocks, self.num_blocks)
        if self.over or until <= self._told:
            return []
        push = Push(self._told, until - self._told)
        self._told = until
        self._under_way += push.count
        return [push]

    def pushed(self, count: int, error: str = "") -> list[Instruction]:
        """What came of a Push, once for each: its blocks are written on every rank of the peer, or not all are.

        Raises:
            ValueError: more blocks than are under way.
        """
        if self.over:
            return []
        if count > self._under_way:
            raise ValueError(f"count={count}: only {self._under_way} blocks are under way")
        self._under_way -= count
        return self._fail(error) if error else self._advance()

    def verified(self) -> list[Instruction]:
        """The request has ended, and its logits were finite: it has read every key and value before them."""
        self._verified = True
        return self._advance()

    def failed(self, reason: str) -> list[Instruction]:
        """The request has ended in another way, or something went wrong that no other event tells of."""
        return self._fail(reason)

    def commit(self, now: float) -> list[Instruction]:
        """The peer asks whether the blocks are sound. The answer may have to wait: for an Answer, then."""
        if self.over:
            return [Answer()]
        self._commit_waits = True
        return self._advance()

    def renew(self, now: float, lease_s: float) -> None:
        """The peer still wants the blocks; a lease never becomes shorter."""
        if not self.over:
            self.lease_until = max(self.lease_until, now + lease_s)

    def tick(self, now: float) -> list[Instruction]:
        """Time has passed: the deadline, the lease."""
        if self._deadline is not None and now >= self._deadline:
            return self._fail("the deadline has passed")
        if now >= self.lease_until:
            return self._fail("the lease ran out")
        return []

    def abort(self, reason: str) -> list[Instruction]:
        """The peer, or this engine, gives the attempt up. What is committed stays so."""
        return self._fail(reason)

    def _advance(self) -> list[Instruction]:
        arrived = self._told == self.num_blocks and not self._under_way
        if self.state is State.COMPUTING and arrived and self._verified:
            self.state = State.PUSHED
        if self.state is State.PUSHED and self._commit_waits:
            self.state = State.COMMITTED
            return [Answer()]
        return []

    def _fail(self, reason: str) -> list[Instruction]:
        if self.over:
            return []
        self.state, self.reason = State.FAILED, reason
        found: list[Instruction] = []
        if self._under_way:
            found.append(Stop())
        if not self._verified:
            found.append(End(reason))
        if self._commit_waits:
            found.append(Answer())
        return found
