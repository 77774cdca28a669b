"""docs/disaggregation.md, as it stands: its commands and programs, section by section, in an empty folder; and the
tests that its table of faults names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.test_operations import DEADLINE_S, check_faults, serving

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "disaggregation.md").read_text()
SECTIONS = {part.partition("\n")[0]: part for part in PAGE.split("\n## ")[1:] if "```" in part}


def steps(section: str) -> list[tuple[str, str]]:
    """(kind, text) of what a section has one do: commands one by one, and programs."""
    blocks = re.findall(r"```(console|python)\n(.*?)```", SECTIONS[section], re.DOTALL)
    return [
        (kind, step)
        for kind, text in blocks
        for step in (re.findall(r"^\$ (.*)$", text, re.MULTILINE) if kind == "console" else [text])
    ]


def test_every_section_with_commands_is_run() -> None:
    assert [*SECTIONS] == ["On one machine", "Several of each", "Two servers", "Two machines"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("section", SECTIONS)
def test_section(section: str, tmp_path: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}
    answers = []
    with ExitStack() as servers:
        for kind, step in steps(section):
            if step.startswith("headwise serve"):
                servers.enter_context(serving(step, tmp_path, environment, drained=False))
                continue
            command = ["bash", "-c", step] if kind == "console" else [sys.executable, "-c", step]
            done = subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=DEADLINE_S
            )
            assert done.returncode == 0, done.stderr
            answers.append(done.stdout)
    handed = r'"handoff_tokens": [1-9]|1 committed, 0 computed|"committed",role="decode"} 2.0|"finish_reason"'
    assert answers and all(re.search(handed, answer) for answer in answers if answer)


def test_the_faults_are_made_by_tests_that_are_there() -> None:
    assert check_faults(PAGE) >= 15
