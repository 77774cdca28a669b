"""Which Ray a process joins."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
import ray._private.worker as ray_worker

from headwise.cluster import ray_session
from headwise.cluster.group import GroupStartError
from headwise.workers import failpoints
from headwise.workers.machine import usable_cores


def test_an_address_where_no_ray_answers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**settings: Any) -> None:
        raise ConnectionError("nobody there")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(GroupStartError, match=r"address='10\.0\.0\.1:6379' \(--address, RAY_ADDRESS\): nobody there"):
        ray_session.join("10.0.0.1:6379")
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:1")
    with pytest.raises(GroupStartError, match="elsewhere:1"):
        ray_session.join(None)


def test_a_ray_that_is_started_here_has_the_cores_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: told.update(settings))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    ray_session.join(None)
    ray_session.leave()
    assert told["num_cpus"] == usable_cores()


def test_a_ray_that_a_thread_has_started_outlives_that_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux kills Ray's processes when the thread that started them ends."""
    starting: list[threading.Thread] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: starting.append(threading.current_thread()))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    user = threading.Thread(target=ray_session.join, args=(None,))
    user.start()
    user.join(30)
    [keeper] = starting
    assert keeper is not user and keeper.is_alive()
    ray_session.leave()
    keeper.join(30)
    assert not keeper.is_alive()


def test_what_a_thread_could_not_start_is_told_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**settings: Any) -> None:
        raise OSError("no room")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with ThreadPoolExecutor(1) as thread, pytest.raises(OSError, match="no room"):
        thread.submit(ray_session.join, None).result(30)


def test_ranks_have_failpoints_also_on_a_ray_that_was_started_before_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    tmp_path.chmod(0o700)
    ray_session.join(None)
    assert ray_session.rank_environment() is None
    failpoints.use(tmp_path)
    try:
        assert ray_session.rank_environment() == {"env_vars": {failpoints.VARIABLE: str(tmp_path)}}
        ray_session.leave()
        ray_session.join(None)
        assert ray_session.rank_environment() is None  # processes inherit them
    finally:
        failpoints.leave()
        ray_session.leave()


def test_what_ray_says_of_its_processes_is_kept_from_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray_worker, "print_to_stdstream", ray_worker.print_to_stdstream)
    ray_session.join(None)
    ray_session.leave()
    ray_worker.print_to_stdstream({"lines": ["a worker died"], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    assert capsys.readouterr() == ("", "")


def test_a_ray_that_the_program_starts_later_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray_worker, "print_to_stdstream", ray_worker.print_to_stdstream)
    connections = iter([b"ours", b"theirs"])
    monkeypatch.setattr(ray_session, "_connection", lambda: next(connections))
    ray_session.join(None)
    ray_session.leave()
    said = {"lines": ["hello"], "pid": "raylet", "ip": "127.0.0.1", "job": None, "is_err": False}
    ray_worker.print_to_stdstream(said, ignore_prefix=True)
    assert "hello" in capsys.readouterr().out


@pytest.mark.slow  # tests above show what the harness of chaos needs of it
def test_on_a_ray_of_somebody_elses(tmp_path: Path, checkpoint: Callable[..., Path]) -> None:
    """Ranks have the failpoints, and the placement groups of others are not taken for this program's."""
    run = subprocess.run(
        [sys.executable, "-c", GUEST, str(tmp_path / "points"), str(checkpoint())],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["load.layer", "theirs"]


GUEST = """
import subprocess, sys
from pathlib import Path
import ray
ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
from headwise.cluster import ray_session
from headwise.runtime import LLM
from headwise.workers import failpoints
from headwise.workers.failpoints import Action, Fault, Point

folder, model = Path(sys.argv[1]), sys.argv[2]
folder.mkdir(mode=0o700)
failpoints.use(folder)
failpoints.arm(folder, Point.LOAD_LAYER, Fault(Action.RAISE))
try:
    LLM(model, kv_memory="8MiB", max_model_len=64, quiet=True, cpus_per_rank=1)
except failpoints.FailpointError:
    print(failpoints.fired(folder)[0].point)
other = '''
import ray, sys
from ray.util import placement_group
ray.init(address=sys.argv[1], log_to_driver=False)
assert placement_group([{"CPU": 1}]).wait(30)
print("there", flush=True)
input()
'''
address = ray.get_runtime_context().gcs_address
with subprocess.Popen(
    [sys.executable, "-c", other, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
) as process:
    assert process.stdout.readline() == "there\\n"
    print("theirs" if not ray_session.living() else ray_session.living())
    process.stdin.close()
ray.shutdown()
"""
