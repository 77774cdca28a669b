"""What an engine has of handoffs: the time to the first token, and what its streams lose while blocks arrive."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from statistics import median
from typing import Any

from tqdm import tqdm

from headwise.runtime.bench.latency import watch
from headwise.runtime.bench.workload import greedy, steady_rows
from headwise.runtime.engine.engine import Engine
from headwise.runtime.handoff.inbound import Arrival, LocalLoad
from headwise.runtime.kv.identity import TokenBlocks
from headwise.runtime.llm import LLM
from headwise.workers.errors import HeadwiseError

TIMEOUT_S = 120.0
WARM_UP_S = 0.5


class NotHandedOverError(HeadwiseError):
    """A prompt that was to be handed over was computed by the engine itself."""


@dataclass(frozen=True, slots=True)
class FirstTokens:
    """Seconds, of prompts in pairs.

    Attributes:
        handed, here: to the first token of a prompt that was handed over, and of one that the engine computed itself.
        handoff, push, hidden: of a handoff, on average, from its start until its blocks could be read; of its pushes;
            and of those behind the computing of the same prompt.
    """

    handed: list[float]
    here: list[float]
    handoff: float
    push: float
    hidden: float

    @property
    def ratio(self) -> float:
        """The one in the middle of the pairs' ratios."""
        return median(a / b for a, b in zip(self.handed, self.here, strict=True))


@dataclass(frozen=True, slots=True)
class Beside:
    """What streams got done while transfers ran, and while none did, in pairs.

    Attributes:
        tok_s, quiet_tok_s: tokens a second of all streams.
        gb_per_s, transfers_per_s: that arrived, on average.
    """

    tok_s: list[float]
    quiet_tok_s: list[float]
    gb_per_s: float
    transfers_per_s: float

    @property
    def ratio(self) -> float:
        """The one in the middle of the pairs' ratios."""
        return median(a / b for a, b in zip(self.tok_s, self.quiet_tok_s, strict=True))


def first_tokens(llm: LLM, rows: Sequence[list[int]], bar: tqdm[Any]) -> FirstTokens:
    """Hands over one prompt of each pair, and has the engine compute the other, which is a token shorter.

    Args:
        llm: has ``handoff_min_tokens`` of just the length of the rows.
        rows: prompts, all different; the first two warm up.

    Raises:
        NotHandedOverError: a handoff failed.
    """
    handed: list[float] = []
    here: list[float] = []
    for index in range(0, len(rows), 2):
        if index == 2:
            before = llm.stats()
        turns = [(handed, rows[index]), (here, rows[index + 1][:-1])]
        for seconds, prompt in turns if index % 4 else reversed(turns):
            seconds.append(_first_token_s(llm, prompt))
            if index:
                bar.update()
    after, count = llm.stats(), len(rows) // 2 - 1
    if after["handoff"]["committed"] - before["handoff"]["committed"] != count:
        raise NotHandedOverError(f"of {count} handoffs some failed: {after['handoff']['causes']}")
    sides = [(after, before), (after["prefill"], before["prefill"])]
    taken = [
        (side["handoff"][key] - earlier["handoff"][key]) / count
        for (side, earlier), key in zip((*sides, sides[1]), ("seconds", "push_seconds", "hidden_seconds"), strict=True)
    ]
    return FirstTokens(handed[1:], here[1:], *taken)


def beside_streams(
    llm: LLM, decoding: Sequence[list[int]], prompt: list[int], period_s: float, pairs: int, window_s: float,
    bar: tqdm[Any],
) -> Beside:  # fmt: skip
    """
    Args:
        decoding: the prompts of the streams.
        prompt: the one whose blocks are handed over, again and again, and by no request: prefill has them all, and
            decode drops what it has already.
        period_s: from the start of one transfer to that of the next; 0 is one after another.
        window_s: of one reading, rounded up to whole periods.

    Raises:
        NotHandedOverError: a transfer failed.
        UnsteadyError: a stream came to its end.
    """
    transfers, stop = _Transfers(llm, prompt), threading.Event()
    if period_s:
        window_s = math.ceil(window_s / period_s) * period_s
    transfers.run(0.0, 0.0)  # prefill computes it
    windows: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    num_bytes = count = 0
    with ThreadPoolExecutor(len(decoding)) as consumers, steady_rows(llm, decoding) as streams:
        watching = [consumers.submit(watch, stream, stop) for stream in streams]
        try:
            stop.wait(WARM_UP_S)
            for pair in range(pairs):
                for busy in (True, False) if pair % 2 else (False, True):
                    started, before = time.perf_counter(), transfers.num_bytes
                    if busy:
                        count += transfers.run(window_s, period_s)
                        num_bytes += transfers.num_bytes - before
                    else:
                        stop.wait(window_s)
                    windows[busy].append((started, time.perf_counter()))
                    bar.update()
        finally:
            stop.set()
            wait(watching)
        times = [moment for future in watching for moment in future.result()]
    rates = {busy: [_rate(times, *window) for window in each] for busy, each in windows.items()}
    busy_s = sum(end - start for start, end in windows[True])
    return Beside(rates[True], rates[False], num_bytes / busy_s / 1e9, count / busy_s)


class _Transfers:
    """Handoffs of one prompt without a request.

    Attributes:
        num_bytes: that have arrived.
    """

    def __init__(self, llm: LLM, prompt: list[int]) -> None:
        self._llm, self._prompt = llm, prompt
        self.num_bytes = 0

    def run(self, seconds: float, period_s: float) -> int:
        """Runs one transfer after another for so many seconds, and at least one; returns how many."""
        now = time.monotonic()
        end, count = now + seconds, 0
        while not count or now < end:
            self._one()
            count += 1
            pause = now + period_s - time.monotonic()
            if pause > 0:
                time.sleep(min(pause, max(0.0, end - time.monotonic())))
            now = time.monotonic()
        return count

    def _one(self) -> None:
        arrivals: SimpleQueue[Arrival] = SimpleQueue()
        before = self._llm._loop.run(partial(self._start, arrivals))
        arrival = arrivals.get(timeout=TIMEOUT_S)
        if arrival.failure:
            raise NotHandedOverError(f"a transfer from {arrival.peer} failed: {arrival.failure}")
        self.num_bytes += self._llm._loop.run(_num_bytes) - before

    def _start(self, arrivals: SimpleQueue[Arrival], engine: Engine) -> int:
        inbound, cache = engine.generation.inbound, engine.generation.cache
        assert inbound is not None
        blocks = TokenBlocks(self._llm._inputs.kv_namespace(""), cache.block_size, self._prompt)
        stop = len(blocks.digests)
        chosen = inbound.choose(blocks, len(self._prompt), 0, stop, LocalLoad())
        if chosen is None:
            raise NotHandedOverError("the prefill engine is not connected, or the prompt fills no block")
        before = _num_bytes(engine)
        inbound.start(chosen, blocks, (), stop, "", arrivals.put)
        return before


def _num_bytes(engine: Engine) -> int:
    assert engine.generation.inbound is not None
    return int(engine.generation.inbound.stats()["bytes"])


def _first_token_s(llm: LLM, prompt: list[int]) -> float:
    started = time.perf_counter()
    found = [time.perf_counter() - started for _ in llm.stream(prompt, greedy(1))]
    return found[0]


def _rate(times: Sequence[float], start: float, end: float) -> float:
    return sum(start <= moment < end for moment in times) / (end - start)
