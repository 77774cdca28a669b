"""The command line in this process, for its own tests and those of the benchmarks."""

from __future__ import annotations

import io
import sys

import pytest

from headwise.runtime.bench import latency
from headwise.runtime.cli import main as cli

LOCAL = ["--executor", "local", "--kv-memory", "8MiB", "--cpus-per-rank", "1"]


class Run:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capfd = monkeypatch, capfd

    def __call__(self, *arguments: str, stdin: str = "") -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a command in this process."""
        self._monkeypatch.setattr(sys, "argv", ["headwise", *arguments])
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        self._capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        code = left.value.code or 0
        assert isinstance(code, int)
        return code, *self._capfd.readouterr()


@pytest.fixture
def headwise(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    return Run(monkeypatch, capfd)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time to settle, in which the rows of a model this small would end."""
    monkeypatch.setattr(latency, "SETTLE_S", 0.0)
