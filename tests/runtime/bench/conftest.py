"""What the benchmarks' tests share: the command line in this process, and an engine that is quick to start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from headwise.runtime import LLM
from headwise.runtime.bench import latency
from tests.runtime.cli.test_cli import Run


@pytest.fixture
def headwise(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    return Run(monkeypatch, capfd)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time to settle, in which the rows of a model this small would end."""
    monkeypatch.setattr(latency, "SETTLE_S", 0.0)


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
