"""A Ray with a job server, which asks for a token, as ``ray start`` makes one: in a session and a folder of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import psutil
import pytest

DEADLINE_S = 240.0
"""The ranks of another checkout compile their kernels first."""


class Head:
    """The head of a cluster.

    Attributes:
        folder: where Ray was started, and so where its jobs run.
        environment: of whom it lets in.
        address: of its job server.
        joined_at: the address that other nodes join.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._temporary = folder, tempfile.mkdtemp(prefix="r-", dir="/tmp")  # sockets' paths are short
        token = folder / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = os.environ | ray | {"PATH": path, "PYTHONUNBUFFERED": "1"}
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN"):
            self.environment.pop(name, None)
        dashboard, *others = free_ports(4)
        flags = ["port", "dashboard-agent-listen-port", "ray-client-server-port"]
        command = [
            *("ray", "start", "--head", "--block", "--num-cpus=2", "--object-store-memory=100000000"),
            *("--node-ip-address=127.0.0.1", f"--temp-dir={self._temporary}", f"--dashboard-port={dashboard}"),
            *("--min-worker-port=0", "--max-worker-port=0"),
            *(f"--{flag}={port}" for flag, port in zip(flags, others, strict=True)),
        ]
        self.address, self.joined_at = f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{others[0]}"
        self._process = _started(command, folder, self.environment)

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words,
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            words,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ray(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A command of ``ray job``."""
        return self.run("ray", "job", words[0], "--address", self.address, *words[1:])

    def end(self) -> None:
        """Idempotent."""
        try:
            _end(self._process)
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)


class Node:
    """Another node of a cluster, with two CPUs, for the length of a block."""

    def __init__(self, head: Head) -> None:
        command = [
            *("ray", "start", "--block", f"--address={head.joined_at}", "--num-cpus=2", "--node-ip-address=127.0.0.1"),
            *("--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0"),
        ]
        self._process = _started(command, head.folder, head.environment)

    def kill(self) -> None:
        """All its processes at once, as when a machine loses its power."""
        for process in [*descendants(self._process.pid), psutil.Process(self._process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait(DEADLINE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            _end(self._process)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    started = Head(tmp_path_factory.mktemp("head"))
    yield started
    started.end()


def _started(command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """A ``ray start --block`` that has started."""
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if "Ray runtime started" in line:
            break
    else:
        _end(process)
        raise AssertionError("".join(said))
    # Or Ray would wait for somebody to read what it says.
    threading.Thread(target=process.stdout.read, daemon=True).start()
    return process


def _end(process: subprocess.Popen[str]) -> None:
    processes = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(DEADLINE_S)
    finally:
        for one in processes:
            wait_until(lambda one=one: not is_alive(one))


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def processes_of(job: str) -> list[psutil.Process]:
    """Those that run a command with the words of a job, but the shell's: found by a word that no other has."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if job in words and "submit" not in words:
                found.append(process)
        except psutil.Error:
            pass
    return found


def free_ports(count: int) -> list[int]:
    """None of which is another one."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def wait_until(condition: Callable[[], object], seconds: float = DEADLINE_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.05)
