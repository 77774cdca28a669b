"""``headwise submit`` without a cluster: what becomes of its flags, of Ctrl-C, and of each way in which a job ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from headwise.cluster import jobs, ray_jobs
from headwise.cluster.jobs import Job, JobState
from headwise.runtime.cli import submit as submit_module
from tests.cluster.fake_jobs import FakeJobServer
from tests.runtime.conftest import Run


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeJobServer:
    fake = FakeJobServer(("one\n", "two\n"), JobState("SUCCEEDED", 0))
    monkeypatch.setattr(ray_jobs, "RayJobServer", lambda address: fake)
    monkeypatch.setattr(jobs, "_BETWEEN_TRIES_S", 0.0)
    return fake


def test_what_the_job_writes_is_shown(headwise: Run, server: FakeJobServer) -> None:
    code, out, err = headwise("submit", "--env", "A=b", "--", "serve", "--model", "a b", "--drain-timeout", "5")
    assert (code, out) == (0, "one\ntwo\n") and "is submitted" in err and "is done" in err
    [job] = server.jobs
    assert job.command == "headwise serve --model 'a b' --drain-timeout 5" and job.id.startswith("headwise-")
    assert job.environment == {"RAY_JOB_STOP_WAIT_TIME_S": "35", "A": "b"}
    assert (job.packages, job.working_dir) == ((), None)


def test_json_is_one_object_on_stdout(headwise: Run, server: FakeJobServer) -> None:
    code, out, err = headwise("submit", "--json", "--job-id", "x", "--", "headwise", "plan", "m")
    assert code == 0 and "one\ntwo\n" in err and server.jobs[0].command == "headwise plan m"
    assert json.loads(out) == {"job_id": "x", "status": "SUCCEEDED", "exit_code": 0, "stopped_here": False}


def test_without_waiting_the_name_is_printed(headwise: Run, server: FakeJobServer) -> None:
    assert headwise("submit", "--no-wait", "--job-id", "x", "--", "plan")[:2] == (0, "x\n")
    code, out, _ = headwise("submit", "--no-wait", "--json", "--job-id", "y", "--", "plan")
    assert code == 0 and json.loads(out) == {"job_id": "y", "address": "http://127.0.0.1:8265"}
    code, out, err = headwise("submit", "--job-id", "y", "--", "plan")
    assert (code, out) == (4, "") and "--job-id=y: there is a job of this name, or was; give another name" in err


@pytest.mark.parametrize(
    ("state", "code", "said"),
    [
        (JobState("FAILED", 2, "log"), 2, "failed with exit code 2"),
        (JobState("FAILED", -9, "log"), 137, "failed with exit code 137"),
        (JobState("FAILED", 127, "log"), 127, "no headwise on the PATH that Ray was started with"),
        (JobState("FAILED", None, "no such wheel"), 4, "did not run: no such wheel"),
        (JobState("STOPPED"), 143, "was stopped by somebody else"),
    ],
)
def test_exit_codes(headwise: Run, server: FakeJobServer, state: JobState, code: int, said: str) -> None:
    server.end = state
    found, out, err = headwise("submit", "--", "plan")
    assert (found, out) == (code, "one\ntwo\n") and said in err and "log" not in err.replace("logs", "")


def test_ctrl_c_stops_the_job_and_waits_for_its_end(headwise: Run, server: FakeJobServer) -> None:
    server.end, server.on_logs = None, lambda: os.kill(os.getpid(), signal.SIGINT)
    code, out, err = headwise("submit", "--", "serve")
    assert (code, out) == (130, "one\ntwo\n") and server.stopped.is_set()
    assert "Ctrl-C again leaves at once" in err and "was stopped\n" in err


def test_a_second_ctrl_c_leaves_at_once(headwise: Run, server: FakeJobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.end, server.on_logs = None, lambda: os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(server, "stop", lambda job_id: os.kill(os.getpid(), signal.SIGINT))
    code, _, err = headwise("submit", "--", "serve")
    assert code == 130 and "may go on for a while" in err and not server.stopped.is_set()


@pytest.mark.parametrize("moment", ["submit", "print", "run"])
def test_ctrl_c_at_any_moment_stops_the_job(
    headwise: Run, server: FakeJobServer, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    server.end = None
    if moment == "submit":
        submit = server.submit
        monkeypatch.setattr(server, "submit", lambda job: (submit(job), os.kill(os.getpid(), signal.SIGINT)))
    elif moment == "print":
        say = submit_module._say
        monkeypatch.setattr(
            submit_module,
            "_say",
            lambda text: os.kill(os.getpid(), signal.SIGINT) if "is submitted" in text else say(text),
        )
    else:
        run = asyncio.run

        def interrupted(work: Coroutine[Any, Any, Any]) -> Any:
            async def begin() -> Any:
                os.kill(os.getpid(), signal.SIGINT)
                return await work

            return run(begin())

        monkeypatch.setattr(submit_module.asyncio, "run", interrupted)
    code, _, err = headwise("submit", "--job-id", "x", "--", "serve")
    assert code == 130 and "stopping job x" in err
    assert server.jobs and server.stopped.is_set()


def test_ctrl_c_does_not_stop_a_job_that_had_the_name_before(
    headwise: Run, server: FakeJobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is looked up before the packages are sent, which takes long."""
    headwise("submit", "--no-wait", "--job-id", "x", "--", "serve")

    def submit(job: Job) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(server, "submit", submit)
    code, _, err = headwise("submit", "--job-id", "x", "--", "plan")
    assert code == 4 and "--job-id=x: there is a job" in err and not server.stopped.is_set()


