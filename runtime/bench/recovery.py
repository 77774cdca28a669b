"""``headwise bench recovery``: what streams feel of a rank that is killed, and whether they go on with their tokens."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from rich.table import Table

from headwise.runtime.bench import report
from headwise.runtime.llm import LLM
from headwise.runtime.output import FinishReason
from headwise.runtime.sampling_params import SamplingParams
from headwise.runtime.structured_outputs import StructuredOutputsParams
from headwise.workers.errors import HeadwiseError
from headwise.workers.processes import ProcessId

AGAIN, SPARE = CASES = ("started again", "warm spare")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "facts": {"type": "array", "items": {"type": "string", "maxLength": 60}, "minItems": 4, "maxItems": 8},
    },
    "required": ["name", "facts"],
    "additionalProperties": False,
}
READY_TIMEOUT_S = 120.0
_LOOK_S = 0.02

Settings = dict[str, Any]
Answer = tuple[list[int], FinishReason | None]


class DifferentTokensError(HeadwiseError):
    """A stream went on with other tokens than those of an engine whose ranks are not killed."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent, and how often a rank is killed.

    Attributes:
        streams: at the same time: a third greedy, a third seeded, a third JSON by a schema. Each is asked for again
            when it is over.
        tokens: of each stream, at most.
        kills: of one rank after another, each at a random moment once all streams have had a token since the last.
        seed: of these moments.
    """

    streams: int
    tokens: int
    kills: int
    seed: int


@dataclass(slots=True)
class Seen:
    """What came of a case.

    Attributes:
        waits_s: of each stream and kill, from the kill to the stream's next token.
        rebuilt_s: of each kill, from when it was noticed until there were other shards.
        num_compared: streams that ended, with the tokens that they had to have.
        spare_bytes: of the weights of the spare ranks.
    """

    waits_s: list[float] = field(default_factory=list)
    rebuilt_s: list[float] = field(default_factory=list)
    num_compared: int = 0
    spare_bytes: int = 0


def run(model: str, load: Load, settings: Settings, *, as_json: bool) -> None:
    """Measures both cases, and prints.

    Raises:
        DifferentTokensError: a stream has other tokens than without kills.
    """
    results = []
    for case in CASES:
        print(f"headwise: {case}", file=sys.stderr)
        with LLM(model, **settings | {"warm_spare": case == SPARE}) as llm:
            results.append(_result(case, measure(llm, load)))
    report.emit("recovery", model, settings | asdict(load), results, [_table(results, load)], as_json=as_json)


def measure(llm: LLM, load: Load) -> Seen:
    """
    Raises:
        DifferentTokensError: a stream has other tokens than without kills.
    """
    requests = requests_of(load.streams, load.tokens)
    with ThreadPoolExecutor(load.streams) as threads:
        alone = [thread.result() for thread in [threads.submit(_ask, llm, *request) for request in requests]]
    seen, chance, over = Seen(), random.Random(load.seed), threading.Event()
    streams = [_Stream(llm, request, answer, over) for request, answer in zip(requests, alone, strict=True)]
    with ThreadPoolExecutor(load.streams) as threads:
        runs = [threads.submit(stream.run) for stream in streams]
        try:
            _await(lambda: all(stream.times for stream in streams), runs)
            for number in range(load.kills):
                _await(lambda: _has_spare(llm), runs)
                killed = _kill(llm, number, chance.uniform(0.0, 1.5), runs)
                _await_recovery(llm, number + 1, streams, runs)
                seen.waits_s += [wait_of(stream.times, killed) for stream in streams]
                seen.rebuilt_s.append(llm.stats()["recoveries"]["last_seconds"])
                print(
                    f"headwise: kill {number + 1} of {load.kills}: {max(seen.waits_s[-load.streams :]):.2f} s",
                    file=sys.stderr,
                )
        finally:
            over.set()
        seen.num_compared = sum(run.result() for run in runs)
    seen.spare_bytes = llm.stats()["recoveries"]["spare_bytes"]
    return seen


def requests_of(streams: int, tokens: int) -> list[tuple[str, SamplingParams]]:
    """Prompts and what is asked for: greedy, seeded and JSON in turn."""
    kinds: list[Callable[[int], SamplingParams]] = [
        lambda number: SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True),
        lambda number: SamplingParams(temperature=0.8, seed=number, max_tokens=tokens, ignore_eos=True),
        lambda number: SamplingParams(
            temperature=0.7, seed=number, max_tokens=tokens, structured_outputs=StructuredOutputsParams(json=SCHEMA)
        ),
    ]
    animals = ("whales", "owls", "bees", "foxes", "ants", "eels", "crows", "newts")
    return [
        (f"Facts about {animals[number % len(animals)]}, number {number}:", kinds[number % 3](number))
        for number in range(streams)
    ]


def wait_of(times: Sequence[float], killed: float) -> float:
    """From a kill to a stream's next token: the one after the stream's longest pause since. (Tokens that were computed
    before the kill may come a moment after it.)

    Args:
        times: of the stream's tokens, one before the kill and one after the recovery at least.
    """
    pauses = [(b - a, b) for a, b in pairwise(times) if b > killed]
    return max(pauses)[1] - killed


class _Stream:
    """One stream, asked for again and again.

    Attributes:
        times: when each of its tokens came.
    """

    def __init__(self, llm: LLM, request: tuple[str, SamplingParams], answer: Answer, over: threading.Event) -> None:
        self._llm, self._request, self._answer, self._over = llm, request, answer, over
        self.times: list[float] = []

    def run(self) -> int:
        """Returns how often it came to its end.

        Raises:
            DifferentTokensError: its tokens are others than they have to be.
        """
        num_ended = 0
        while not self._over.is_set():
            tokens: list[int] = []
            for delta in self._llm.stream(*self._request):
                self.times += [time.monotonic()] * len(delta.token_ids)
                tokens += delta.token_ids
            if (tokens, delta.finish_reason) != self._answer:
                at = next(
                    (i for i, pair in enumerate(zip(tokens, self._answer[0], strict=False)) if pair[0] != pair[1]), None
                )
                raise DifferentTokensError(
                    f"{self._request[0]!r}: {len(tokens)} tokens ({delta.finish_reason}) instead of "
                    f"{len(self._answer[0])} ({self._answer[1]}), the first difference at {at}: {delta.error}"
                )
            num_ended += 1
        return num_ended


def _ask(llm: LLM, prompt: str, params: SamplingParams) -> Answer:
    tokens: list[int] = []
    for delta in llm.stream(prompt, params):
        tokens += delta.token_ids
    return tokens, delta.finish_reason


def _await(condition: Callable[[], bool], runs: Sequence[Future[int]]) -> None:
    """
    Raises:
        DifferentTokensError: a stream has failed meanwhile.
        TimeoutError: it takes too long.
    """
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not condition():
        done, _ = wait(runs, timeout=_LOOK_S, return_when="FIRST_COMPLETED")
        for run in done:
            run.result()
        if time.monotonic() > deadline:
            raise TimeoutError(f"the streams have not gone on within {READY_TIMEOUT_S:g} s")


def _kill(llm: LLM, number: int, after_s: float, runs: Sequence[Future[int]]) -> float:
    """Kills the next rank after a while; returns when."""
    shards = llm.stats()["shards"]
    due = time.monotonic() + after_s
    _await(lambda: time.monotonic() >= due, runs)
    ProcessId(**shards[number % len(shards)]["process"]).kill()
    return time.monotonic()


def _await_recovery(llm: LLM, count: int, streams: Sequence[_Stream], runs: Sequence[Future[int]]) -> None:
    """Waits until so many groups have been replaced, and each stream has had a token since."""
    _await(lambda: llm._loop.engine.recoveries()["count"] >= count, runs)
    recovered = time.monotonic()
    _await(lambda: all(stream.times[-1] > recovered for stream in streams), runs)


def _has_spare(llm: LLM) -> bool:
    return not llm.config.warm_spare or llm._loop.engine.recoveries()["spare"] == "ready"


def _result(case: str, seen: Seen) -> dict[str, Any]:
    waits = sorted(seen.waits_s)
    return {
        "case": case,
        **{f"p{share}_s": round(waits[min(len(waits) - 1, len(waits) * share // 100)], 2) for share in (50, 90, 99)},
        "max_s": round(waits[-1], 2),
        "rebuilt_p50_s": round(sorted(seen.rebuilt_s)[len(seen.rebuilt_s) // 2], 2),
        "compared": seen.num_compared,
        "spare_bytes": seen.spare_bytes,
    }


def _table(results: Sequence[dict[str, Any]], load: Load) -> Table:
    rows = [
        [
            result["case"],
            *(f"{result[key]:.2f}" for key in ("p50_s", "p90_s", "p99_s", "max_s", "rebuilt_p50_s")),
            str(result["compared"]),
            f"{result['spare_bytes'] / 2**20:.0f}",
        ]
        for result in results
    ]
    columns = ("", "p50", "p90", "p99", "max", "shards there p50", "streams compared", "MiB of spare weights")
    caption = "seconds from a rank's SIGKILL to a stream's next token; every stream had the tokens of one without kills"
    return report.table(f"{load.streams} streams, {load.kills} kills", columns, rows, caption)
