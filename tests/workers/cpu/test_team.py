"""A team's members meet at every barrier and share out every job, however many come."""

from __future__ import annotations

import threading
from typing import Any

import numba
import numpy as np
import pytest

from headwise.workers.cpu.team import LINE_BYTES, join, meet, take_job, team_bytes

STAGES, JOBS, DEADLINE_S = 40, 23, 60.0


def _work(address: Any, threads: Any, taken: Any, seen: Any) -> int:
    """Counts who takes each job, and what each member sees of the stage before."""
    team = join(address, threads)
    if team.member < 0:
        return -1
    for stage in range(STAGES):
        if stage > 0:
            seen[stage, team.member] = taken[stage - 1].sum()
        done = 0
        job = take_job(team, JOBS, 0)
        while job >= 0:
            taken[stage, job] += 1
            done += 1
            job = take_job(team, JOBS, done)
        meet(team)
    return int(team.size)


work = numba.njit(nogil=True)(_work)


def run(threads: int, comers: int) -> tuple[list[int], np.ndarray, np.ndarray]:
    memory = np.zeros(team_bytes(threads) + LINE_BYTES, np.uint8)
    address = memory.ctypes.data + -memory.ctypes.data % LINE_BYTES
    taken, seen = np.zeros((STAGES, JOBS), np.int64), np.zeros((STAGES, threads), np.int64)
    work(address, 1, taken.copy(), seen.copy())  # compiled before threads wait for each other
    memory[:] = 0
    sizes: list[int] = []
    members = [
        threading.Thread(target=lambda: sizes.append(work(address, threads, taken, seen)), daemon=True)
        for _ in range(comers)
    ]
    for member in members:
        member.start()
    for member in members:
        member.join(DEADLINE_S)
        assert not member.is_alive()
    return sizes, taken, seen


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_job_is_done_once_and_seen_by_all(threads: int) -> None:
    sizes, taken, seen = run(threads, threads)
    assert (taken == 1).all()
    size = max(sizes)
    assert sizes.count(size) == size and (seen[1:, :size] == JOBS).all()


def test_a_team_goes_on_without_who_does_not_come() -> None:
    sizes, taken, _ = run(threads=3, comers=2)
    assert (taken == 1).all()
    assert max(sizes) in (1, 2)
