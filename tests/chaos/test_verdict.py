"""What a verdict says of a history."""

from __future__ import annotations

from pathlib import Path

import pytest

from headwise.runtime.chaos.checker import Finding
from headwise.runtime.chaos.history import Event, History, read
from headwise.runtime.chaos.verdict import judge, pauses, percentile, show


def delta(at: float, request: str = "a") -> Event:
    return {"at": at, "event": "delta", "request": request, "sample": 0, "tokens": [1]}


KILLED: list[Event] = [
    {"at": 0.0, "event": "asked", "request": "a"},
    {"at": 0.0, "event": "asked", "request": "b"},
    delta(0.5),
    delta(0.9, "b"),
    {"at": 1.0, "event": "fault", "fault": "kill", "kills": 1, "ranks": [1]},
    delta(1.01),  # was on its way
    {"at": 1.1, "event": "down", "epoch": 1},
    delta(1.11),  # was read late
    {"at": 1.5, "event": "asked", "request": "late"},
    {"at": 3.0, "event": "up", "epoch": 2},
    delta(3.25),
    delta(3.3),
    delta(3.5, "b"),
    delta(3.6, "late"),
]


def test_a_pause_lasts_from_the_fault_to_the_first_token_of_the_next_group() -> None:
    assert pauses(KILLED) == [2.25, 2.5]


def test_a_stream_that_has_ended_has_no_pause() -> None:
    assert pauses([event for event in KILLED if event["event"] != "delta" or event["at"] < 2]) == []


def test_a_verdict_counts(capsys: pytest.CaptureFixture[str]) -> None:
    fired = {"at": 0.2, "event": "fired", "fault": "step.mlp exit", "kills": 1}
    finding = Finding("doubled", "a [token] came twice", "a")
    verdict = judge(7, 10.0, [*KILLED, fired], 1, [finding])
    told = verdict.as_dict()
    assert told["faults"] == {"kill": 1, "step.mlp exit": 1} and told["kills"] == 2 and told["recoveries"] == 1
    assert (told["requests"], told["tokens"], told["streams_paused"]) == (3, 8, 2)
    assert (told["pause_p50_s"], told["pause_p99_s"]) == (2.25, 2.5)
    assert told["findings"] == [{"rule": "doubled", "request": "a", "detail": "a [token] came twice"}]
    show(verdict)
    out = capsys.readouterr().out
    assert (
        "step.mlp exit" in out and "FOUND doubled: request a: a [token] came twice" in out and "seed 7: 1 found" in out
    )
    show(judge(7, 10.0, [], 0, []))
    assert "seed 7: nothing found" in capsys.readouterr().out


def test_percentiles_are_values_that_were_there() -> None:
    assert [percentile([1.0, 2.0, 3.0, 4.0], p) for p in (1, 50, 75, 99)] == [1.0, 2.0, 3.0, 4.0]
    assert percentile([], 50) is None


def test_a_history_is_read_as_it_was_written(tmp_path: Path) -> None:
    with History(tmp_path / "history") as history:
        history.begin()
        history.add("asked", request="0-0", client=0, way="stream", questions=[1])
        history.add("fired", at=history.began + 2, fault="step.mlp kill", kills=1)
    assert read(tmp_path / "history") == history.events
    history.add("done", request="0-0")  # by somebody who still waited
    assert history.events[1]["at"] == 2 and history.events[0]["at"] < 1
