"""What the benchmarks' tests share: engines that are quick to start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from headwise.runtime import LLM


@pytest.fixture(scope="module")
def long_llm(checkpoint: Callable[..., Path]) -> Iterator[LLM]:
    """One whose steady rows outlast a few requests."""
    settings = {"kv_memory": "16MiB", "cpus_per_rank": 1.0}
    with LLM(checkpoint("gqa", max_position_embeddings=4096), executor="local", quiet=True, **settings) as made:
        yield made


@pytest.fixture(scope="module")
def llm(checkpoint: Callable[..., Path]) -> Iterator[LLM]:
    """A small model with room for 256 tokens a request."""
    settings = {"kv_memory": "8MiB", "cpus_per_rank": 1.0, "max_model_len": 256}
    with LLM(checkpoint("gqa"), executor="local", quiet=True, **settings) as made:
        yield made
