"""An engine with nothing to do, and its shards, let the machine be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from headwise.runtime import LLM, SamplingParams

LIMIT_PERCENT = 2.0  # of a core
WINDOW_S = 1.0
ATTEMPTS = 5


def busiest(pids: list[int]) -> float:
    """The largest share of a core, in percent, that one of the processes used over a window."""
    processes = [psutil.Process(pid) for pid in pids]
    before = [sum(process.cpu_times()[:2]) for process in processes]
    psutil.cpu_percent(interval=WINDOW_S)
    after = [sum(process.cpu_times()[:2]) for process in processes]
    return max(100 * (b - a) / WINDOW_S for a, b in zip(before, after, strict=True))


@pytest.mark.thorough
def test_an_idle_engine_and_its_shards_sleep(checkpoint: Callable[..., Path]) -> None:
    settings = {"tensor_parallel_size": 2, "kv_memory": "16MiB", "max_model_len": 128, "quiet": True}
    with LLM(checkpoint("gqa"), **settings) as llm:
        llm.generate([[5, 6, 7]] * 4, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
        pids = [psutil.Process().pid, *llm.stats()["shard_pids"]]
        # Others may wake a process now and then; one that polls never has a quiet window.
        assert min(busiest(pids) for _ in range(ATTEMPTS)) < LIMIT_PERCENT
