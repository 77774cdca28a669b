"""What a user sees of kernels being compiled, and that a failure of it stops nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from headwise.runtime import warmup
from headwise.workers.jit import kernel_cache
from headwise.workers.warmup import WarmUpError


@pytest.fixture(autouse=True)
def cold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder without kernels."""
    for module in (warmup, kernel_cache):
        monkeypatch.setattr(module, "kernel_folder", lambda: tmp_path / "kernels" / "key")


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Puts a shell script in the place of the process that compiles."""

    def put(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(path))

    return put


def test_one_line_says_what_takes_so_long(child: Callable[[str], None], capfd: pytest.CaptureFixture[str]) -> None:
    child("echo 0 2; echo 1 2; echo 2 2")
    assert warmup.compile_kernels()
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[0].startswith(f"headwise: compiling CPU kernels for {kernel_cache.cpu_name()} (Numba ")
    assert err.count("headwise:") == 1


def test_a_process_that_compiles_sees_what_this_one_sees(child: Callable[[str], None], tmp_path: Path) -> None:
    child(f"env > {tmp_path}/environment")
    assert warmup.compile_kernels(quiet=True)
    environment = dict(
        line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines() if "=" in line
    )
    assert environment["HEADWISE_CACHE"] == str(tmp_path)
    assert environment["NUMBA_NUM_THREADS"] == environment["OMP_NUM_THREADS"] == "2"
    assert environment["PYTHONPATH"].split(os.pathsep) == [path or os.getcwd() for path in sys.path]


def test_quiet_is_quiet(child: Callable[[str], None], capfd: pytest.CaptureFixture[str]) -> None:
    child("echo 0 1; echo 1 1")
    warmup.prepare_kernels(quiet=True)
    child("echo waiting >&2; exit 1")
    warmup.prepare_kernels(quiet=True)
    assert capfd.readouterr() == ("", "")


def test_a_failure_is_told_and_stops_nothing(child: Callable[[str], None], capfd: pytest.CaptureFixture[str]) -> None:
    child("exit 3")
    warmup.prepare_kernels(quiet=False)
    assert "exit code 3" in capfd.readouterr().err
    with pytest.raises(WarmUpError, match="exit code 3"):
        warmup.compile_kernels()


def test_where_kernels_are_ready_nothing_is_started(
    child: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    child("exit 1")
    for module in (warmup, kernel_cache):
        monkeypatch.setattr(module, "kernels_ready", lambda: True)
    assert not warmup.compile_kernels()
    assert capfd.readouterr() == ("", "")


def test_where_kernels_cannot_be_kept_nothing_is_started(
    child: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    child("exit 1")
    for module in (warmup, kernel_cache):
        monkeypatch.setattr(module, "kernel_folder", lambda: None)
    warmup.prepare_kernels(quiet=False)
    with pytest.raises(WarmUpError, match="no folder"):
        warmup.compile_kernels()
