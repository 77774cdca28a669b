"""EngineWatch: a rank that outlives its engine's process ends, and what that process left with it.

Ray ends the actors of a driver that is gone too, within seconds. It does not know of sockets and shared memory, and it
cannot end a rank that hangs once its own processes are gone, as they are with the driver that started them. Where Ray
is faster and kills the ranks, the warden of workers/leftovers.py removes what is left.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headwise.workers.leftovers import sweep
from headwise.workers.processes import ProcessId

EXIT_CODE = 70
"""Of a rank whose engine is gone."""

_RELEASE_S = 2.0
"""For processes that the engine has just forked to let go of what was open there."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class EngineProcess:
    """Where an engine runs.

    Attributes:
        temporary: its folder for temporary files.
    """

    process: ProcessId
    temporary: str

    @classmethod
    def own(cls) -> EngineProcess:
        """Of an engine in the calling process."""
        return cls(ProcessId.of(os.getpid()), tempfile.gettempdir())


class EngineWatch:
    """Waits on a thread until the engine's process is gone. Then it removes what is left over, kills the other ranks
    of this host, and ends this process.

    Does nothing in a process that the engine's is not visible to, as on another host: Ray ends the rank there.
    """

    def __init__(self, engine: EngineProcess, leave: Callable[[], object]) -> None:
        """Args: ``leave``: called before the end, for what this process itself would leave."""
        self._engine, self._leave = engine, leave
        self._peers: Sequence[ProcessId] = ()
        if engine.process.is_here():
            _go_on_without_parent()
            threading.Thread(target=self._watch, name="headwise-engine-watch", daemon=True).start()

    def end_with(self, peers: Sequence[ProcessId]) -> None:
        """Names the processes of the group's ranks, which may hang when the engine ends, so that they cannot see it."""
        self._peers = peers

    def _watch(self) -> None:
        self._engine.process.await_end()
        try:
            self._end()
        finally:
            os._exit(EXIT_CODE)

    def _end(self) -> None:
        with contextlib.suppress(Exception):
            self._leave()
        deadline = time.monotonic() + _RELEASE_S
        while not sweep([self._engine.temporary]) and time.monotonic() < deadline:
            time.sleep(0.05)
        for peer in self._peers:  # last, for these do the same to this one
            if peer.pid != os.getpid():
                peer.kill()


def _go_on_without_parent() -> None:
    """Has the kernel wake this process, should it be stopped, when the Ray process that started it is gone: nothing of
    Ray would end it any more, and stopped it could not end itself."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)
