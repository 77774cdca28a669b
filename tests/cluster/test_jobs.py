"""How a job is followed: each piece of its output once, whatever the connection does."""

from __future__ import annotations

import asyncio
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.cluster import jobs
from headwise.cluster.jobs import JobServerError, JobState, follow
from headwise.cluster.ray_jobs import RayJobServer
from headwise.workers.errors import InvalidValueError
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
