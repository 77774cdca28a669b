"""The time of a step: what is divided by what, and that only steady steps count."""

from __future__ import annotations

import io
from typing import Any

import pytest
from tqdm import tqdm

from headwise.runtime import LLM
from headwise.runtime.bench.step import _fold, _median, measure_decode, measure_prefill, split
from headwise.runtime.bench.workload import UnsteadyError, prompts


def stats(steps: int, schedule: float, collect: float, cpu: float, *linear: float) -> dict[str, Any]:
    shards = [{"pid": 1, "seconds": {"linear": seconds}} for seconds in linear]
    return {
        "num_steps": steps,
        "engine_seconds": {"schedule": schedule, "collect": collect},
        "engine_cpu_seconds": cpu,
        "shards": shards,
    }


def test_parts_are_differences_over_steps_and_means_over_ranks() -> None:
    before, after = stats(10, 1.0, 5.0, 0.5, 3.0, 4.0), stats(14, 1.4, 9.0, 0.9, 4.0, 7.0)
    sample = split(before, after, 4.8, 8, per_step=True)
    assert (sample.seconds, sample.tokens, sample.steps) == (pytest.approx(1.2), 8, 4)
    assert sample.engine == pytest.approx({"schedule": 0.1, "collect": 1.0})
    assert sample.engine_cpu == pytest.approx(0.1) and sample.shard == pytest.approx({"linear": 0.5})
    whole = split(before, after, 4.8, 1024, per_step=False)
    assert whole.seconds == 4.8 and whole.engine == pytest.approx({"schedule": 0.4, "collect": 4.0})
    assert whole.shard == pytest.approx({"linear": 2.0})


def test_a_part_that_is_new_counts_from_nothing() -> None:
    before, after = stats(0, 0, 0, 0, 1.0), stats(1, 0, 0, 0, 1.0)
    after["shards"][0]["seconds"]["sample"] = 0.25
    assert split(before, after, 1.0, 1, per_step=True).shard == {"linear": 0.0, "sample": 0.25}


def test_the_reading_in_the_middle_is_reported() -> None:
    samples = [split(stats(0, 0, 0, 0, 0), stats(1, 0, 0, 0, 0), s, 1, per_step=True) for s in (5.0, 1.0, 3.0, 2.0)]
    assert _median(samples[:3]).seconds == 3.0 and _median(samples).seconds == 3.0


def test_decode_readings_hold_steps_of_all_rows(llm: LLM) -> None:
    bar = tqdm(file=io.StringIO())
    first, second = measure_decode(llm, prompts(4, 20, 256), 5, 2, bar)
    for sample in (first, second):
        assert sample.tokens == 4 and sample.steps >= 5 and sample.seconds > 0
        assert sample.engine.keys() == {"schedule", "submit", "collect", "emit"}
        assert 0 < sum(sample.shard.values()) <= sample.seconds
        assert sum(sample.engine.values()) > 0 and 0 < sample.engine_cpu <= sample.seconds
    assert bar.n == 2 and llm.stats()["num_running"] == 0


def test_rows_that_end_are_no_steady_decoding(llm: LLM) -> None:
    with pytest.raises(UnsteadyError, match="--max-model-len"):
        measure_decode(llm, prompts(2, 200, 256), 100, 1, tqdm(file=io.StringIO()))
    assert llm.stats()["num_running"] == 0


def test_a_prefill_reading_is_one_prompt(llm: LLM) -> None:
    [sample] = measure_prefill(llm, prompts(2, 100, 256), tqdm(file=io.StringIO()))
    assert (sample.tokens, sample.steps) == (100, 1) and sample.seconds >= sum(sample.engine.values()) > 0


def test_a_picture_shows_small_parts_as_one() -> None:
    assert _fold({"a": 60.0, "b": 0.5, "c": 39.0, "d": 0.5}) == {"a": 60.0, "c": 39.0, "other": 1.0}
    assert _fold({"a": 1.0}) == {"a": 1.0} and _fold({}) == {}
