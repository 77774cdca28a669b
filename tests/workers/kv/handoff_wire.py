"""A handover in a test, and what may happen to its messages on their way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from headwise.workers.kv import kv_transport
from headwise.workers.kv.handoff import HandoffOp
from headwise.workers.kv.transfer import TransferResult
from tests.workers.kv.handoff_ranks import DEADLINE_S, Group, cut_chunks, fence_of, ok

BLOCKS, PLACES = [1, 3, 5, 7], [8, 2, 6, 0]
SHARED = pytest.mark.parametrize("shared_memory", [False, True], ids=["grpc", "shared"])

Messages = Iterator[bytes]
Fault = Callable[[Messages], Messages]


class Wire:
    """What is between a rank of prefill and gRPC: does to the messages of each stream what ``fault`` does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fault: Fault = iter
        self.sent: list[bytes] = []
        real = kv_transport._PushCalls.push

        def push(calls: Any, messages: Messages, *rest: Any) -> int:
            return real(calls, self._noted(self.fault(messages)), *rest)

        monkeypatch.setattr(kv_transport._PushCalls, "push", push)
        cut_chunks(monkeypatch, 2400)  # a block is one message

    def _noted(self, messages: Messages) -> Messages:
        for message in messages:
            self.sent.append(message)
            yield message


class Gate:
    """A fault: the messages after the first wait until it is opened."""

    def __init__(self) -> None:
        self.reached, self.go = threading.Event(), threading.Event()

    def __call__(self, messages: Messages) -> Messages:
        yield next(messages)
        self.reached.set()
        assert self.go.wait(DEADLINE_S)
        yield from messages


class Handover:
    """Blocks on their way from a group to another, of which decode's are open and waited for."""

    def __init__(self, prefill: Group, decode: Group, number: int = 1) -> None:
        self.prefill, self.decode, self.fence = prefill, decode, fence_of(number)
        assert ok(decode.run(HandoffOp.OPEN, self.fence, blocks=PLACES, sources=prefill.heads))
        self.filled = decode.begin(HandoffOp.FILL, self.fence)

    def push(self, timeout_s: float = DEADLINE_S) -> Callable[[], list[TransferResult]]:
        ends = self.decode.endpoints
        return self.prefill.begin(HandoffOp.PUSH, self.fence, blocks=BLOCKS, destinations=ends, timeout_s=timeout_s)

    def check_arrived(self) -> None:
        for rank in self.decode.ranks:
            expected = self.prefill.content[BLOCKS][:, :, :, slice(*rank.heads)]
            assert torch.equal(rank.content()[PLACES], expected)

    def reuse(self) -> None:
        """The blocks get another owner."""
        assert ok(self.decode.run(HandoffOp.CLOSE, self.fence))
        for rank in self.decode.ranks:
            rank.cache.keys.fill_(7)
            rank.cache.values.fill_(7)

    def check_reused(self) -> None:
        assert all(bool((rank.content() == 7).all()) for rank in self.decode.ranks)
