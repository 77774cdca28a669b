"""What is installed is everything, and what need not be there is not asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint

ROOT = Path(__file__).parent.parent
FLOORS = ("runtime", "cluster", "workers")
DEADLINE_S = 120


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy of what git has or would take, so that nothing ignored can help."""
    pytest.importorskip("build")
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        timeout=DEADLINE_S,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.mark.thorough
def test_the_wheel_holds_every_module(wheel: zipfile.ZipFile) -> None:
    expected = {"headwise" / path.relative_to(ROOT) for floor in FLOORS for path in (ROOT / floor).rglob("*.py")}
    expected |= {path.parent / "py.typed" for path in expected}
    generated = ROOT / "proto" / "headwise" / "v1"
    expected |= {Path("headwise/v1") / path.name for path in generated.glob("*_pb2*.py")} | {
        Path("headwise/v1/py.typed")
    }
    assert len(expected) > 40
    assert {str(path) for path in expected} <= set(wheel.namelist())


@pytest.mark.thorough
def test_the_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    """Nothing generic, such as a top-level ``runtime`` or ``tests``, may land in site-packages."""
    [info] = {name.split("/")[0] for name in wheel.namelist()} - {"headwise"}
    assert info.endswith(".dist-info")
    folders = {name.split("/")[1] for name in wheel.namelist() if name.startswith("headwise/")}
    assert folders == {*FLOORS, "v1"}


@pytest.mark.thorough
def test_the_wheels_metadata(wheel: zipfile.ZipFile) -> None:
    [entry_points] = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "headwise = headwise.runtime.cli.main:main" in wheel.read(entry_points).decode()
    [metadata] = [name for name in wheel.namelist() if name.endswith("/METADATA")]
    text = wheel.read(metadata).decode()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"Version: {version}" in text and "License-Expression: Apache-2.0" in text
    assert any(name.endswith("LICENSE") for name in wheel.namelist())


@pytest.mark.thorough
def test_what_is_in_the_wheel_can_be_imported(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = (
        "import headwise.runtime.cli.main as cli, headwise.v1.inference_pb2 as pb2, headwise.runtime.bench.throughput\n"
        "print(cli.__file__, pb2.__file__, sep='\\n')"
    )
    done = run_python(code, tmp_path, PYTHONPATH=str(tmp_path), HEADWISE_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{tmp_path}/headwise/runtime/cli/main.py",
        f"{tmp_path}/headwise/v1/inference_pb2.py",
    ]


def test_one_rank_in_this_process_needs_no_ray(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    code = f"""
import sys
sys.modules["ray"] = None  # any import of it fails
from headwise.runtime import LLM, SamplingParams
with LLM({str(model)!r}, executor="local", kv_memory="4MiB", quiet=True) as llm:
    print(len(llm.generate([5, 6], SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids))
    assert not [name for name in sys.modules if name.startswith("ray.")]
"""
    done = run_python(code, tmp_path)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


def run_python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
