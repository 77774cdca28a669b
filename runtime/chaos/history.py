"""History: what each client saw and what was done to the engine, with the time of each; JSON lines in a file."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

Event = dict[str, Any]
"""``at`` in seconds since the history began, ``event``, and what belongs to it:

========== =========================================================================================================
asked      request, client, way, questions (their numbers): a client asks
delta      request, question (which of the request's, from 0), sample, tokens, text, finish, error: it got something
left       request: the client went away before the end
done       request: it has seen the end
failed     request, error: it got an error
fault      fault, kills: what is done to the engine, and how many processes that kills
fired      fault, kills: as fault, of a failpoint, when it fired
down, up   epoch: a group is gone; requests go on with the next
========== =========================================================================================================
"""


class History:
    """Any thread may add to it.

    Attributes:
        events: in order of time.
        began: on the monotonic clock.
    """

    def __init__(self, path: Path | None = None) -> None:
        """
        Raises:
            OSError: the file cannot be written.
        """
        self.events: list[Event] = []
        self.began = time.monotonic()
        self._lock = threading.Lock()
        self._file = path.open("w") if path is not None else None

    def begin(self) -> None:
        """Times count from now on."""
        self.began = time.monotonic()

    def add(self, event: str, at: float | None = None, **fields: Any) -> Event:
        """Args: ``at``: on the monotonic clock; None is now."""
        with self._lock:
            seconds = (time.monotonic() if at is None else at) - self.began
            added = {"at": round(seconds, 6), "event": event, **fields}
            self.events.append(added)
            if self._file is not None:
                self._file.write(json.dumps(added) + "\n")
        return added

    def __enter__(self) -> History:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with self._lock:  # who still waits for an answer may add to it later
            file, self._file = self._file, None
        if file is not None:
            file.close()


def read(path: Path) -> list[Event]:
    """The events of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
