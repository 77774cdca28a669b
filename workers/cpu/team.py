"""The threads that work through a step together: they join once, then meet at a barrier after every stage.

A step has hundreds of stages of a few microseconds, so threads are started once a step and wait by looking. A stage
is cut into jobs. Every member has a stretch of them, takes its own from the front, and when they are out helps the
others from the back: one that the system interrupts holds nobody up. A team's memory, in cache lines::

    | joined | size | arrivals | clock | one line a thread: its counts | three sets of one line a thread: jobs left |

Stage s uses set s % 3. Member 0 clears the set of stage s - 1 during stage s, when nobody can still be in s - 1 and
nobody is yet in s + 2, which uses it next.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numba

from headwise.workers.errors import InvalidValueError
from headwise.workers.jit.kernel_cache import kernel
from headwise.workers.jit.native import (
    fetch_add,
    load_acquire,
    load_int,
    now_ns,
    pause,
    sched_yield,
    store_int,
    store_release,
    swap_if,
)

# A launch costs about 10 us with OpenMP, 80 us with Numba's own work queue.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # type: ignore[attr-defined]
# The work queue ends the process when two threads launch at once, and two launches would share the same cores anyway.
_launch = threading.Lock()

LINE_BYTES = 64
_JOINED, _SIZE, _ARRIVALS, _CLOCK, _MEMBERS = (LINE_BYTES * line for line in range(5))
_STAGE, _BARRIER = 0, 1  # in a member's line
_LAP = 2  # in the clock's line, behind a timespec

_CLOSED = 1 << 32
_STARTED = 1 << 62
_BACK = (1 << 32) - 1
_FRONT = (1 << 30) - 1

# A thread that has not come by then, of the order of what the system takes to wake one, would hold up those that have.
_JOIN_NS = 2_000_000
_PAUSES = 2000


class Team(NamedTuple):
    """A member's view of its team.

    Attributes:
        address: of team_bytes() zeroed bytes, aligned to LINE_BYTES.
        threads: most members there can be.
        member: this thread, in [0, size); -1 if the team has gone on without it.
        size: how many there are.
    """

    address: int
    threads: int
    member: int
    size: int


@contextmanager
def launching(threads: int) -> Iterator[None]:
    """To be held while a compiled function with so many threads runs; with one, Numba's pool is never entered.

    Calls of one thread have the same number, or one: each change of it costs threads that end and start.
    """
    if threads == 1:
        yield
        return
    with _launch:
        if numba.get_num_threads() != threads:
            numba.set_num_threads(threads)
        yield


def usable_threads(threads: int) -> int:
    """At most so many, and no more than Numba may start.

    Raises:
        InvalidValueError: less than one.
    """
    if threads < 1:
        raise InvalidValueError("num_threads", threads, "must be at least 1")
    return min(threads, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined, no-any-return]


def team_bytes(threads: int) -> int:
    """The memory of a team of at most so many members."""
    return _MEMBERS + 4 * threads * LINE_BYTES


@kernel
def clear(address: int, threads: int) -> None:
    """Make a team's memory ready for a team to form."""
    for word in range((_MEMBERS + 4 * threads * LINE_BYTES) // 8):
        store_int(address, word, 0)


@kernel
def join(address: int, threads: int) -> Team:
    """Become a member; the first one waits for the others, a little."""
    if threads == 1:
        return Team(address, threads, 0, 1)
    ticket = fetch_add(address + _JOINED, 1)
    if ticket >= _CLOSED:
        return Team(address, threads, -1, 0)
    if ticket == 0:
        start = now_ns(address + _CLOCK)
        while load_acquire(address + _JOINED) < threads and now_ns(address + _CLOCK) - start < _JOIN_NS:
            pause()
        store_release(address + _SIZE, fetch_add(address + _JOINED, _CLOSED))
    else:
        _wait_for(address + _SIZE, 1)
    return Team(address, threads, ticket, load_acquire(address + _SIZE))


@kernel
def meet(team: Team) -> None:
    """Wait until every member is here: what they wrote before is then seen by all. Ends a stage."""
    if team.size == 1:
        return
    own = team.address + _MEMBERS + team.member * LINE_BYTES
    target = load_int(own, _BARRIER) + team.size
    stage = load_int(own, _STAGE)
    store_int(own, _BARRIER, target)
    store_int(own, _STAGE, stage + 1)
    fetch_add(team.address + _ARRIVALS, 1)
    _wait_for(team.address + _ARRIVALS, target)
    if team.member == 0:
        ended = _locate_jobs(team.address, team.threads, stage)
        for member in range(team.threads):
            store_release(ended + member * LINE_BYTES, 0)


@kernel
def take_job(team: Team, jobs: int, done: int) -> int:
    """The next job of this stage for this member, in [0, jobs); -1 when there is none left.

    Args:
        done: how many this member has had in this stage, needed where the team is one.
    """
    if team.size == 1:
        return done if done < jobs else -1
    stage = load_int(team.address + _MEMBERS + team.member * LINE_BYTES, _STAGE)
    words = _locate_jobs(team.address, team.threads, stage)
    for i in range(team.size):
        owner = (team.member + i) % team.size
        first, last = jobs * owner // team.size, jobs * (owner + 1) // team.size
        job: int = _take_from(words + owner * LINE_BYTES, first, last, i == 0)
        if job >= 0:
            return job
    return -1


@kernel
def _take_from(word: int, first: int, last: int, from_front: bool) -> int:
    """One of the jobs [first, last), of which the word keeps those left as _STARTED | front << 32 | back."""
    while True:
        seen = load_acquire(word)
        left = seen if seen != 0 else _STARTED | first << 32 | last
        front, back = (left >> 32) & _FRONT, left & _BACK
        if front >= back:
            return -1
        after = left + (1 << 32) if from_front else left - 1
        if swap_if(word, seen, after) == 1:
            return int(front if from_front else back - 1)


@kernel
def _locate_jobs(address: int, threads: int, stage: int) -> int:
    """The address of the words that keep a stage's jobs, a line a member."""
    return address + _MEMBERS + (threads + stage % 3 * threads) * LINE_BYTES


@kernel
def record_lap(team: Team, times: int, part: int) -> None:
    """Member 0: add the nanoseconds since its last lap to times[part]; a part below 0 only starts the clock."""
    if team.member == 0:
        clock = team.address + _CLOCK
        now = now_ns(clock)
        if part >= 0:
            store_int(times, part, load_int(times, part) + now - load_int(clock, _LAP))
        store_int(clock, _LAP, now)


@kernel
def _wait_for(address: int, value: int) -> None:
    for _ in range(_PAUSES):
        if load_acquire(address) >= value:
            return
        pause()
    while load_acquire(address) < value:
        sched_yield()
