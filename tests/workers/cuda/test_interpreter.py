"""Runs the tests of interpreted/ in a process of their own: one for all, for it starts with seconds of imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.effort import thorough

pytest.importorskip("triton")

FOLDER = Path(__file__).parent / "interpreted"
DEADLINE_S = 580.0


@pytest.mark.timeout(600)
@pytest.mark.parametrize("which", [thorough("not slow"), pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(which: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, str(FOLDER)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
    assert ran.returncode == 0, ran.stdout + ran.stderr
