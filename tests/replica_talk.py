"""Whoever talks to a replica as its front does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from headwise.cluster.channel import Kind
from headwise.cluster.replica import Replica
from headwise.runtime.deployment.messages import (
    Add,
    FrontMessage,
    Output,
    ReplicaMessage,
    Report,
    RequestDelta,
    decode_replica,
    encode,
)
from headwise.workers.plan import RowSampling

T = TypeVar("T")
R = TypeVar("R", bound=Replica)

DEADLINE_S = 30.0


class Talk(Generic[R]):
    """The front's end of one replica's channel."""

    def __init__(self, replica: R) -> None:
        self.replica, self._number = replica, 0
        self.seen: list[ReplicaMessage] = []

    def say(self, message: FrontMessage) -> None:
        self.say_bytes(encode(message))

    def say_bytes(self, data: bytes, kind: Kind = Kind.STEP) -> None:
        self.replica.channel.send(0, kind, data)

    def hear(self) -> ReplicaMessage:
        got = self.replica.channel.receive(DEADLINE_S)
        assert got is not None and got[0] == Kind.OUTPUT, f"nothing was heard for {DEADLINE_S:g} s"
        self.seen.append(decode_replica(got[2]))
        return self.seen[-1]

    def wait_for(self, find: Callable[[ReplicaMessage], T | None]) -> T:
        """What is found in the first message that has it."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            if (found := find(self.hear())) is not None:
                return found
        raise AssertionError(f"not heard in {DEADLINE_S:g} s")

    def add(self, prompt: list[int], max_tokens: int, sampling: RowSampling | None = None, **fields: Any) -> int:
        self._number += 1
        generated = fields.pop("generated", [])
        self.say(Add(self._number, prompt, generated, sampling or RowSampling(), max_tokens, **fields))
        return self._number

    def deltas(self, number: int) -> list[RequestDelta]:
        """What comes of a request, until it ends."""
        found: list[RequestDelta] = []

        def look(message: ReplicaMessage) -> bool | None:
            if isinstance(message, Output):
                found.extend(delta for delta in message.deltas if delta.number == number)
            return True if found and found[-1].finish_reason is not None else None

        self.wait_for(look)
        return found

    def tokens(self, number: int) -> list[int]:
        return [token for delta in self.deltas(number) for token in delta.token_ids]

    def report(self, holds: Callable[[Report], bool] = lambda report: True) -> Report:
        """The next report for which something holds."""
        return self.wait_for(lambda m: m if isinstance(m, Report) and holds(m) else None)
