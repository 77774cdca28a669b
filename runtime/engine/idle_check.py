"""IdleCheck: the books of the KV blocks are checked while an engine has nothing else to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

CHECK_S = 0.002
"""How long a part of the check may hold up a request that comes meanwhile."""


class IdleCheck:
    """Takes at most a hundredth of the time, and a little at a time, for with many blocks a check takes a while."""

    def __init__(self, checks: Callable[[], Iterator[None]]) -> None:
        """Args: ``checks``: begins a check in parts; a part raises IntegrityError if the books do not add up."""
        self._checks = checks
        self._check: Iterator[None] | None = None
        self._seconds = self._next = 0.0

    @property
    def running(self) -> bool:
        """Whether a check has begun and is not over."""
        return self._check is not None

    def drop(self) -> None:
        """There is something else to do, or the books are no more."""
        self._check = None

    def run(self) -> None:
        """Begins a check if it is time for one, or goes on with the one that runs.

        Raises:
            IntegrityError: the books do not add up.
        """
        started = ended = time.monotonic()
        if self._check is None:
            if started < self._next:
                return
            self._check, self._seconds = self._checks(), 0.0
        while self._check is not None and ended - started <= CHECK_S:
            if next(self._check, True):
                self._check = None
            ended = time.monotonic()
        self._seconds += ended - started
        self._next = ended + 100 * self._seconds