def test_a_token_among_the_words_is_warned_of(headwise: Run, server: FakeJobServer) -> None:
    for words in (["--token", "hush"], ["--token=hush"]):
        code, out, err = headwise("submit", "--", "chat", "--server", "localhost:1", *words, "--max-tokens", "5")
        assert code == 0 and "headwise: --token: Ray keeps this in clear text" in err and "hush" not in out + err


def test_a_secret_is_not_shown_and_warned_of(headwise: Run, server: FakeJobServer) -> None:
    code, out, err = headwise("submit", "--env", "MY_TOKEN=hush", "--", "plan")
    assert code == 0 and "MY_TOKEN: Ray keeps this in clear text" in err and "hush" not in out + err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--", "submit", "x"], "COMMAND: must be another command"),
        (["--", "headwise"], "COMMAND: must be another command"),
        (["--job-id", "a b", "--", "plan"], "--job-id: has 1 to 128 letters"),
        (["--job-id", "..", "--", "plan"], "--job-id: has 1 to 128 letters"),
        (["--job-id=-x", "--", "plan"], "--job-id: has 1 to 128 letters"),
        (["--env", "A", "--", "plan"], "--env='...': must be NAME=VALUE"),
        (["--working-dir", ".", "--", "generate", "--output", "o"], "--output: o would be in the copy"),
    ],
)
def test_flags_that_are_wrong(headwise: Run, server: FakeJobServer, arguments: list[str], said: str) -> None:
    code, out, err = headwise("submit", *arguments)
    assert (code, out) == (2, "") and said in err and not server.jobs


def test_a_folder_goes_along(headwise: Run, server: FakeJobServer, tmp_path: Path) -> None:
    output = tmp_path / "o"
    words = ["generate", "--input", "i", "--output", str(output)]
    assert headwise("submit", "--working-dir", str(tmp_path), "--", *words)[0] == 0
    assert server.jobs[0].working_dir == tmp_path


def test_a_cluster_that_is_not_there(headwise: Run) -> None:
    code, out, err = headwise("submit", "--address", "http://127.0.0.1:1", "--", "plan")
    assert (code, out) == (4, "") and "--address=http://127.0.0.1:1: does not answer" in err
