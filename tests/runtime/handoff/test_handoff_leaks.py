"""Many handoffs that are cancelled, damaged, refused and late, at random: nothing is wrong, and nothing is left."""

from __future__ import annotations

import gc
import logging
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from headwise.runtime import LLM, SamplingParams
from headwise.runtime.engine.engine import Engine
from headwise.runtime.handoff.service import HandoffService
from headwise.runtime.output import FinishReason
from headwise.v1 import kv_transfer_pb2 as pb
from headwise.workers.errors import HeadwiseError
from headwise.workers.kv import kv_transport
from tests.runtime.handoff.conftest import DEADLINE_S, wait_until
from tests.runtime.handoff.sides import Sides

WAVE = 10
"""Requests at once."""
PROMPTS = 24
PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
MIB = 1 << 20


def prompt(seed: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(3, 256) for _ in range(chance.choice([20, 33, 64, 100, 160]))]


class Mischief:
    """What goes wrong now and then, by a seeded generator.

    Attributes:
        rate: of what can go wrong, how much does.
        done: how often each did.
    """

    def __init__(self, patch: pytest.MonkeyPatch, seed: int) -> None:
        self.rate, self.done = 0.0, Counter[str]()
        self._chance, self._lock = random.Random(seed), threading.Lock()
        push, answer = kv_transport._PushCalls.push, HandoffService.answer

        def pushed(calls: Any, messages: Iterable[bytes], *arguments: Any) -> int:
            return push(calls, self._messages(messages), *arguments)

        def answered(service: HandoffService, method: str, request: Any, peer: str) -> Future[Any]:
            if method in _RUBBISH and self("rubbish", 0.03):
                future: Future[Any] = Future()
                future.set_result(_RUBBISH[method])
                return future
            if self("call fails", 0.03):
                future = Future()
                future.set_exception(HeadwiseError("it fails at random"))
                return future
            return answer(service, method, request, peer)

        patch.setattr(kv_transport._PushCalls, "push", pushed)
        patch.setattr(HandoffService, "answer", answered)

    def __call__(self, what: str, share: float) -> bool:
        """Whether it happens this time."""
        with self._lock:
            found = self._chance.random() < share * self.rate
            self.done[what] += found
        return found

    def poison(self, sides: Sides) -> None:
        """Logits of prefill are not finite now and then."""
        group = sides.prefill_group
        collect = group.collect

        def poisoned() -> Any:
            output = collect()
            for row, token in list(output.tokens):
                if self("not finite", 0.03):
                    output.tokens.remove((row, token))
                    output.failed.append((row, "the logits are not finite"))
            return output

        group.collect = poisoned  # type: ignore[method-assign]

    def _messages(self, messages: Iterable[bytes]) -> Iterable[bytes]:
        for message in messages:
            if self("dropped", 0.03):
                continue
            if self("damaged", 0.03):
                message = message[:-3] + bytes(3)
            if self("twice", 0.03):
                yield message
            yield message


_RUBBISH = {
    "Prefill": pb.PrefillResponse(load=pb.Load(token_s=-1)),
    "Renew": pb.RenewResponse(statuses=[pb.TransferStatus()] * 3),
    "Commit": pb.CommitResponse(),
}


class Held:
    """What this process has."""

    def __init__(self) -> None:
        gc.collect()
        process = psutil.Process()
        names = [thread.name for thread in threading.enumerate()]
        self.threads = Counter(name for name in names if name.startswith("headwise"))
        self.sockets = len(process.net_connections("all"))
        self.files = process.num_fds()
        self.rss = process.memory_info().rss
        self.shared = {name for name in os.listdir("/dev/shm") if name.startswith("headwise")}

    def beyond(self, before: Held) -> bool:
        """Whether there is more now than before, memory aside."""
        more = self.sockets > before.sockets or self.files > before.files
        return more or bool(self.threads - before.threads) or not self.shared <= before.shared


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_nothing_is_wrong_and_nothing_is_left(
    checkpoint: Callable[..., Path], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint("uneven")
    with LLM(model, executor="local", kv_memory="16MiB", max_model_len=256, quiet=True) as llm:
        outputs = llm.generate([prompt(seed) for seed in range(PROMPTS)], PARAMS)
        right = [output.outputs[0].token_ids for output in outputs]
    mischief = Mischief(monkeypatch, count)
    # pytest keeps the records of a log, and with them errors and all that they refer to.
    monkeypatch.setattr(logging.getLogger("headwise"), "disabled", True)
    for name in ("workers.kv.receiver", "workers.kv.pusher", "runtime.handoff.link", "runtime.handoff.inbound"):
        monkeypatch.setattr(logging.getLogger(f"headwise.{name}"), "disabled", True)
    chance = random.Random(count + 1)
    settings = {"tensor_parallel_size": 2, "num_blocks": 40, "max_num_batched_tokens": 48}
    sides = Sides(monkeypatch, model, prefill=settings, tensor_parallel_size=2, num_blocks=40, lease_s=0.5)

    def ask(number: int, cancel_s: float | None) -> None:
        seed, tokens, last = number % PROMPTS, list[int](), None
        name, salt = f"one {number}", str(number % 7)
        if cancel_s is not None:
            timer = threading.Timer(cancel_s, sides.llm.abort, [name])
            timer.start()
        for last in sides.llm.stream(prompt(seed), PARAMS, request_id=name, cache_salt=salt):
            tokens += last.token_ids
        assert last is not None and last.error is None
        if last.finish_reason is FinishReason.ABORT:
            assert cancel_s is not None and right[seed][: len(tokens)] == tokens
        else:
            assert tokens == right[seed]
        if cancel_s is not None:
            timer.join()
        for loop in (sides.llm._loop, sides.prefill.loop):
            loop.run(Engine.check_integrity)

    def wave(numbers: range) -> None:
        cancels = [chance.random() * 0.1 if mischief("cancelled", 0.3) else None for _ in numbers]
        for one in [threads.submit(ask, *each) for each in zip(numbers, cancels, strict=True)]:
            one.result(2 * DEADLINE_S)

    try:
        mischief.poison(sides)
        with ThreadPoolExecutor(WAVE) as threads:
            wave(range(WAVE))
            sides.settle()
            before, mischief.rate = Held(), 1.0
            for start in range(WAVE, count, WAVE):
                wave(range(start, start + WAVE))
                if start == count // 4 // WAVE * WAVE:
                    before.rss = Held().rss
                if start == count // 2 // WAVE * WAVE:
                    sides.restart_prefill()
                    mischief.poison(sides)
            mischief.rate = 0.0
            wait_until(lambda: sides.inbound.peers[0].session)
            wave(range(count, count + WAVE))
        sides.settle()
        # gRPC closes what it does not use any more a little later, on threads of its own.
        wait_until(lambda: not Held().beyond(before))
        assert Held().rss - before.rss < 16 * MIB
        stats = sides.llm.stats()["handoff"]
        assert stats["started"] == stats["committed"] + stats["fallbacks"] + stats["cancelled"]
        assert stats["committed"] > count / 4 and all(
            sum(mischief.done[what] for what in kind)
            for kind in (("cancelled",), ("dropped", "damaged", "twice"), ("rubbish", "call fails"))
        )
    finally:
        sides.close()
