"""Failpoints: who may arm them, what each action does, and that one fires once."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from headwise.workers import failpoints
from headwise.workers.errors import InvalidValueError
from headwise.workers.failpoints import Action, FailpointError, Fault, Point, arm, armed, disarm, fired, hit

DEADLINE_S = 60.0
ONCE = Fault(Action.RAISE)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "points"
    folder.mkdir(mode=0o700)
    failpoints.use(folder)
    yield folder
    failpoints.leave()


def raised(point: Point = Point.ALLOCATE, rank: int | None = None) -> bool:
    try:
        hit(point, rank)
    except FailpointError:
        return True
    return False


def test_they_are_off_unless_asked_for() -> None:
    assert not failpoints.ENABLED and failpoints.VARIABLE not in os.environ


def test_a_point_fires_once_and_is_known_to_have(folder: Path) -> None:
    assert not raised()
    arm(folder, Point.ALLOCATE, ONCE)
    assert armed(folder) == ["allocate"] and fired(folder) == []
    before = time.monotonic()
    assert [raised() for _ in range(3)] == [True, False, False]
    assert armed(folder) == []
    [one] = fired(folder)
    assert (one.point, one.action, one.pid) == (Point.ALLOCATE, Action.RAISE, os.getpid())
    assert before <= one.at <= time.monotonic()


def test_a_point_can_wait_for_a_rank_and_for_a_hit(folder: Path) -> None:
    arm(folder, Point.STEP_MLP, Fault(Action.RAISE, skip=2), rank=1)
    hits = [raised(Point.STEP_MLP, rank) for rank in (0, 1, None, 0, 1, 0, 1, 1)]
    assert hits.index(True) == 6 and sum(hits) == 1
    arm(folder, Point.STEP_MLP, ONCE)
    assert raised(Point.STEP_MLP, 7)


def test_a_hit_of_nobody_in_particular_counts_once(folder: Path) -> None:
    arm(folder, Point.ENGINE_SUBMIT, Fault(Action.RAISE, skip=4))
    assert [raised(Point.ENGINE_SUBMIT) for _ in range(6)] == [False] * 4 + [True, False]


def test_a_point_can_stay_until_it_is_disarmed(folder: Path) -> None:
    arm(folder, Point.STEP_TOKEN, Fault(Action.RAISE, token=7, stays=True))
    for _ in range(2):
        assert not hit(Point.STEP_TOKEN, 0, lambda token: False)
        with pytest.raises(FailpointError):
            hit(Point.STEP_TOKEN, 0, lambda token: token == 7)
    disarm(folder)
    assert not hit(Point.STEP_TOKEN, 0, lambda token: True)
    assert len(fired(folder)) == 2


def test_of_many_who_come_at_once_one_is_hit(folder: Path) -> None:
    arm(folder, Point.ALLOCATE, Fault(Action.RAISE, skip=3))
    found: list[bool] = []
    start = threading.Barrier(8)

    def come() -> None:
        start.wait(DEADLINE_S)
        found.extend(raised() for _ in range(50))

    threads = [threading.Thread(target=come) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert sum(found) == 1


def test_what_is_disarmed_stays_so_whoever_is_at_the_point(folder: Path) -> None:
    over = threading.Event()

    def come() -> None:
        while not over.is_set():
            hit(Point.STEP_MLP)

    thread = threading.Thread(target=come)
    thread.start()
    try:
        for _ in range(200):
            arm(folder, Point.STEP_MLP, Fault(Action.RAISE, skip=1_000_000))
            time.sleep(0.001)  # in which it is hit
            disarm(folder)
            thread.join(0.001)
            assert armed(folder) == []
    finally:
        over.set()
        thread.join(DEADLINE_S)


def test_a_full_disk_a_slow_one_and_a_lost_message(folder: Path) -> None:
    arm(folder, Point.KV_WRITE, Fault(Action.NO_SPACE))
    with pytest.raises(OSError, match=r"No space left.*kv\.write") as full:
        hit(Point.KV_WRITE)
    assert full.value.errno == errno.ENOSPC
    arm(folder, Point.KV_WRITE, Fault(Action.SLEEP, seconds=0.05))
    started = time.monotonic()
    assert not hit(Point.KV_WRITE)
    assert time.monotonic() - started >= 0.05
    arm(folder, Point.CHANNEL_PLAN, Fault(Action.DROP))
    assert hit(Point.CHANNEL_PLAN, 1) and not hit(Point.CHANNEL_PLAN, 1)


@pytest.mark.parametrize(
    ("point", "fault", "field"),
    [
        (Point.KV_WRITE, Fault(Action.DROP), "action"),
        (Point.STEP_TOKEN, Fault(Action.KILL), "token"),
        (Point.STEP_MLP, Fault(Action.KILL, token=1), "token"),
    ],
)
def test_what_makes_no_sense_is_not_armed(folder: Path, point: Point, fault: Fault, field: str) -> None:
    with pytest.raises(InvalidValueError) as refused:
        arm(folder, point, fault)
    assert refused.value.field == field and armed(folder) == []


@pytest.mark.parametrize(("action", "code"), [(Action.KILL, -signal.SIGKILL), (Action.EXIT, 1)])
def test_a_process_is_ended_also_one_that_the_environment_told(folder: Path, action: Action, code: int) -> None:
    arm(folder, Point.ALLOCATE, Fault(action))
    assert child().wait(DEADLINE_S) == code
    assert [one.action for one in fired(folder)] == [action]
    assert child().wait(DEADLINE_S) == 0


def test_a_process_is_stopped_and_goes_on(folder: Path) -> None:
    arm(folder, Point.ALLOCATE, Fault(Action.STOP))
    process = child()
    deadline = time.monotonic() + DEADLINE_S
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGCONT)
    assert process.wait(DEADLINE_S) == 0
    assert [one.pid for one in fired(folder)] == [process.pid]


def child() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", CHILD])


CHILD = """
from headwise.workers import failpoints
if failpoints.ENABLED:
    failpoints.hit(failpoints.Point.ALLOCATE)
"""


def test_a_process_that_is_forked_has_them_too(folder: Path) -> None:
    arm(folder, Point.ALLOCATE, Fault(Action.EXIT))
    process = multiprocessing.get_context("fork").Process(target=hit, args=(Point.ALLOCATE,))
    process.start()
    process.join(DEADLINE_S)
    assert process.exitcode == 1


def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for name in ("open", "link", "missing"):
        with pytest.raises(InvalidValueError, match="HEADWISE_FAILPOINTS"):
            failpoints.use(tmp_path / name)
    assert not failpoints.ENABLED
    environment = os.environ | {failpoints.VARIABLE: str(tmp_path / "open")}
    run = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, timeout=DEADLINE_S)
    assert run.returncode == 1 and b"InvalidValueError" in run.stderr and b"chmod 700" in run.stderr
