"""Arrivals, percentiles, and requests that wait."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from headwise.runtime import LLM
from headwise.runtime.bench.latency import Timeline, arrival_times, measure, metrics_of, summary
from headwise.runtime.bench.workload import UnsteadyError, prompts


def test_arrivals_are_reproducible_and_a_poisson_process() -> None:
    due = arrival_times(4.0, 20_000, seed=1)
    assert due == arrival_times(4.0, 20_000, seed=1) and due != arrival_times(4.0, 20_000, seed=2)
    gaps = np.diff([0.0, *due])
    assert (gaps > 0).all()
    # Exponential: mean and standard deviation both 1/rate, and a share of 1/e of the gaps above it.
    assert gaps.mean() == pytest.approx(0.25, rel=0.03) and gaps.std() == pytest.approx(0.25, rel=0.05)
    assert (gaps > 0.25).mean() == pytest.approx(1 / np.e, abs=0.02)


def test_a_summary_of_known_values() -> None:
    found = summary([value / 1000 for value in range(101)])
    assert (found["p50_ms"], found["p90_ms"], found["p99_ms"]) == pytest.approx((50, 90, 99))
    assert (found["mean_ms"], found["max_ms"], found["count"]) == (50, 100, 101)
    assert found["p99_over_p50"] == pytest.approx(1.98)


def test_latencies_count_from_when_a_request_was_due() -> None:
    found = metrics_of([Timeline(10.0, [12.0, 12.5, 14.0]), Timeline(11.0, [11.5])], [0.25])
    assert found == {
        "time to first token": [2.0, 0.5],
        "inter-token": [0.5, 1.5],
        "end to end": [4.0, 0.5],
        "steady inter-token": [0.25],
    }
    assert metrics_of([Timeline(11.0, [11.5])], []).keys() == {"time to first token", "end to end"}


@pytest.mark.usefixtures("at_once")
def test_requests_are_sent_when_they_are_due_while_others_run(long_llm: LLM) -> None:
    """Open loop: all are due at once, and none waits for another to be sent."""
    with ThreadPoolExecutor(8) as consumers:
        started = time.perf_counter()
        timelines, gaps = measure(long_llm, consumers, prompts(6, 30, 256), 5, [0.0] * 6, prompts(2, 10, 256))
    assert len({timeline.arrival for timeline in timelines}) == 1
    for timeline in timelines:
        assert started < timeline.arrival < timeline.tokens[0] and len(timeline.tokens) == 5
        assert timeline.tokens == sorted(timeline.tokens)
    assert gaps and min(gaps) >= 0
    assert long_llm.stats()["num_running"] == 0


def test_steady_rows_that_end_are_an_error(llm: LLM) -> None:
    with ThreadPoolExecutor(2) as consumers, pytest.raises(UnsteadyError, match="--max-model-len"):
        measure(llm, consumers, prompts(1, 10, 256), 5, [0.0], prompts(1, 250, 256))
    assert llm.stats()["num_running"] == 0


@pytest.mark.usefixtures("at_once")
def test_an_error_of_a_request_reaches_the_caller(long_llm: LLM) -> None:
    with ThreadPoolExecutor(2) as consumers, pytest.raises(ValueError, match="max_model_len=4096"):
        measure(long_llm, consumers, prompts(1, 5000, 256), 5, [0.0], prompts(1, 10, 256))
    assert long_llm.stats()["num_running"] == 0
