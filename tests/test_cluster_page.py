"""docs/cluster.md, as it stands: its commands, section by section, in an empty folder, but those that need what is not
here."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import yaml

from tests.cluster.manifests.test_kubernetes import MANIFESTS, ROOT, headwise_commands, one, options, run_script
from tests.test_operations import DEADLINE_S, serving

PAGE = (ROOT / "docs" / "cluster.md").read_text()
SECTIONS = {part.partition("\n")[0]: part for part in PAGE.split("\n## ")[1:]}
NOT_HERE = ("kubectl ", "helm ", "docker ", "ray up ", "ray exec ", "ray down ", "python -m build")
"""What needs a Kubernetes, Docker or other machines; or, as the last, is tested in tests/test_packaging.py."""


def commands(section: str) -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", SECTIONS[section], re.DOTALL)
    return [command for text in blocks for command in re.findall(r"^\$ (.*)$", text, re.MULTILINE)]


def run(lines: list[str], folder: Path, environment: dict[str, str]) -> str:
    script = "set -e\n" + "\n".join(lines)
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def environment() -> dict[str, str]:
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}


@contextmanager
def ray_node(command: str, folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """A ``ray start --block``."""
    with subprocess.Popen(
        f"exec {command}", shell=True, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert any("Ray runtime started" in line for line in process.stdout)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=DEADLINE_S)


def test_every_command_of_headwise_has_the_flags_that_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ca.pem").touch()
    found = [command for section in SECTIONS for command in commands(section)]
    ours = [
        match.split()
        for command in found
        for match in re.findall(
            r"\b(?:headwise|headwise submit .* --) ((?:serve|generate|bench|doctor) [^\"]*)", command
        )
    ]
    assert len(ours) >= 12
    for words in ours:
        assert options([*words, *(["prompt"] if words[0] == "generate" else [])])
    submitted = [command.split()[1:] for command in found if command.startswith("headwise submit ")]
    assert len(submitted) == 3 and all(options(words) for words in submitted)


def test_every_file_and_secret_that_is_named_is_there() -> None:
    for name in re.findall(r"cluster/manifests/([\w.-]+)", PAGE):
        assert (MANIFESTS / name).is_file(), name
    made = dict(re.findall(r"create secret generic (\S+) (.*)", PAGE))
    [head] = one("RayCluster")["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    volumes = one("RayCluster")["spec"]["headGroupSpec"]["template"]["spec"]["volumes"]
    for volume in (volume for volume in volumes if "secret" in volume):
        keys = set(re.findall(r"--from-file=([\w.]+)=", made.pop(volume["secret"]["secretName"])))
        [folder] = [mount["mountPath"] for mount in head["volumeMounts"] if mount["name"] == volume["name"]]
        assert set(re.findall(rf"{folder}/([\w.]+)", yaml.safe_dump(head))) == keys
    assert not made


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_on_one_machine(tmp_path: Path, environment: dict[str, str]) -> None:
    serve, *others = commands("On one machine")
    with serving(serve, tmp_path, environment, drained=False):
        answers = run(others, tmp_path, environment)
    assert "Paris" in answers and "headwise_engine_up 1.0" in answers


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_on_a_ray_cluster(tmp_path: Path, environment: dict[str, str]) -> None:
    """With a home of its own, where Ray keeps the token; and the script by which the manifest waits for a node."""
    environment |= {"HEADWISE_CACHE": environment.get("HEADWISE_CACHE", str(Path.home() / ".cache" / "headwise"))}
    environment |= {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
    answer = ""
    with ExitStack() as running:
        for command in commands("On a Ray cluster"):
            if command.startswith(NOT_HERE):
                break
            if command.startswith("ray start"):
                running.enter_context(ray_node(command, tmp_path, environment))
                known = environment | {"RAY_ADDRESS": "127.0.0.1:6379"}
                done = run_script("start.py", "CPU=2", "echo", "there", folder=tmp_path, environment=known)
                assert done.stdout.endswith("there\n"), done.stderr
            elif command.startswith("headwise serve"):
                running.enter_context(serving(command, tmp_path, environment, drained=False))
            else:
                answer = run([command], tmp_path, environment)
    assert "Paris" in answer


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_on_kubernetes_with_the_server_here(tmp_path: Path, environment: dict[str, str]) -> None:
    """The commands for the Secrets; the server of the manifest with one rank in its process, in place of the cluster;
    its probe; and the client's commands."""
    ours = [command for command in commands("On Kubernetes") if not command.startswith(NOT_HERE)]
    [first] = [index for index, command in enumerate(ours) if command.startswith("export HEADWISE_TOKEN")]
    run(ours[:first], tmp_path, environment)
    [words] = headwise_commands("service.yaml")
    serve = f"headwise {' '.join(words)}"
    for flags in ("--address auto", "--cpus-per-rank 2", "--tp 2"):
        assert flags in serve
        serve = serve.replace(f" {flags}", "")
    for there, here in re.findall(r"--from-file=([\w.]+)=([\w.]+)", PAGE):
        serve = re.sub(rf"/etc/headwise/\w+/{re.escape(there)}\b", here, serve)
    assert "/etc" not in serve
    with serving(f"{serve} --executor local", tmp_path, environment, drained=False):
        done = run_script("ready.py", "localhost:50051", str(tmp_path / "ca.pem"), folder=tmp_path)
        assert done.returncode == 0, done.stderr
        others = [command for command in ours[first:] if "RAY_AUTH" not in command and "submit" not in command]
        answer = run(others, tmp_path, environment)
    assert "Paris" in answer


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_jobs_and_batches(tmp_path: Path, environment: dict[str, str]) -> None:
    """On the Ray of the section before. Ctrl-C ends the first server, the page the second."""
    environment |= {"HEADWISE_CACHE": environment.get("HEADWISE_CACHE", str(Path.home() / ".cache" / "headwise"))}
    environment |= {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
    [token, start] = [command for command in commands("On a Ray cluster") if re.match("ray (get|start)", command)][:2]
    run([token], tmp_path, environment)
    with ray_node(start, tmp_path, environment):
        _, serve, ask, serve_again, ask_again, stop = commands("Jobs")
        with served_by_job(serve, tmp_path, environment) as job:
            assert "Paris" in run([ask], tmp_path, environment)
            job.send_signal(signal.SIGINT)
            assert job.wait(DEADLINE_S) == 130
        with served_by_job(serve_again, tmp_path, environment) as job:
            assert "Paris" in run([ask_again], tmp_path, environment)
            run([stop], tmp_path, environment)
            assert job.wait(DEADLINE_S) == 0
        said = run(commands("Batches"), tmp_path, environment)
    assert said.count("3 of 3 lines done") == 1 and json.loads(said.splitlines()[-1])["done"] == 3
    for name in ("answers.jsonl", "others.jsonl"):
        assert "Paris" in (tmp_path / name).read_text()


@contextmanager
def served_by_job(command: str, folder: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """The command that submits a server, once that is ready."""
    with subprocess.Popen(
        f"exec {command}", shell=True, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert any(line.startswith("ready ") for line in process.stdout)
            threading.Thread(target=process.stdout.read, daemon=True).start()
            yield process
        finally:
            process.kill()
