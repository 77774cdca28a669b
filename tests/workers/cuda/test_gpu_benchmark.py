"""benchmarks/gpu.py runs where nothing but torch, Triton and transformers is installed, all parts of it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "gpu.py"
DEADLINE_S = 280.0
ABSENT = [
    "accelerate",
    "gguf",
    "google",
    "grpc",
    "prometheus_client",
    "psutil",
    "ray",
    "rich",
    "typer",
    "xxhash",
    "zmq",
]
ALONE = f"""
import runpy, sys

sys.modules.update(dict.fromkeys({ABSENT}))  # as if they were not installed
sys.path.insert(0, {str(SCRIPT.parent)!r})
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


def run(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ALONE, *options]
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=DEADLINE_S)


@pytest.mark.slow
def test_every_part_runs_in_the_interpreter() -> None:
    ran = run("--tiny", TRITON_INTERPRET="1")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    results = json.loads(ran.stdout.splitlines()[-1], parse_constant=pytest.fail)
    assert results["errors"] == {} and not results["measured"]
    assert all(math.isfinite(number) for number in numbers(results))
    for part in ("decode", "prefill", "attention", "kernels"):
        assert results[part] and not any("left_out" in case for case in results[part]), part
    assert all(check["right"] for check in results["kernels"])
    assert results["transformers"]["difference"] < 1e-3
    assert [goal["reached"] for goal in results["goals"]] == [None] * 6
    assert "interpreter: the times mean nothing" in ran.stdout


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, float) else []


@pytest.mark.parametrize("options", [[], ["--tiny"]], ids=["no GPU", "no interpreter"])
def test_it_says_what_to_do_where_it_cannot_run(options: list[str]) -> None:
    ran = run(*options, CUDA_VISIBLE_DEVICES="")
    assert ran.returncode == 2 and not ran.stdout
    assert len(ran.stderr.splitlines()) == 1 and "TRITON_INTERPRET=1 python benchmarks/gpu.py --tiny" in ran.stderr


def test_goals_are_met_by_the_least_of_their_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    from gpu_parts.report import goals, tables

    decode = {"rows": 1, "context": 512, "of_copy": 0.85, "overhead": 0.01}
    results: dict[str, Any] = {
        "measured": True,
        "decode": [decode, decode | {"context": 4096, "of_copy": 0.79}, decode | {"rows": 64}],
        "attention": [
            {"rows": 8, "context": 32_768, "of_copy": 0.8},
            {"rows": 64, "context": 32_768, "left_out": "no"},
        ],
        "prefill": [{"tokens": 4096, "chunk": 1024, "of_matmul": 0.7}],
        "transformers": {"ours_over_theirs": 2.5},
    }
    found = goals(results)
    assert [goal["measured"] for goal in found] == [0.79, 0.85, 0.8, None, 0.99, 2.5]
    assert [goal["reached"] for goal in found] == [False, True, True, None, True, False]
    results |= {
        "device": "a GPU",
        "torch": "2",
        "triton": "3",
        "ceilings": {},
        "copies": {},
        "kernels": [],
        "seconds": {},
    }
    said = "\n".join(tables(results | {"goals": found, "errors": {"copies": "none"}, "warnings": []}))
    assert "| decode of 1 row, of a copy's bandwidth | 0.8 | 0.79 | no |" in said
    assert "| copies | none |" in said and "not measured" in said
