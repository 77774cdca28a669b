"""Supervisor: decides what to do when a shard group dies, or when another cannot take its place."""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import asdict, dataclass
from typing import Any

from headwise.cluster.group import ShardGroupDied

MAX_FAILURES = 10
"""So many groups in a row that die before they have finished a step, or cannot be started, are not followed by
another."""
BACKOFF_S = 0.5
MAX_BACKOFF_S = 10.0
SOUND_S = 60.0
"""A group that has lived for so long, and then died with nothing to do, is as good as one that has finished a step."""
MAX_DEATHS = 32
"""That are remembered with their causes."""


@dataclass(frozen=True, slots=True)
class Death:
    """One group's end.

    Attributes:
        epoch: of the generation that the group was of.
        rank, node: None where no rank is to blame.
    """

    epoch: int
    rank: int | None
    node: str | None
    cause: str


@dataclass(frozen=True, slots=True)
class Rebuild:
    """Start a group in so many seconds."""

    after_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Start no other group, for this reason."""

    reason: str


Instruction = Rebuild | GiveUp


class Supervisor:
    """Follows the groups of one engine, one after another. :meth:`stats` may be called on any thread.

    A group that has finished a step, or had none to do for SOUND_S, is replaced at once, however often that happens:
    its requests get on. Any other may be followed by others of its kind, so each waits longer than the one before.

    Attributes:
        num_deaths: groups that have died.
        num_rebuilt: groups that have taken the place of one that died.
        last_seconds: what the last of these took, from the death on; None before the first.
    """

    def __init__(self, now: float, max_failures: int = MAX_FAILURES) -> None:
        """Args: ``now``: the first group runs."""
        self.num_deaths = self.num_rebuilt = 0
        self.last_seconds: float | None = None
        self._max_failures, self._failures = max_failures, 0
        self._deaths: deque[Death] = deque(maxlen=MAX_DEATHS)
        self._by_rank: Counter[str] = Counter()
        self._lock = threading.Lock()  # of the deaths, which are read while others are added
        self._died_at, self._started_at = 0.0, now

    def died(self, now: float, epoch: int, death: ShardGroupDied, has_stepped: bool, idle: bool = False) -> Instruction:
        """The group that runs is dead.

        Args:
            has_stepped: whether it has finished a step.
            idle: whether it had nothing to do when it died.
        """
        with self._lock:
            self.num_deaths += 1
            self._deaths.append(Death(epoch, death.rank, death.node, death.cause))
            self._by_rank["" if death.rank is None else str(death.rank)] += 1
        self._died_at = now
        if has_stepped or (idle and now - self._started_at >= SOUND_S):
            self._failures = 0
            return Rebuild(0.0)
        return self._failed(str(death))

    def failed(self, error: str) -> Instruction:
        """A group could not be started."""
        return self._failed(error)

    def rebuilt(self, now: float) -> None:
        """A group has taken the place of the one that died."""
        self.num_rebuilt += 1
        self.last_seconds = now - self._died_at
        self._started_at = now

    def stats(self) -> dict[str, Any]:
        """``count`` of the groups that took another's place and the ``last_seconds`` it took; ``num_deaths``, these
        ``deaths_by_rank`` ("" where no rank is to blame), and the last of the ``deaths`` with epoch, rank, node and
        cause."""
        with self._lock:
            return {
                "count": self.num_rebuilt,
                "last_seconds": self.last_seconds,
                "num_deaths": self.num_deaths,
                "deaths_by_rank": dict(self._by_rank),
                "deaths": [asdict(death) for death in self._deaths],
            }

    def _failed(self, reason: str) -> Instruction:
        self._failures += 1
        if self._failures >= self._max_failures:
            return GiveUp(f"{self._failures} shard groups in a row have not finished a step; the last: {reason}")
        return Rebuild(min(MAX_BACKOFF_S, BACKOFF_S * 2 ** (self._failures - 1)))
