"""The bound of a whole call."""

from __future__ import annotations

import pytest

from headwise.runtime.bench.bounds import StepBound
from headwise.runtime.bench.throughput import call_bound, call_steps
from headwise.runtime.config import EngineConfig


def bound(seconds: float) -> StepBound:
    return StepBound(1, 1, 1, 1, "mkl", seconds, seconds, {"mkl": seconds})


@pytest.mark.parametrize(
    ("batch", "tokens", "prompt_tokens", "steps"),
    [
        (8, 64, 42, {(336, 8): 1, (8, 8): 63}),
        (32, 64, 42, {(1024, 0): 1, (320, 32): 1, (32, 32): 63}),
        (1, 1, 4096, {(1024, 0): 3, (1024, 1): 1}),
        (1, 4, 1, {(1, 1): 4}),
    ],
)
def test_the_fewest_steps_of_a_call(
    batch: int, tokens: int, prompt_tokens: int, steps: dict[tuple[int, int], int]
) -> None:
    assert call_steps(batch, tokens, prompt_tokens, EngineConfig(model="any")) == steps


def test_the_bound_of_a_call_is_that_of_its_steps() -> None:
    assert call_bound({(42, 1): 1, (1, 1): 3}, {(42, 1): bound(0.5), (1, 1): bound(0.1)}) == pytest.approx(0.8)
