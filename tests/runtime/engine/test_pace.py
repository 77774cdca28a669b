"""How long a step may take, by what steps took."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headwise.runtime.engine import pace as pace_module
from headwise.runtime.engine.pace import CAPTURE_S, FIRST_STEP_TIMEOUT_S, MIN_STEP_TIMEOUT_S, Pace
from headwise.workers.plan import StepOutput
from tests.plain_group import Bench, make_request


def test_nothing_is_known_before_the_first_step() -> None:
    assert Pace().limit_s(1) == FIRST_STEP_TIMEOUT_S


def test_fast_steps_may_take_the_least_and_slow_ones_a_multiple() -> None:
    pace = Pace()
    pace.saw_step(0.02, 1)
    assert pace.limit_s(1) == MIN_STEP_TIMEOUT_S
    pace.saw_step(5.0, 100)
    assert pace.limit_s(1) == pytest.approx(20.0, rel=1e-3)


def test_a_long_prompt_may_take_what_its_tokens_should_and_more() -> None:
    pace = Pace()
    pace.saw_step(0.05, 1)
    assert pace.limit_s(1024) == pytest.approx(8 * 1024 * 0.05), "generated tokens tell what a prompt takes at most"
    pace.saw_prefill(0.5, 500)
    assert pace.limit_s(1024) == pytest.approx(8 * 1024 * 0.001)


def test_a_slow_step_counts_less_as_time_goes_by(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(pace_module.time, "monotonic", lambda: now)
    pace = Pace()
    pace.saw_step(40.0, 1000)
    assert pace.limit_s(1) == 160.0
    now += 3600.0
    assert pace.limit_s(1) == 80.0


def test_a_setting_holds_for_every_step() -> None:
    pace = Pace(2.5)
    assert pace.limit_s(1) == pace.limit_s(100_000) == 2.5


def test_a_step_that_captures_a_graph_may_take_longer_whatever_the_setting() -> None:
    pace = Pace(0.5)
    assert pace.limit_s(1, captures=True) == 0.5 + CAPTURE_S
    pace = Pace()
    pace.saw_step(0.02, 1)
    assert pace.limit_s(0, captures=True) == MIN_STEP_TIMEOUT_S + CAPTURE_S


def test_a_step_may_wait_for_grammars() -> None:
    pace = Pace()
    pace.saw_step(0.02, 1)
    assert pace.limit_s(1, 60) == MIN_STEP_TIMEOUT_S + 30.0
    bench = Bench(depth=2)
    group, seen = bench.group, list[float]()
    bench.engine.pace.saw_step(0.001, 1)
    for number in range(6):
        request = make_request(str(number), [1, 2, number], 3)
        request.sampling = replace(request.sampling, grammar=f"grammar {number % 3}")
        bench.add(request)
    collect = group.collect

    def look() -> StepOutput:
        seen.append(bench.engine.step_limit_s)
        return collect()

    group.collect = look  # type: ignore[method-assign]
    bench.run()
    assert seen == [MIN_STEP_TIMEOUT_S + number * pace_module.GRAMMAR_S for number in (3, 1, 0, 0)]
