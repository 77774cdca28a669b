"""The whole model with Triton's kernels against transformers' logits, for every number of ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from triton.runtime.interpreter import GridExecutor

from tests.workers.reference import test_llama


@pytest.fixture(autouse=True)
def one_kernel_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are threads here, and the interpreter runs one kernel in a process."""
    lock, run = threading.Lock(), GridExecutor.__call__

    def locked(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        with lock:
            run(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", locked)


SHAPES_AND_RANKS = {("gqa", 1), ("uneven", 2), ("mqa", 2)}
"""In CI: ranks with several heads a KV head, with unlike numbers of heads, and with copies of one KV head."""


@pytest.mark.parametrize(
    ("shape", "tp"),
    [
        pytest.param(shape, tp, marks=() if (shape, tp) in SHAPES_AND_RANKS else pytest.mark.slow)
        for shape in test_llama.SHAPES
        for tp in (1, 2)
    ],
)
def test_logits_are_those_of_transformers(checkpoint: Callable[..., Path], shape: str, tp: int) -> None:
    test_llama.test_logits_are_those_of_transformers(checkpoint, shape, "cuda", tp)
