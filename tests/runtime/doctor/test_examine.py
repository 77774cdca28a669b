"""Which checks are made of which setup."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headwise.cluster import ray_nodes
from headwise.cluster.group import GroupStartError
from headwise.cluster.ray_nodes import NodeFacts
from headwise.runtime.config import engine_config
from headwise.runtime.doctor import examine as examining
from headwise.runtime.doctor.examine import Setup, examine
from headwise.runtime.doctor.finding import Finding, Level
from tests.effort import thorough

ADDRESS = "10.0.0.1:6379"


def looked(environment: dict[str, str] | None = None, **settings: Any) -> dict[str, Finding]:
    """What is found, by name."""
    config = engine_config(**{"model": "", "device": "cpu", "kv_memory": "4MiB"} | settings)
    return {found.name: found for found in examine(Setup(config), environment or {})}


@pytest.fixture(autouse=True)
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A cluster that nobody starts: the one at ADDRESS. Returns the addresses that were asked for."""
    asked = []
    facts: dict[str, Any] = {"versions": ray_nodes.installed(), "shared_memory_bytes": 1 << 30, "open_files": 65536}

    def visit(address: str) -> list[NodeFacts]:
        asked.append(address)
        if address != ADDRESS:
            raise GroupStartError(f"no Ray at address={address!r}")
        return [
            NodeFacts("10.0.0.1", 8.0, 1.0, **facts),
            NodeFacts("10.0.0.2", 8.0, 1.0, **facts, clock_ahead_s=30.0, clock_sure_to_s=0.1),
        ]

    monkeypatch.setattr(ray_nodes, "visit_nodes", visit)
    monkeypatch.setattr(examining.ray_cluster, "unreachable", lambda address: None)
    return asked


@pytest.mark.parametrize("environment", [{}, {"RAY_ADDRESS": ""}, {"RAY_ADDRESS": "local"}])
def test_without_a_model_and_a_cluster(two_nodes: list[str], environment: dict[str, str]) -> None:
    found = looked(environment)
    assert not two_nodes and "starts a Ray of its own" in found["Ray"].said
    assert "with --model" in found["model"].said and "heads" not in found
    assert not [one for name, one in found.items() if name.startswith("package") and one.level is Level.FAIL]


def test_without_ray(two_nodes: list[str]) -> None:
    assert "none is needed" in looked({"RAY_ADDRESS": ADDRESS}, executor="local")["Ray"].said
    assert not two_nodes


def test_a_good_model(checkpoint: Callable[..., Path]) -> None:
    found = looked(model=str(checkpoint("gqa")), tensor_parallel_size=2)
    assert {found[name].level for name in ("weights", "heads", "KV memory", "GPUs")} == {Level.PASS}


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    nowhere, empty = looked(model=str(tmp_path / "none")), looked(model=str(tmp_path))
    assert nowhere["model"].level is Level.FAIL and "nothing is at" in nowhere["model"].said
    assert empty["model"].level is Level.FAIL and "config.json" in empty["model"].said and empty["model"].fix


def test_longer_requests_than_the_model_knows(checkpoint: Callable[..., Path]) -> None:
    found = looked(model=str(checkpoint("gqa")), max_model_len=4096)["KV memory"]
    assert found.level is Level.FAIL and found.fix == "--max-model-len 512 or less"


def test_memory_of_gpus_that_are_elsewhere(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examining, "_visible_gpus", lambda: 0)
    settings: dict[str, Any] = {"model": str(checkpoint("gqa")), "device": "cuda"}
    unknown = looked({}, address=ADDRESS, **settings)
    assert unknown["KV memory"].level is Level.WARN and "--gpu-memory" in unknown["KV memory"].fix
    assert unknown["GPUs"].level is Level.PASS and "2 at the Ray cluster" in unknown["GPUs"].said
    config = engine_config(**settings)
    known = {found.name: found for found in examine(Setup(config, gpu_memory=1 << 30), {})}
    assert known["KV memory"].level is Level.PASS
    assert known["GPUs"].level is Level.FAIL and "this machine has 0" in known["GPUs"].said


@pytest.mark.parametrize("named_by", ["option", "environment"])
def test_a_cluster(two_nodes: list[str], named_by: str) -> None:
    environment = {"RAY_ADDRESS": ADDRESS} if named_by == "environment" else {}
    found = looked(environment, address=ADDRESS if named_by == "option" else None)
    assert two_nodes == [ADDRESS]
    assert found["Ray node 10.0.0.1"].level is Level.PASS and "clock of Ray node 10.0.0.1" not in found
    assert found["clock of Ray node 10.0.0.2"].level is Level.FAIL
    assert "10.0.0.1, 10.0.0.2" in found["interface of Gloo"].said
    assert found["Ray auth"].level is Level.WARN  # a token is only used if that is said


def test_no_cluster_there() -> None:
    found = looked(address="10.9.9.9:6379")["Ray"]
    assert found.level is Level.FAIL and "no Ray at" in found.said and found.fix


def test_variables_of_interfaces() -> None:
    found = looked({"NCCL_SOCKET_IFNAME": "none0", "GLOO_SOCKET_IFNAME": "eth0"})
    assert found["interface of NCCL"].level is Level.FAIL
    assert found["interface of Gloo, variable"].level is Level.WARN


def test_a_clock_of_a_disk_tier(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert looked(disk_kv_path=str(tmp_path))[f"clock of {tmp_path}"].level is Level.PASS
    assert looked(disk_kv_path=str(tmp_path / "file"))[f"folder {tmp_path / 'file'}"].level is Level.WARN
    assert not {name for name in looked(disk_kv_path=str(tmp_path / "later")) if "later" in name}


def test_weights_from_the_future(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    os.utime(tmp_path / "model.safetensors", (4e9, 4e9))
    assert looked(model=str(tmp_path))["clock against files"].level is Level.WARN


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[str]:
        raise OSError("no such library")

    monkeypatch.setattr(examining.software, "own_requirements", broken)
    found = looked()
    assert found["packages"].level is Level.FAIL and "OSError: no such library" in found["packages"].said
    assert found["model"].level is Level.PASS


@pytest.mark.parametrize("package", ["torch", thorough("ray")])
def test_a_package_that_cannot_be_imported_is_a_finding(package: str) -> None:
    program = (
        f"import sys; sys.modules[{package!r}] = None; sys.argv = ['headwise', 'doctor', '--port', '0', '--json']; "
        "from headwise.runtime.cli.main import main; main()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert ran.returncode == 1, ran.stderr
    found = {one["name"]: one for one in json.loads(ran.stdout)["findings"]}
    assert found["open files"]["level"] == "pass" and f"import of {package}" in found["shared memory"]["said"]
