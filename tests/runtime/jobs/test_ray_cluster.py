"""Jobs on a real Ray that asks for a token: by ``headwise submit`` and by Ray's own command line."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from headwise.runtime import SamplingParams
from headwise.runtime.client import Client, Completion
from tests.checkpoints import write_checkpoint
from tests.runtime.batch.batches import answers, write
from tests.runtime.jobs.conftest import DEADLINE_S, Head, free_ports, processes_of, wait_until

STREAMS, TOKENS = 8, 480
RAY_WAITS_S = 3.0
"""Between SIGTERM and SIGKILL, unless RAY_JOB_STOP_WAIT_TIME_S says otherwise."""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_logs_and_exit_codes_by_rays_own_command(head: Head) -> None:
    done = head.ray("submit", "--", "headwise", "plan", "--help")
    assert done.returncode == 0 and "Say what a model takes of memory" in done.stdout, done.stderr
    failed = head.ray("submit", "--", "headwise", "plan", "no-such-model")
    assert failed.returncode == 1 and "failed with exit code 2" in failed.stdout + failed.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_logs_and_exit_codes_by_ours(head: Head) -> None:
    submit = ("headwise", "submit", "--address", head.address)
    done = head.run(*submit, "--", "plan", "--help")
    assert done.returncode == 0 and "Say what a model takes of memory" in done.stdout
    failed = head.run(*submit, "--json", "--", "plan", "no-such-model")
    assert failed.returncode == 2 and "no-such-model" in failed.stderr
    assert json.loads(failed.stdout) | {"job_id": ""} == {
        **{"job_id": "", "status": "FAILED", "exit_code": 2, "stopped_here": False}
    }
    for wrong in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}):
        refused = head.run(*submit, "--", "plan", "--help", **wrong)
        assert refused.returncode == 4 and "asks for a token" in refused.stderr
    twice = head.run(*submit, "--job-id", json.loads(failed.stdout)["job_id"], "--", "plan", "--help")
    assert twice.returncode == 4 and "there is a job of this name" in twice.stderr and "Traceback" not in twice.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_headwise_of_a_checkout_is_what_runs(head: Head, tmp_path: Path) -> None:
    """In the command, and in its ranks, which are other processes."""
    pytest.importorskip("build")
    root, copy = Path(__file__).parents[3], tmp_path / "checkout"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "proto", "workers", "cluster", "runtime"):
        (shutil.copytree if (root / name).is_dir() else shutil.copy)(root / name, copy / name)
    with (copy / "workers/shard.py").open("a") as file:
        file.write('\nwith open(os.environ["TELL"], "a") as file:\n    file.write(f"{os.getpid()}\\n")\n')
    model, pids = write_checkpoint(tmp_path / "model"), tmp_path / "pids"
    write(head.folder / "tokens.jsonl", {"prompt": [5, 6], "max_tokens": 3})
    done = head.run(
        *("headwise", "submit", "--address", head.address, "--checkout", str(copy), "--env", f"TELL={pids}", "--"),
        *("generate", "--input", "tokens.jsonl", "--output", str(tmp_path / "out"), "--model", str(model)),
        *("--cpus-per-rank", "1", "--kv-memory", "8MiB"),
    )
    assert done.returncode == 0 and "1 of 1 lines done" in done.stdout, done.stderr
    assert len(set(pids.read_text().split())) >= 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_folder_that_goes_along(head: Head, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model")
    submit = ("headwise", "submit", "--address", head.address, "--working-dir", str(tmp_path))
    done = head.run(*submit, "--", "plan", "model", "--json")
    assert done.returncode == 0 and '"kv_bytes_per_token"' in done.stdout, done.stderr


@contextmanager
def streams(address: str) -> Iterator[list[Completion]]:
    """That many streams, once each has begun; afterwards, what has come of them. They go on for longer after the block
    than Ray waits by default, or the test would show nothing."""
    done: list[Completion] = []
    begun = threading.Barrier(STREAMS + 1)

    def stream(client: Client, number: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        items = client.stream([number + 3] * 5, params)
        next(items)
        begun.wait(DEADLINE_S)
        *_, last = items
        assert isinstance(last, Completion)
        done.append(last)

    with Client(address) as client:
        threads = [threading.Thread(target=stream, args=(client, number), daemon=True) for number in range(STREAMS)]
        for thread in threads:
            thread.start()
        begun.wait(DEADLINE_S)
        yield done
        told = time.monotonic()
        for thread in threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
    assert time.monotonic() - told > RAY_WAITS_S


def check_drained(done: list[Completion]) -> None:
    assert [len(one.samples[0].token_ids) for one in done] == STREAMS * [TOKENS]
    assert {one.samples[0].finish_reason for one in done} == {"length"}


def serve_command(smollm2: Path, port: int) -> list[str]:
    """``headwise`` and its words: an engine whose rank is an actor of the cluster."""
    return [
        *("headwise", "serve", "--model", str(smollm2), "--port", str(port), "--cpus-per-rank", "1"),
        *("--max-model-len", "512", "--kv-memory", "512MiB", "--drain-timeout", "90"),
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_drains_a_server(head: Head, smollm2: Path) -> None:
    [port] = free_ports(1)
    words = ("headwise", "submit", "--address", head.address, "--", *serve_command(smollm2, port))
    with head.start(*words) as job:
        try:
            assert job.stdout is not None and any(line.startswith("ready ") for line in job.stdout)
            with streams(f"127.0.0.1:{port}") as done:
                job.send_signal(signal.SIGINT)
            _, said = job.communicate(timeout=DEADLINE_S)
        finally:
            job.kill()
    check_drained(done)
    assert job.returncode == 130 and "was stopped\n" in said
    assert not processes_of(str(port))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_rays_own_stop_drains_a_server(head: Head, smollm2: Path) -> None:
    """The command of docs/cluster.md. The exit code of ``ray job submit`` is 0 then, though the job was stopped."""
    [port] = free_ports(1)
    environment = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}})
    name = f"serve-{port}"
    words = ["ray", "job", "submit", "--address", head.address, "--submission-id", name]
    with head.start(*words, "--runtime-env-json", environment, "--", *serve_command(smollm2, port)) as job:
        try:
            assert job.stdout is not None and any(line.startswith("ready ") for line in job.stdout)
            with streams(f"127.0.0.1:{port}") as done:
                stop = head.start("ray", "job", "stop", "--address", head.address, name)
            assert stop.communicate(timeout=DEADLINE_S) and stop.returncode == 0
            job.communicate(timeout=DEADLINE_S)
        finally:
            job.kill()
    check_drained(done)
    assert job.returncode == 0
    assert f"'{name}' was stopped" in head.ray("status", name).stdout
    assert not processes_of(str(port))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_batch_whose_job_is_killed_and_submitted_again_has_every_line_once(head: Head, smollm2: Path) -> None:
    count = 120
    # Of different lengths, so that they do not end together.
    lines = [{"prompt": f"Count on: {n},", "max_tokens": 8 + n // 2, "ignore_eos": True} for n in range(count)]
    write(head.folder / "prompts.jsonl", *lines)
    target = head.folder / "answers.jsonl"
    words = [
        *("generate", "--input", "prompts.jsonl", "--output", "answers.jsonl", "--model", str(smollm2)),
        *("--cpus-per-rank", "1", "--max-model-len", "512", "--kv-memory", "512MiB", "--json"),
    ]
    with head.start("headwise", "submit", "--address", head.address, "--", *words) as job:
        try:
            wait_until(lambda: target.exists() and target.read_bytes().count(b"\n") >= count // 3)
            for process in processes_of("prompts.jsonl"):
                process.kill()
            job.communicate(timeout=DEADLINE_S)
        finally:
            job.kill()
    assert job.returncode == 137
    kept = target.read_bytes()
    assert count // 3 <= kept.count(b"\n") < count
    again = subprocess.run(
        ["headwise", "submit", "--address", head.address, "--", *words],
        **{"cwd": head.folder, "env": head.environment, "timeout": DEADLINE_S},  # type: ignore[call-overload]
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    before = kept.count(b"\n")
    assert f"{count} of {count} lines done, {before} of them before" in again.stdout
    assert target.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert answers(target).keys() == set(range(1, count + 1))
