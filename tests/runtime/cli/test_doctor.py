"""``headwise doctor`` on a good setup and on broken ones: the line that fails, its fix, and the exit code."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headwise.runtime.doctor import machine
from headwise.runtime.doctor.finding import failed
from tests.runtime.conftest import Run

GOOD = ("--device", "cpu", "--executor", "local", "--kv-memory", "4MiB", "--port", "0")


@pytest.fixture
def model(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint of 8 query heads and 512 tokens, to break."""
    return shutil.copytree(checkpoint("gqa"), tmp_path / "model")


def diagnosed(headwise: Run, *arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    """The exit code, and the findings by name."""
    code, out, err = headwise("doctor", *GOOD, *arguments, "--json")
    assert not err
    said: dict[str, Any] = json.loads(out)
    for level in ("pass", "warn", "fail"):
        assert said[level] == sum(one["level"] == level for one in said["findings"])
    assert all(bool(one["fix"]) is (one["level"] != "pass") for one in said["findings"])
    return code, {one["name"]: one for one in said["findings"]}


def failures(headwise: Run, *arguments: str) -> dict[str, dict[str, str]]:
    code, found = diagnosed(headwise, *arguments)
    assert code == 1
    return {name: one for name, one in found.items() if one["level"] == "fail"}


def test_a_good_setup(headwise: Run, model: Path) -> None:
    code, found = diagnosed(headwise, "--model", str(model))
    assert code == 0 and {"open files", "weights", "heads", "KV memory", "--port"} <= found.keys()
    assert any(name.startswith("package") for name in found)  # an extra may be too old
    assert found["tokenizer"]["level"] == "warn"  # which changes no exit code


def test_shared_memory_that_cannot_be_used(headwise: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("headwise.workers.leftovers.shared_memory_folder", lambda: str(tmp_path / "none"))
    [(name, found)] = failures(headwise).items()
    assert name == f"shared memory {tmp_path / 'none'}" and "mount a tmpfs" in found["fix"]


def test_a_port_in_use(headwise: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found = failures(headwise, "--metrics-port", str(listener.getsockname()[1]))
    assert list(found) == ["--metrics-port"] and found["--metrics-port"]["fix"].startswith("choose another")


def test_more_ranks_than_heads(headwise: Run, model: Path) -> None:
    found = failures(headwise, "--model", str(model), "--tp", "9", "--executor", "ray")
    assert list(found) == ["heads"] and found["heads"]["fix"].startswith("--tp 8 at most")


def test_weights_that_are_pickles(headwise: Run, model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    found = failures(headwise, "--model", str(model))
    assert list(found) == ["weights"] and "convert it to safetensors" in found["weights"]["fix"]


def test_too_few_open_files(headwise: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (256, 512))
    found = failures(headwise)
    assert list(found) == ["open files"] and "ulimit -n 65536" in found["open files"]["fix"]


def test_memory_for_less_than_a_request(headwise: Run, model: Path) -> None:
    found = failures(headwise, "--model", str(model), "--kv-memory", "128KiB")
    assert list(found) == ["KV memory"] and found["KV memory"]["fix"] == "--kv-memory 1MiB, or --max-model-len 128"


def test_a_clock_that_is_wrong(headwise: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "folder_clock", lambda folder: (-3600.0, 0.1))
    found = failures(headwise, "--disk-kv-path", str(tmp_path))
    assert found[f"clock of {tmp_path}"]["said"].startswith("is 3599.9 s behind")
    assert "chrony" in found[f"clock of {tmp_path}"]["fix"]


def test_a_package_that_is_too_old(headwise: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwise.runtime.doctor.software.own_requirements", lambda: ["ray>=999"])
    found = failures(headwise)
    assert list(found) == ["package ray"] and found["package ray"]["fix"].startswith('pip install "ray>=999"')


def test_a_table_shows_what_is_in_brackets_and_the_fixes(headwise: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda ranks, usable: failed("cores", "[red]none[/red]", "add [one]"))
    code, out, _ = headwise("doctor", *GOOD)
    assert code == 1 and "[red]none[/red]" in out and "fix: add [one]" in out and "1 fail" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--dtype", "int3"], "dtype="), (["--gpu-memory", "0.5"], "--gpu-memory="), (["--tp", "0"], "tensor_parallel_")],
)
def test_a_wrong_flag_is_a_line_and_exit_code_2(headwise: Run, arguments: list[str], said: str) -> None:
    code, out, err = headwise("doctor", *arguments)
    assert code == 2 and not out and said in err and len(err.splitlines()) == 1


def test_kv_settings(headwise: Run, model: Path, tmp_path: Path) -> None:
    given = ("--model", str(model), "--kv-policy", "sinks:4,60@0;dense", "--kv-dtype", "int8")
    code, found = diagnosed(headwise, *given)
    assert code == 0 and found["KV memory"]["level"] == "pass"
    _, plain = diagnosed(headwise, "--model", str(model))
    tokens = [int(one["KV memory"]["said"].split(" hold ")[1].split()[0].replace(",", "")) for one in (found, plain)]
    assert tokens[0] > 3 * tokens[1]  # a quarter of the bytes for numbers, and scales
    code, found = diagnosed(headwise, "--model", str(model), "--kv-policy", "window:8@7;dense")
    assert code == 1 and "names layers 7 to 7" in found["KV settings"]["said"]
    code, found = diagnosed(headwise, "--model", str(model), "--streaming-heads", str(tmp_path / "none.json"))
    assert code == 1 and "No such file" in found["KV settings"]["said"] and "calibrate" in found["KV settings"]["fix"]
    assert found["heads"]["level"] == "pass"
