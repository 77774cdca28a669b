"""``headwise chaos``: a run finds nothing where nothing is wrong, finds what is, and leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headwise.runtime import LLM
from headwise.runtime.chaos.history import read
from headwise.runtime.chaos.run import Load, run
from headwise.runtime.output import OutputDelta
from tests.chaos.bench import speaking_model
from tests.runtime.conftest import Run, headwise  # noqa: F401 - a fixture

SETTINGS: dict[str, Any] = {"executor": "local", "kv_memory": "8MiB", "max_model_len": 256}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaking_model(tmp_path_factory.mktemp("model"))


def load(seconds: float, **changes: Any) -> Load:
    return Load(**{"seed": 41, "seconds": seconds, "streams": 3, "deadline_s": 60.0, "quiet": True} | changes)


@pytest.mark.slow  # CI has a run of chaos beside the tests
def test_a_run_finds_nothing_and_says_what_it_did(headwise: Run, model: Path, tmp_path: Path) -> None:  # noqa: F811
    arguments = ["--executor", "local", "--tp", "1", "--kv-memory", "8MiB", "--max-model-len", "256", "--streams", "3"]
    history = tmp_path / "history"
    code, out, err = headwise(
        "chaos", "-m", str(model), *arguments, "--minutes", "0.1", "--seed", "41", "--history", str(history), "--json"
    )
    told = json.loads(out)
    assert (code, told["findings"]) == (0, [])
    assert told["seed"] == 41 and "seed 41" in err
    assert told["requests"] > 2 and told["tokens"] > 0 and told["recoveries"] > 0
    asked = [event for event in read(history) if event["event"] == "asked"]
    assert len(asked) == told["requests"] and "prompt" not in history.read_text()


def test_a_wrong_flag_and_a_wrong_model_are_told(headwise: Run, model: Path) -> None:  # noqa: F811
    for arguments in (["--model", "nowhere"], ["--model", str(model), "--executor", "local", "--tp", "2"]):
        code, out, err = headwise("chaos", *arguments, "--minutes", "0.1")
        assert code == 2 and out == "" and err.startswith("headwise: ")


def test_a_token_that_comes_twice_is_found(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LLM.stream

    def stammer(*args: Any, **kwargs: Any) -> Iterator[OutputDelta]:
        for number, delta in enumerate(original(*args, **kwargs)):
            yield delta
            if number == 2 and delta.finish_reason is None:
                yield delta

    monkeypatch.setattr(LLM, "stream", stammer)
    verdict = run(str(model), load(1.0), SETTINGS)
    assert {"doubled"} <= {finding.rule for finding in verdict.findings}


@pytest.mark.slow
def test_ranks_that_are_processes_are_killed_and_nobody_notices(model: Path, tmp_path: Path) -> None:
    ranks = {"executor": "ray", "tensor_parallel_size": 2, "cpus_per_rank": 0.5}
    tiers = {"num_blocks": 64, "disk_kv_path": str(tmp_path / "disk")}
    verdict = run(str(model), load(20.0, seed=36), SETTINGS | ranks | tiers)
    assert verdict.findings == []
    assert verdict.kills > 0 and verdict.recoveries > 0 and verdict.pauses
