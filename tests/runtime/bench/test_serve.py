"""The serve benchmark on a tiny model, with a real server in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from headwise.runtime.bench.serve import Load, ServerStartError, _ratio, _serving, run


def test_both_ways_are_measured(
    checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings = {"tensor_parallel_size": 1, "executor": "local", "kv_memory": "16MiB"}
    plot = tmp_path / "serve.png"
    run(str(checkpoint("gqa")), Load(4, 8, 10, 3, 1), settings, as_json=True, plot=plot)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("way") for line in lines] == ["driver", "grpc", "grpc streams", None]
    assert all(line["tok_s"] > 0 and line["ttft_s"] > 0 for line in lines[:3])
    assert lines[3]["throughput_ratio"] > 0 and lines[3]["benchmark"] == "serve" and plot.stat().st_size > 1000


@pytest.mark.thorough
def test_a_server_that_does_not_start_is_told(tmp_path: Path) -> None:
    with pytest.raises(ServerStartError, match="ended with 2"), _serving(tmp_path, {"executor": "local"}):
        pass


def test_the_ratio_is_of_pairs() -> None:
    assert _ratio([1.0, 8.0, 3.0], [2.0, 4.0, 3.0]) == 1.0
