"""What a request would cost at each replica, from its queue and from what it takes for a token. Arrays by slot."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headwise.runtime.kv.cost import running_mean
from headwise.workers.errors import InvalidValueError

MIN_WORK_WEIGHT, MAX_WORK_WEIGHT = 1.0, 4.0
"""How much a second of computing counts beside a second of waiting, since whoever comes later waits for it too: of few
replicas that are busy, and of all. Between them it is what queueing theory says: of replicas that are busy for a part
b of the time, each second of work delays b / (1 - b) later requests by a second.

With 0 each request would go where its own first token comes first. Then of equal prompts that come at once each would
go to another replica, as computing all of the prompt takes no longer than waiting for the one before it. With 1 a
prompt leaves a replica that has its beginning once it would wait there for twice the time that the beginning takes.
"""

FAILURE_S = 1.0
"""What each failed request adds to its replica's cost, so that one that fails at once, and so has no queue, is not
sent everything. Halved by each load report."""

MAX_FAILURES_S = 60.0

Floats = npt.NDArray[np.float64]

_NONE: Floats = np.zeros(0)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a replica says of itself now and then.

    Raises:
        InvalidValueError: a number is less than 0 or not finite.

    Attributes:
        received: the largest number of a choice whose request has reached it; 0 if none has.
        queued_tokens: tokens of prompts that are not computed yet.
        running: requests whose tokens are being generated.
        token_s: seconds that a token of a prompt takes; None if not measured.
        row_s: seconds that a request in ``running`` adds to the wait for a first token; None if not measured.
    """

    received: int
    queued_tokens: int
    running: int
    token_s: float | None = None
    row_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("received", "queued_tokens", "running", "token_s", "row_s"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise InvalidValueError(name, value, "must be a finite number of at least 0")


class Loads:
    """Of each slot the tokens that wait, the requests that run, and the running means of what both take.

    A mean that was never told is that of the other replicas; where no replica has told, a token takes a second and a
    running request none, so that tokens decide.
    """

    def __init__(self) -> None:
        self._queued = self._running = _NONE  # tokens, requests
        self._told_token_s = self._told_row_s = _NONE  # the means; NaN where nothing was told
        self._token_s = self._row_s = _NONE  # the same, and the others' mean where nothing was told
        self._fastest_s = 1.0
        self._failures_s = _NONE
        self._wait_s = _NONE  # until the next prompt is begun; infinite where no prompt may go
        self._seed = np.zeros(0, np.uint64)
        self._open = np.zeros(0, np.bool_)
        self._grow(8)  # a multiple of 8, as bitmaps are bytes

    def open(self, slot: int, name: str) -> None:
        """A replica may be sent requests. Its name decides, by a hash, between it and equals."""
        while slot >= len(self._queued):
            self._grow(2 * len(self._queued))
        for array in (self._queued, self._running, self._failures_s):
            array[slot] = 0
        self._told_token_s[slot] = self._told_row_s[slot] = np.nan
        self._seed[slot] = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        self._open[slot] = True
        self._refresh()

    def close(self, slot: int) -> None:
        """A replica is sent nothing more."""
        self._open[slot] = False
        self._told_token_s[slot] = self._told_row_s[slot] = np.nan
        self._refresh()

    def add(self, slot: int, queued_tokens: int = 0, running: int = 0) -> None:
        """Changes what waits and runs there by so much."""
        self._queued[slot] += queued_tokens
        self._running[slot] += running
        self._refresh_slot(slot)

    def failed(self, slot: int) -> None:
        self._failures_s[slot] = min(self._failures_s[slot] + FAILURE_S, MAX_FAILURES_S)
        self._refresh_slot(slot)

    def learn(self, slot: int, report: LoadReport) -> None:
        """Takes the seconds of a report into the means."""
        for told, new in ((self._told_token_s, report.token_s), (self._told_row_s, report.row_s)):
            if new is not None:
                old = float(told[slot])
                told[slot] = running_mean(None if np.isnan(old) else old, new)
        self._failures_s[slot] /= 2
        self._refresh()

    def of(self, slot: int) -> tuple[int, int]:
        """The tokens that wait and the requests that run there."""
        return int(self._queued[slot]), int(self._running[slot])

    def best(self, tokens: int, prefixes: Sequence[tuple[int, int]], seed: int) -> int | None:
        """The slot where a prompt costs least; among equals, that with the least load, and then one by a hash.

        Args:
            tokens: of the prompt.
            prefixes: how many of them are cached where: (number, bitmap of slots), from the fewest to the most, and
                each slot in one bitmap.
            seed: 64 bits of the prompt for the hash.

        Returns:
            None if no slot is open.
        """
        weight = 1 + self._work_weight()
        seconds = self._wait_s + weight * tokens * self._token_s
        least, idlest_s = seconds.min(), self._wait_s.min()
        for cached, slots in reversed(prefixes):
            if idlest_s + weight * (tokens - cached) * self._fastest_s > least:
                break  # where fewer are cached no replica can be the best
            at = _positions(slots, len(seconds))
            seconds[at] -= weight * cached * self._token_s[at]
            least = min(least, seconds[at].min())
        if np.isinf(least):
            return None
        equal = np.flatnonzero(seconds == least)
        if len(equal) > 1:
            load = self._queued[equal] + self._running[equal]
            equal = equal[load == load.min()]
        if len(equal) > 1:
            mixed = (self._seed[equal] ^ np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
            return int(equal[(mixed ^ (mixed >> np.uint64(32))).argmax()])
        return int(equal[0])

    @contextmanager
    def without(self, slots: Sequence[int]) -> Iterator[None]:
        """These take nothing, for the length of the block."""
        at = np.asarray(slots, np.intp)
        before = self._wait_s[at]
        self._wait_s[at] = np.inf
        try:
            yield
        finally:
            self._wait_s[at] = before

    def wait_s(self, slot: int, tokens: int) -> float:
        """Seconds until a prompt of which so many tokens are not cached there would be computed, as far as known."""
        return float(self._wait_s[slot] + tokens * self._token_s[slot])

    def _work_weight(self) -> float:
        busy, num_open = np.count_nonzero(self._open & (self._queued > 0)), np.count_nonzero(self._open)
        if busy == num_open:
            return MAX_WORK_WEIGHT
        return float(min(max(MIN_WORK_WEIGHT, busy / (num_open - busy)), MAX_WORK_WEIGHT))

    def _grow(self, size: int) -> None:
        self._queued, self._running = _longer(self._queued, size), _longer(self._running, size)
        self._token_s, self._row_s = _longer(self._token_s, size), _longer(self._row_s, size)
        self._told_token_s = _longer(self._told_token_s, size, np.nan)
        self._told_row_s = _longer(self._told_row_s, size, np.nan)
        self._failures_s, self._wait_s = _longer(self._failures_s, size), _longer(self._wait_s, size, np.inf)
        self._seed = np.pad(self._seed, (0, size - len(self._seed)))
        self._open = np.pad(self._open, (0, size - len(self._open)))

    def _refresh(self) -> None:
        self._token_s, self._row_s = _or_mean(self._told_token_s, 1.0), _or_mean(self._told_row_s, 0.0)
        self._fastest_s = float(self._token_s.min())
        wait_s = self._queued * self._token_s + self._running * self._row_s + self._failures_s
        self._wait_s = np.where(self._open, wait_s, np.inf)

    def _refresh_slot(self, slot: int) -> None:
        if self._open[slot]:
            wait_s = self._queued[slot] * self._token_s[slot] + self._running[slot] * self._row_s[slot]
            self._wait_s[slot] = wait_s + self._failures_s[slot]


def _longer(array: Floats, size: int, fill: float = 0.0) -> Floats:
    return np.concatenate((array, np.full(size - len(array), fill)))


def _or_mean(told: Floats, unknown: float) -> Floats:
    missing = np.isnan(told)
    known = told[~missing]
    return np.where(missing, known.mean() if len(known) else unknown, told)


def _positions(slots: int, size: int) -> npt.NDArray[np.bool_] | list[int]:
    """The bits of a bitmap as an index of an array; few by hand, which is faster."""
    if slots.bit_count() > 4:
        octets = np.frombuffer(slots.to_bytes(size // 8, "little"), np.uint8)
        return np.unpackbits(octets, bitorder="little").view(np.bool_)
    found = []
    while slots:
        low = slots & -slots
        found.append(low.bit_length() - 1)
        slots ^= low
    return found
