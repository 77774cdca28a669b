"""docs/kv-policies.md: its commands are taken as they stand, and are run; its policies and sizes are true."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from headwise.runtime.cli import main as cli
from headwise.workers.kv.format import KV_DTYPES, kv_format
from headwise.workers.kv.policy import resolve_policy

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "kv-policies.md").read_text()
COMMANDS = re.findall(r"^\$ headwise (.*)$", PAGE, re.MULTILINE)
DEADLINE_S = 1800
SHORT = {
    "bench policies": "--tokens 768 --stretches 3 --samples 1 --prompts 1 --kv-dtypes int8",
    "calibrate": "--tokens 320",
    "generate": "--max-tokens 24 --executor local --max-model-len 1024",
}
"""What makes each command quick enough to be run."""


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_taken(command: str) -> None:
    group = typer.main.get_command(cli.app)
    words = shlex.split(command)
    while hasattr(group, "commands"):
        group = group.commands[words.pop(0)]
    group.make_context("headwise", words)


@pytest.mark.slow
@pytest.mark.timeout(DEADLINE_S)
def test_commands_run(tmp_path: Path) -> None:
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in COMMANDS:
        shorter = next(flags for name, flags in SHORT.items() if command.startswith(name))
        done = subprocess.run(
            ["bash", "-c", f"headwise {command} {shorter}"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
    assert {path.name for path in tmp_path.iterdir()} == {"tests", "heads.json", "policies.png"}


def test_policies_are_what_a_model_of_that_size_takes() -> None:
    named = re.findall(r"`((?:dense|window|sinks)[^`]*[@;][^`]*)`", PAGE)
    assert len(named) >= 3 and all(resolve_policy(policy, 30, 3).num_groups == 2 for policy in named)


def test_bytes_of_dtypes() -> None:
    rows = re.findall(r"^\| (`[^|]*`) \| (\d+) \|", PAGE, re.MULTILINE)
    told = {name: int(size) for names, size in rows for name in re.findall(r"`([^`]*)`", names)}
    assert told.keys() | {"int4/int8"} == set(KV_DTYPES)
    assert told == {name: kv_format(name, 64).block_bytes(16, 64) // 16 for name in told}
