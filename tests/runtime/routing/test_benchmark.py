"""benchmarks/router.py: the router's simulation, small."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "router.py"


def test_it_finds_more_than_the_others_and_at_most_the_optimum(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = tmp_path / "router.svg"
    arguments = ["--replicas", "2", "5", "--requests", "200", "--json", "--plot", str(picture)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    *results, closing = map(json.loads, capsys.readouterr().out.splitlines())
    assert closing["benchmark"] == "router" and picture.stat().st_size > 0
    for replicas in (2, 5):
        rates = {result["way"]: result["hit_rate"] for result in results if result["replicas"] == replicas}
        assert max(rates["in turns"], rates["least loaded"]) < rates["router"] <= rates["optimum"] < 1
    assert all(result["bytes_per_held_block"] > 60 for result in results if result["way"] == "router")
