"""RunWatcher: notices a rank whose process dies or whose run() ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayTaskError

from headwise.cluster.rank import death_of, sayable
from headwise.workers.errors import HeadwiseError, PeerDiedError


class RunWatcher:
    """Waits on a thread until one of a group's ranks stops running, and reports which and why, unless :meth:`stop` came
    first."""

    def __init__(self, runs: list[Any], report: Callable[[int | None, str], object]) -> None:
        """
        Args:
            runs: Ray's references of every actor's run(), in rank order.
            report: gets the rank that died, None if it is Ray that has gone, and the cause, once, on the watcher's
                thread.
        """
        self._runs, self._report = runs, report
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="headwise-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Call it before the runs are ended."""
        self._stopped.set()

    def join(self) -> None:
        """Waits until the thread has ended, which it does soon after :meth:`stop`."""
        self._thread.join(5.0)

    def _watch(self) -> None:
        rank: int | None = None
        cause = ""
        while not cause and not self._stopped.is_set():
            try:
                ready, _ = ray.wait(self._runs, timeout=0.25)
                if ready:
                    rank = self._runs.index(ready[0])
                    ray.get(ready[0])
                    cause = "its run() returned"
            except RayTaskError as error:
                root = error.cause
                cause = sayable(str(root)) if isinstance(root, HeadwiseError) else first_lines(error)
                if rank is not None and isinstance(root, PeerDiedError):
                    rank, cause = death_of(rank, root)
            except Exception as error:  # Ray itself may be gone
                cause = first_lines(error)
        if not self._stopped.is_set():
            self._report(rank, cause)


def first_lines(error: Exception) -> str:
    """Ray's errors are pages; their first lines say what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return sayable("; ".join(lines[:4])) or type(error).__name__
