"""A process that is gone is noticed at once, and nothing is left of the watch."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections.abc import Iterator

import pytest

from headwise.cluster.process_watch import GONE, ProcessWatch
from headwise.workers.processes import ProcessId

DEADLINE_S = 10.0


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    made = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2)]
    yield made
    for one in made:
        one.kill()
        one.communicate()


def test_the_one_that_is_killed_is_named(sleepers: list[subprocess.Popen[bytes]]) -> None:
    before = os.listdir("/proc/self/fd")
    reports: queue.SimpleQueue[tuple[int | None, str]] = queue.SimpleQueue()
    watch = ProcessWatch([ProcessId.of(one.pid) for one in sleepers], lambda *report: reports.put(report))
    sleepers[1].kill()
    assert reports.get(timeout=DEADLINE_S) == (1, GONE)
    watch.stop()
    watch.join()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_one_that_is_gone_before_is_named(sleepers: list[subprocess.Popen[bytes]]) -> None:
    processes = [ProcessId.of(one.pid) for one in sleepers]
    sleepers[0].kill()
    sleepers[0].wait(DEADLINE_S)
    reports: queue.SimpleQueue[tuple[int | None, str]] = queue.SimpleQueue()
    watch = ProcessWatch(processes, lambda *report: reports.put(report))
    assert reports.get(timeout=DEADLINE_S) == (0, GONE)
    watch.stop()
    watch.join()


def test_after_the_stop_nothing_is_reported(sleepers: list[subprocess.Popen[bytes]]) -> None:
    elsewhere = ProcessId(1, 1, "another host")
    reports: queue.SimpleQueue[tuple[int | None, str]] = queue.SimpleQueue()
    processes = [*(ProcessId.of(one.pid) for one in sleepers), elsewhere]
    watch = ProcessWatch(processes, lambda *report: reports.put(report))
    watch.stop()
    watch.stop()
    watch.join()
    sleepers[0].kill()
    assert not watch._thread.is_alive() and reports.empty()
