"""ProcessWatch: notices at once that the process of a rank on this host is gone; Ray tells of it a little later."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable, Sequence

from headwise.workers.processes import ProcessId

GONE = "its process is gone"


class ProcessWatch:
    """Waits on a thread until one of a group's processes is gone, and reports which, unless :meth:`stop` came first.
    Processes that cannot be seen from here, as on other hosts, are left out."""

    def __init__(self, processes: Sequence[ProcessId], report: Callable[[int | None, str], object]) -> None:
        """
        Args:
            processes: in rank order.
            report: gets the rank and the cause, once, on the watch's thread.
        """
        self._report = report
        self._wake_in, self._wake_out = os.pipe()
        self._stopping, self._lock = False, threading.Lock()
        self._thread = threading.Thread(target=self._watch, args=(processes,), name="headwise-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Call it before the processes are ended. Idempotent."""
        with self._lock:  # once: the descriptor's number may be another's by then
            stopping, self._stopping = self._stopping, True
        if not stopping:
            os.close(self._wake_out)  # which the other end notices

    def join(self) -> None:
        """Waits until the thread has ended, which it does at once after :meth:`stop`."""
        self._thread.join(5.0)

    def _watch(self, processes: Sequence[ProcessId]) -> None:
        ranks: dict[int, int] = {}  # by descriptor
        gone: int | None = None
        for rank, process in enumerate(processes):
            try:
                if process.is_here():
                    ranks[process.open()] = rank
            except ProcessLookupError:
                gone = rank
                break
            except OSError:  # an old kernel, or a container that forbids it
                continue
        if gone is None:
            poll = select.poll()
            for descriptor in (self._wake_in, *ranks):
                poll.register(descriptor, select.POLLIN)
            ended = [descriptor for descriptor, _ in poll.poll()]
            gone = ranks.get(ended[0]) if self._wake_in not in ended else None
        for descriptor in (self._wake_in, *ranks):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        if gone is not None and not self._stopping:
            self._report(gone, GONE)
