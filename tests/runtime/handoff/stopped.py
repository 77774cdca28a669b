"""A handoff that is stopped somewhere, and what a test needs to do it harm."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from headwise.runtime import LLM, SamplingParams
from headwise.runtime.output import FinishReason
from headwise.workers.kv import kv_transport
from tests.runtime.handoff.conftest import wait_until
from tests.runtime.handoff.failpoints import Failpoint
from tests.runtime.handoff.sides import Sides

LEASE_S = 1.0
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def prompt(seed: int, length: int = 101) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(3, 256) for _ in range(length)]


@dataclass(frozen=True, slots=True)
class Outcome:
    tokens: list[int]
    reason: FinishReason | None
    error: str | None


@dataclass(slots=True)
class Cell:
    """A handoff that was stopped.

    Attributes:
        outcome: what becomes of its request.
        messages: what was pushed for an earlier handoff.
    """

    sides: Sides
    point: Failpoint
    state: str
    outcome: Future[Outcome]
    others: Callable[[list[int]], Future[Outcome]]
    wire: Wire


class Wire:
    """What goes from the ranks of prefill to those of decode.

    Attributes:
        damage: what becomes of the next message, once; None is nothing.
        seen: the messages that were to go through.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.damage: Callable[[bytes, Iterable[bytes]], Iterable[bytes]] | None = None
        self.seen: list[bytes] = []
        push = kv_transport._PushCalls.push

        def pushed(calls: Any, messages: Iterator[bytes], *arguments: Any) -> int:
            return push(calls, self._through(messages), *arguments)

        patch.setattr(kv_transport._PushCalls, "push", pushed)
        patch.setattr(kv_transport.GrpcTransport, "chunk_bytes", 1)  # a layer of a block in each message

    def _through(self, messages: Iterator[bytes]) -> Iterator[bytes]:
        for message in messages:
            self.seen.append(message)
            if (damage := self.damage) is None:
                yield message
            else:
                self.damage = None
                yield from damage(message, messages)


class Alone:
    """What an engine without handoffs gives, computed once."""

    def __init__(self, llm: LLM) -> None:
        self._llm, self._known = llm, dict[tuple[int, ...], list[int]]()

    def __call__(self, ids: list[int]) -> list[int]:
        if tuple(ids) not in self._known:
            [output] = self._llm.generate([ids], PARAMS)
            self._known[tuple(ids)] = output.outputs[0].token_ids
        return self._known[tuple(ids)]


@contextmanager
def two_sides(model: Path, **settings: Any) -> Iterator[tuple[Sides, Wire]]:
    before = left_over()
    with pytest.MonkeyPatch.context() as patch:
        wire = Wire(patch)
        prefill = {"tensor_parallel_size": 2, "max_num_batched_tokens": 32, "num_blocks": 48}
        sides = Sides(
            patch,
            model,
            **{"prefill": prefill, "tensor_parallel_size": 2, "num_blocks": 32, "lease_s": LEASE_S}
            | {"shared_memory": False}
            | settings,
        )
        try:
            yield sides, wire
        finally:
            sides.close()
    wait_until(lambda: not left_over() - before)


def left_over() -> Counter[str]:
    """Threads of ours by name, and sockets of this process."""
    sockets = psutil.Process().net_connections("all")
    names = (thread.name for thread in threading.enumerate())
    return Counter(
        [
            *(name for name in names if name.startswith("headwise")),
            *(f"socket {one.laddr} {one.raddr}" for one in sockets),
        ]
    )


def ask(sides: Sides, ids: list[int], name: str) -> Outcome:
    tokens: list[int] = []
    last = None
    for last in sides.llm.stream(ids, PARAMS, request_id=name):
        tokens += last.token_ids
    assert last is not None
    return Outcome(tokens, last.finish_reason, last.error)
