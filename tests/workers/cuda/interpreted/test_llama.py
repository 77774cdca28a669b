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


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("shape", list(test_llama.SHAPES))
def test_logits_are_those_of_transformers(checkpoint: Callable[..., Path], shape: str, tp: int) -> None:
    test_llama.test_logits_are_those_of_transformers(checkpoint, shape, "cuda", tp)
