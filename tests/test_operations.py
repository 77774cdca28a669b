"""docs/operations.md, as it stands: its commands and programs, one after another, in an empty folder; and the tests
that its table of faults names."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

DEADLINE_S = 120.0
TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "operations.md"


@contextmanager
def serving(command: str, folder: Path, environment: dict[str, str], drained: bool) -> Iterator[None]:
    """
    Args:
        drained: whether the block ends the server by draining it.
    """
    with subprocess.Popen(
        f"exec {command}", shell=True, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert any(line.startswith("ready ") for line in process.stdout)
            yield
        except BaseException:
            process.kill()
            raise
        if not drained:
            process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0


def check_faults(page: str) -> int:
    """Checks that the tests are there that a page's table of faults names in its last column; returns its rows."""
    rows = [line for line in page.splitlines() if line.startswith("|") and ".py `" in line]
    for row in rows:
        for file, names in re.findall(r"(test_\w+\.py) ((?:`\w+`(?:, )?)+)", row.split("|")[-2]):
            text = "".join(path.read_text() for path in TESTS.rglob(file))
            for name in re.findall(r"`(\w+)`", names):
                assert f"def {name}(" in text, f"{file} has no {name}"
    return len(rows)


def test_the_faults_are_made_by_tests_that_are_there() -> None:
    assert check_faults(PAGE.read_text()) >= 12


@pytest.mark.slow
def test_everything_on_the_page(tmp_path: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}
    blocks = [match.groups() for match in re.finditer(r"```(console|python)\n(.*?)```", PAGE.read_text(), re.DOTALL)]
    commands = [
        line if kind == "console" else f"{sys.executable} -c '{text}'"
        for kind, text in blocks
        for line in (re.findall(r"^\$ (.*)$", text, re.MULTILINE) if kind == "console" else [text])
    ]
    # What is exported holds until the next server is started.
    parts: list[list[str]] = [[]]
    for command in commands:
        if command.startswith("headwise serve"):
            parts.append([])
        parts[-1].append(command)

    def run(commands: list[str]) -> str:
        script = "set -e\n" + "\n".join(commands)
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=DEADLINE_S
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(parts[0])
    assert len(parts) == 3
    for serve, *others in parts[1:]:
        with serving(serve, tmp_path, environment, drained=others[-1].startswith("headwise drain")):
            answers = run(others)
            assert "Paris" in answers
    assert "SERVING" in answers and "1 of 1 replicas serve" in answers
