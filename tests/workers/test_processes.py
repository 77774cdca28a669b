"""A process is told from another that has its id."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading

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
