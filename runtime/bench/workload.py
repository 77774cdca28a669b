"""What the benchmarks send: the same tokens on every machine and to every engine."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from headwise.runtime.llm import LLM, OutputDelta
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

    The rows start one after another: a stream's first token is there once its whole prompt is computed. Leaving
    aborts those that still run.
    """
    streams: list[Iterator[OutputDelta]] = []
    try:
        for prompt in prompts:
            streams.append(llm.stream(prompt, greedy(None)))
            next(streams[-1])
        yield streams
    finally:
        for stream in streams:
            stream.close()  # type: ignore[attr-defined]  # a generator
