"""A process is told from another that has its id."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from headwise.workers.processes import ProcessId

DEADLINE_S = 30.0


def test_a_process_and_its_end() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        it = ProcessId.of(process.pid)
        assert it.is_here() and it.is_alive()
        another = dataclasses.replace(it, born=it.born + 1)
        for other in (another, dataclasses.replace(it, place="another host")):
            other.kill()
            assert process.poll() is None
        with pytest.raises(ProcessLookupError):
            another.open()
        it.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not it.is_alive()  # though its id is not free yet
        process.wait(DEADLINE_S)
        for look in (it.open, lambda: ProcessId.of(process.pid)):
            with pytest.raises(ProcessLookupError):
                look()
        it.kill()


@pytest.mark.parametrize("pidfds", [True, False])
def test_a_signal_is_for_one_process_also_without_pidfds(monkeypatch: pytest.MonkeyPatch, pidfds: bool) -> None:
    def refuse(pid: int) -> int:
        raise OSError(38, "this kernel has none")

    if not pidfds:
        monkeypatch.setattr(os, "pidfd_open", refuse)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        it = ProcessId.of(process.pid)
        dataclasses.replace(it, born=it.born + 1).kill()
        assert process.poll() is None
        it.kill()
        assert process.wait(DEADLINE_S) == -signal.SIGKILL


def test_a_sandbox_that_hides_the_id_of_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.read_text

    def read(path: Path, *args: Any, **options: Any) -> str:
        if path.name == "boot_id":
            raise FileNotFoundError(path)
        return original(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", read)
    assert ProcessId.of(os.getpid()).is_here()


@pytest.mark.parametrize("pidfds", [True, False])
def test_the_end_of_a_process_is_awaited(monkeypatch: pytest.MonkeyPatch, pidfds: bool) -> None:
    def refuse(pid: int) -> int:
        raise OSError(38, "this kernel has none")

    if not pidfds:
        monkeypatch.setattr(os, "pidfd_open", refuse)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        waiting = threading.Thread(target=ProcessId.of(process.pid).await_end, daemon=True)
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()
        process.kill()
        waiting.join(DEADLINE_S)
        assert not waiting.is_alive()
