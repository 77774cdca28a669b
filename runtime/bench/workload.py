"""What the benchmarks send: the same tokens on every machine and to every engine."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from headwise.runtime.engine.engine import Engine
from headwise.runtime.llm import LLM
from headwise.runtime.output import OutputDelta
from headwise.runtime.sampling_params import SamplingParams
from headwise.workers.errors import HeadwiseError


class UnsteadyError(HeadwiseError):
    """Rows ended or were preempted while steady decoding was to be measured."""


def prompts(batch: int, length: int, vocab_size: int) -> list[list[int]]:
    """``batch`` prompts of ``length`` random token ids, the same on every machine, with no shared prefix."""
    rng = random.Random(20260101 + batch)
    return [[rng.randrange(100, vocab_size - 100) for _ in range(length)] for _ in range(batch)]


def greedy(max_tokens: int | None) -> SamplingParams:
    """Exactly so many tokens, the most likely ones; None: until the model's length is reached."""
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


@contextmanager
def steady_rows(llm: LLM, prompts: Sequence[list[int]]) -> Iterator[list[Iterator[OutputDelta]]]:
    """Streams of requests that all decode, each with its first token out, until the model's length is reached.

    A row that has started is paused until all have: else the first would be far ahead of the last, and near the model's
    length. Leaving aborts those that still run.
    """
    streams: list[Iterator[OutputDelta]] = []
    names: list[str] = []

    def resume(engine: Engine) -> None:
        for name in names:
            engine.pause(name, False)

    try:
        for prompt in prompts:
            streams.append(llm.stream(prompt, greedy(None)))
            names.append(next(streams[-1]).request_id)  # its whole prompt is computed
            llm._loop.run(partial(Engine.pause, request_id=names[-1], paused=True))
        llm._loop.run(resume)
        yield streams
    finally:
        for stream in streams:
            stream.close()  # type: ignore[attr-defined]  # a generator
