"""``headwise doctor`` and a Ray that is really there: two nodes on this machine, with a token."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

DEADLINE_S = 120.0
Doctor = Callable[..., tuple[int, dict[str, list[dict[str, str]]]]]


@contextmanager
def ray_node(environment: dict[str, str], *options: str) -> Iterator[None]:
    """A ``ray start --block``, for the length of the block."""
    command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--object-store-memory=80000000", *options]
    if not Path(command[0]).exists():  # an environment that borrows another's packages
        command[:1] = [sys.executable, "-m", "ray.scripts.scripts"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert any("Ray runtime started" in line for line in process.stdout)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=DEADLINE_S)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of the cluster's nodes, and of who may join: a home and a token of its own."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    known["HEADWISE_CACHE"] = known.get("HEADWISE_CACHE", str(Path.home() / ".cache" / "headwise"))
    home = str(tmp_path_factory.mktemp("home"))
    return known | {"HOME": home, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@pytest.fixture(scope="module")
def address(environment: dict[str, str]) -> Iterator[str]:
    """Of a cluster whose head gives out no CPU."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with ray_node(environment, "--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false"):
        yield f"127.0.0.1:{port}"


@pytest.fixture
def doctor(address: str, environment: dict[str, str]) -> Doctor:
    """The exit code, and the findings by level; some variables may be others, or with None not there."""

    def run(**changes: str | None) -> tuple[int, dict[str, list[dict[str, str]]]]:
        known = {name: value for name, value in (environment | changes).items() if value is not None}
        command = [sys.executable, "-m", "headwise.runtime.cli", "doctor", "--address", address, "--device", "cpu"]
        command += ["--kv-memory", "4MiB", "--port", "0", "--json"]
        done = subprocess.run(command, env=known, capture_output=True, text=True, timeout=DEADLINE_S)
        found = json.loads(done.stdout)["findings"]
        assert environment["RAY_AUTH_TOKEN"] not in done.stdout + done.stderr
        levels: dict[str, list[dict[str, str]]] = {"pass": [], "warn": [], "fail": []}
        for one in found:
            levels[one["level"]].append(one)
        return done.returncode, levels

    return run


def test_a_head_without_cpus_and_then_a_node_that_has_some(
    doctor: Doctor, address: str, environment: dict[str, str]
) -> None:
    code, found = doctor()
    assert code == 1 and [one["name"] for one in found["fail"]] == ["Ray CPUs"]
    with ray_node(environment, f"--address={address}", "--num-cpus=2"):
        code, found = doctor()
        nodes = [one["said"] for one in found["pass"] if one["name"].startswith("Ray node")]
        assert code == 0 and sorted(nodes) == ["0 CPUs and 0 GPUs", "2 CPUs and 0 GPUs"]


def test_a_token_that_is_wrong_missing_or_not_used(doctor: Doctor) -> None:
    code, found = doctor(RAY_AUTH_TOKEN=secrets.token_hex(32))
    [failure] = found["fail"]
    assert code == 1 and "refuses the token of RAY_AUTH_TOKEN" in failure["said"] and failure["fix"]
    code, found = doctor(RAY_AUTH_TOKEN=None)
    assert code == 1 and [one["name"] for one in found["fail"]] == ["Ray auth", "Ray"]
    code, found = doctor(RAY_AUTH_MODE=None)
    [failure] = found["fail"]
    assert code == 1 and "asks for a token, and gets none" in failure["said"]
    assert failure["fix"].startswith("RAY_AUTH_MODE=token")
