"""Every snippet of the README runs as it stands, but for the ports of its server."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from headwise.cluster import ray_session
from headwise.workers.disk_cache import cache_directory
from tests.runtime.conftest import Run

README = (Path(__file__).parent.parent / "README.md").read_text()
DEADLINE_S = 120

CANNOT_RUN = {
    "make demo": "makes a .venv with packages from the network",
    "make test": "runs this test",
    ". .venv/bin/activate": "tests run in an environment of their own",
    'hf download HuggingFaceTB/SmolLM2-360M-Instruct --exclude "onnx/*" --local-dir smollm2-360m': "downloads a model",
    "pkill -9 -o -f ray::ShardActor": "kills a shard of whichever engine of this user is the oldest",
    "pkill -9 -o -f ray::ReplicaActor": "kills the oldest replica of this user, whosever it is",
}
"""Commands that no test runs, and why."""

DOWNLOADED = "smollm2-360m"
"""The directory that the reader has downloaded by then; here the demo model stands in for it."""

TYPED = {"headwise chat --model smollm2 --tp 2": "What is the capital of France?\n"}
"""What the reader types into a command."""


def blocks(language: str) -> list[str]:
    """The text of the blocks in a language."""
    found = re.findall(r"^```(.*)\n((?:(?!```).*\n)*)```$", README, re.MULTILINE)
    assert 2 * len(found) == README.count("```"), "a block is not closed, or does not begin at the left edge"
    assert {name for name, _ in found} <= {"console", "python", "text"}, "no test runs blocks of another language"
    return [text for name, text in found if name == language]


def commands() -> list[str]:
    """The commands of the console blocks, without prompts and comments."""
    lines = [line for block in blocks("console") for line in block.splitlines()]
    assert all(line.startswith("$ ") for line in lines), "a line of a console block is not a command"
    return [re.sub(r"\s+# .*", "", line.removeprefix("$ ")) for line in lines]


def is_slow(snippet: str) -> bool:
    return snippet.startswith(("headwise bench ", "headwise chaos "))


def serves(snippet: str) -> bool:
    return snippet.startswith("headwise serve ")


def asks_the_server(snippet: str) -> bool:
    return "127.0.0.1:" in snippet


def asks_for_replicas(snippet: str) -> bool:
    return snippet.startswith(("headwise status", "headwise scale ", "headwise restart "))


def cases(which: Callable[[str], bool]) -> list[Any]:
    """Blocks of Python and Headwise's commands, by the line of the README where each begins."""
    found = blocks("python") + [command for command in commands() if command.startswith("headwise ")]
    return [
        pytest.param(
            snippet,
            id=f"line_{README[: README.index(snippet)].count(chr(10)) + 1}",
            marks=[pytest.mark.slow, pytest.mark.timeout(900)] if is_slow(snippet) else [],
        )
        for snippet in found
        if which(snippet)
    ]


def run(snippet: str, headwise: Run, capfd: pytest.CaptureFixture[str], **addresses: str) -> None:
    """Runs a block of Python, or a command, in this process; it has to print something."""
    typed = TYPED.get(snippet, "")
    for readmes, ours in addresses.items():
        snippet = snippet.replace(readmes, ours)
    if snippet.startswith("headwise "):
        code, out, err = headwise(*shlex.split(snippet)[1:], stdin=typed)
        assert code == 0, err
    else:
        exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})
        out = capfd.readouterr().out
    assert out.strip()


@pytest.fixture
def headwise(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    return Run(monkeypatch, capfd)


@pytest.fixture(scope="module")
def reader(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The reader's folder: the demo model is converted, the kernels are compiled, the other model is downloaded."""
    folder, cache = tmp_path_factory.mktemp("reader"), tmp_path_factory.mktemp("readers_cache")
    (folder / DOWNLOADED).symlink_to(smollm2)
    (cache / "models").symlink_to(smollm2.parent)
    (cache / "kernels").symlink_to(cache_directory() / "kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADWISE_CACHE", str(cache))
        patch.chdir(folder)
        yield


@pytest.fixture(scope="module")
def one_ray() -> Iterator[None]:
    """A Ray for all snippets of this process, which use it one after another."""
    ray_session.join(None)
    yield
    ray_session.leave()


@contextmanager
def serving(command: str, *flags: str) -> Iterator[dict[str, str]]:
    """A server of the README on ports that are free; gives what it says when it is ready."""
    arguments = [sys.executable, "-m", "headwise.runtime.cli", *shlex.split(command)[1:], "--port", "0", "--json"]
    with subprocess.Popen([*arguments, *flags], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.terminate()
            process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0


@pytest.fixture(scope="module")
def server(reader: None) -> Iterator[dict[str, str]]:
    """The README's first server; gives the addresses here by those in the README."""
    first, _ = filter(serves, commands())
    with serving(first, "--openai-port", "0") as ready:
        yield {"127.0.0.1:50051": ready["address"], "http://127.0.0.1:8000/v1": ready["openai"]}


def test_every_command_runs_or_is_listed() -> None:
    others = [command for command in commands() if not command.startswith("headwise ")]
    assert others == [*CANNOT_RUN] and TYPED.keys() <= set(commands())


@pytest.mark.usefixtures("reader", "one_ray")
@pytest.mark.parametrize(
    "snippet",
    cases(lambda snippet: not (serves(snippet) or asks_the_server(snippet) or asks_for_replicas(snippet))),
)
def test_snippet(snippet: str, headwise: Run, capfd: pytest.CaptureFixture[str]) -> None:
    run(snippet, headwise, capfd)


@pytest.mark.parametrize(
    "command", [command for command in commands() if is_slow(command) or serves(command) or asks_for_replicas(command)]
)
def test_command_has_these_options(command: str, headwise: Run) -> None:
    """Of commands that no other test runs, or only a slow one."""
    assert headwise(*shlex.split(command)[1:], "--help")[0] == 0


@pytest.mark.parametrize("snippet", cases(asks_the_server))
def test_snippet_that_asks_the_server(
    snippet: str, server: dict[str, str], headwise: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    run(snippet, headwise, capfd, **server)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_replicas_from_one_command_to_the_next(reader: None, headwise: Run) -> None:
    """The section's commands in order, with a client that asks after each."""
    _, serve = filter(serves, commands())
    with serving(serve) as ready:
        for command in filter(asks_for_replicas, commands()):
            code, out, err = headwise(*shlex.split(command)[1:], "--server", ready["address"])
            assert code == 0 and out + err, err
            ask = ["generate", "--server", ready["address"], "--chat", "What is the capital of France?"]
            assert "Paris" in headwise(*ask)[1]
        assert "3 of 3 replicas serve" in headwise("status", "--server", ready["address"])[1]
