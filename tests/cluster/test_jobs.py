"""How a job is followed: each piece of its output once, whatever the connection does."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.cluster import jobs, ray_jobs
from headwise.cluster.jobs import JobServerError, JobState, follow
from headwise.cluster.ray_jobs import RayJobServer
from headwise.workers.errors import HeadwiseError, InvalidValueError
from tests.cluster.fake_jobs import FakeJobServer
from tests.effort import examples

DONE = JobState("SUCCEEDED", 0)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_BETWEEN_TRIES_S", 0.0)


def lost(job_id: str) -> JobState:
    raise JobServerError("does not answer")


def followed(server: FakeJobServer) -> tuple[JobState, str]:
    pieces: list[str] = []
    return asyncio.run(follow(server, "job", pieces.append)), "".join(pieces)


def test_what_a_job_writes_and_how_it_ends() -> None:
    for end in (DONE, JobState("FAILED", 7, "…"), JobState("STOPPED")):
        assert followed(FakeJobServer(("a\n", "b\n"), end)) == (end, "a\nb\n")


@examples(60)
@given(st.lists(st.text(min_size=1, max_size=5), max_size=6), st.lists(st.integers(0, 6), max_size=4))
def test_nothing_comes_twice_after_a_connection_broke(text: list[str], breaks: list[int]) -> None:
    assert followed(FakeJobServer(tuple(text), DONE, tuple(breaks))) == (DONE, "".join(text))


def test_a_server_that_stays_out_of_reach_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "LOST_S", 0.05)
    server = FakeJobServer(("a",), DONE)
    server.lost = True
    with pytest.raises(JobServerError, match="does not answer"):
        followed(server)


def test_a_connection_that_went_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that lost its power closes no connection, nor does a router that forgot one."""
    monkeypatch.setattr(jobs, "_SILENCE_S", 0.01)
    server = FakeJobServer(("a\n", "b\n"), DONE)
    server.silent = 2
    assert followed(server) == (DONE, "a\nb\n")
    monkeypatch.setattr(jobs, "LOST_S", 0.05)
    monkeypatch.setattr(server, "state", lost)
    server.silent = 1000
    with pytest.raises(JobServerError, match="does not answer"):
        followed(server)


def test_a_job_that_writes_nothing_for_long_is_followed_on_one_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_SILENCE_S", 0.01)
    monkeypatch.setattr(jobs, "LOST_S", 0.0)
    server, connections, looks = FakeJobServer(("a\n",)), 0, 0

    def connected() -> None:
        nonlocal connections
        connections += 1

    def state(job_id: str) -> JobState:
        nonlocal looks
        looks += 1
        if looks == 5:
            server.stop(job_id)
        return JobState("STOPPED" if server.stopped.is_set() else "RUNNING")

    server.on_logs = connected
    monkeypatch.setattr(server, "state", state)
    assert followed(server) == (JobState("STOPPED"), "a\n")
    assert connections == 1 and looks >= 5


@pytest.mark.parametrize("address", ["head:8265", "ray://head:10001", "auto", ""])
def test_an_address_that_is_no_url_is_refused(address: str) -> None:
    with pytest.raises(InvalidValueError, match=r"--address=.*such as http://head:8265"):
        RayJobServer(address)


def test_the_address_that_is_given_is_the_one_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself prefers these variables."""
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:2")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:3")
    with pytest.raises(JobServerError, match=r"--address=http://127.0.0.1:1: does not answer: .*127.0.0.1:1\."):
        RayJobServer("http://127.0.0.1:1")
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:2"


class Answers(BaseHTTPRequestHandler):
    """Of a job server: there is a job ``known``; one that is submitted gets no answer."""

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        about = {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""}
        self.send_response({"version": 200, "known": 200, "unknown": 404}.get(name, 500))
        self.end_headers()
        self.wfile.write(json.dumps(about if name == "version" else {}).encode())

    def do_POST(self) -> None:
        given_up.wait(30)

    def log_message(self, *_: object) -> None:
        pass


given_up = threading.Event()


@pytest.fixture
def answers() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        given_up.clear()
        yield f"http://user:hush@127.0.0.1:{server.server_port}"
        given_up.set()
        server.shutdown()


def test_what_ray_says_of_a_name(answers: str) -> None:
    server = RayJobServer(answers)
    assert server.has("known") and not server.has("unknown")
    with pytest.raises(JobServerError, match=r"--address=http://\.\.\.@127.*: does not say whether") as refused:
        server.has("other")
    assert "hush" not in str(refused.value)


def test_a_job_that_gets_no_answer_may_have_begun(answers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = RayJobServer(answers)
    monkeypatch.setattr(ray_jobs, "TIMEOUT_S", 0.2)
    with pytest.raises(JobServerError, match=r"Read timed out.*; the job may have begun: ray job status x"):
        server.submit(jobs.Job("x", "true"))


@pytest.mark.parametrize("address", ["http://user:hush@127.0.0.1:1", "ray://user:hush@127.0.0.1:1"])
def test_a_password_in_an_address_is_not_shown(address: str) -> None:
    with pytest.raises(HeadwiseError, match=r"--address='?\w+://\.\.\.@127.0.0.1:1") as refused:
        RayJobServer(address)
    assert "hush" not in str(refused.value)
