"""The Dockerfile: a linter reads it, its parts fit the checkout, and what it has pip do is done in an empty folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DOCKERFILE = ROOT / "cluster" / "manifests" / "Dockerfile"
IGNORED = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines()


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, by its name, with those of the stages that it starts from."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", "")
    found: dict[str, list[tuple[str, str]]] = {}
    for line in filter(None, text.splitlines()):
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            base, _, name = rest.split()
            found[name] = list(found.get(base, []))
        else:
            found[name].append((word, rest))
    return found


def test_the_linter_has_nothing_to_say() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run(
        [linter, "--failure-threshold", "style", DOCKERFILE], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("target", ["cpu", "cuda", "demo"])
def test_a_target_runs_headwise_as_nobody_special(target: str) -> None:
    stage = stages()[target]
    assert [rest for word, rest in stage if word == "USER"][-1] == "1000"
    assert ("ENTRYPOINT", '["headwise"]') in stage


def test_the_build_is_given_what_a_wheel_is_made_of() -> None:
    assert IGNORED[1] == "*"
    given = {line.removeprefix("!") for line in IGNORED if line.startswith("!")}
    assert {
        "cluster",
        "proto",
        "runtime",
        "workers",
        "pyproject.toml",
        "constraints.txt",
        "LICENSE",
        "README.md",
    } == given
    assert all((ROOT / name).exists() for name in given)


def test_the_demo_model_is_that_of_the_makefile() -> None:
    [pinned] = re.findall(r"^DEMO_MODEL := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert any(rest.endswith(f"--no-deps {pinned}") for _, rest in stages()["demo"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_commands_of_the_demo_target_make_a_headwise_that_answers(tmp_path: Path) -> None:
    """All RUN lines but those of Debian's packages, in a folder that stands for the image's root."""
    source = tmp_path / "src"
    source.mkdir()
    for name in (line.removeprefix("!") for line in IGNORED if line.startswith("!")):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, source / name)
    commands = [rest for stage in ("wheel", "demo") for word, rest in stages()[stage] if word == "RUN"]
    commands = [command for command in commands if not command.startswith("apt-get")]
    assert len(commands) == 6
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "HEADWISE"))
    }
    # Where pip has a folder of wheels, torch is taken from there.
    [default] = [rest.removeprefix("TORCH_INDEX=") for word, rest in stages()["cpu"] if word == "ARG"]
    environment |= {"HOME": str(tmp_path), "TORCH_INDEX": environment.get("PIP_FIND_LINKS", default)}
    environment["PATH"] = f"{tmp_path}/opt/headwise/bin:{Path(sys.base_prefix) / 'bin'}:{environment['PATH']}"
    for command in commands:
        script = re.sub(r"(?<![\w.])/(src|wheels|opt)\b", lambda match: f"{tmp_path}{match.group()}", command)
        done = subprocess.run(
            ["bash", "-e", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert done.stdout.strip()
