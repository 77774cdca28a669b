"""Spare: a shard group that has its weights, and waits to take the place of one that dies."""

from __future__ import annotations

import logging
import threading
import time

from headwise.cluster.group import ShardGroup
from headwise.runtime.engine.generation import GenerationFactory

RETRY_S = 10.0
"""After a spare could not be loaded, or has died."""
DELAY_S = 3.0
"""After a spare was taken: the requests that waited for it go first."""
_END_S = 30.0
_MOMENT_S = 0.1

_logger = logging.getLogger(__name__)


class Spare:
    """Loads a group on a thread of its own, and another when that one is taken or dies. Thread-safe.

    A spare takes as much memory as the weights of all its ranks, and no KV memory before it is taken.

    Attributes:
        group: that waits, or is loaded; None where there is none.
        num_bytes: what the weights of the last one take, of all its ranks.
    """

    def __init__(self, generations: GenerationFactory) -> None:
        self._generations = generations
        self._lock = threading.RLock()  # reentrant: a forgotten engine may be collected, and closed, on any thread
        self.group: ShardGroup | None = None
        self.num_bytes = 0
        self._ready = self._closing = False
        self._hurried = threading.Event()
        self._thread: threading.Thread | None = None
        self._retry_at = 0.0

    @property
    def state(self) -> str:
        """``none``, ``loading`` or ``ready``."""
        if self._thread is not None and self._thread.is_alive():
            return "loading"
        return "ready" if self._ready else "none"

    def load(self) -> None:
        """Begins to load a group, if there is none."""
        with self._lock:
            if self._closing or self._ready or (self._thread is not None and self._thread.is_alive()):
                return
            self._retry_at = time.monotonic() + RETRY_S
            thread = threading.Thread(target=self._load, name="headwise-spare", daemon=True)
            thread.start()
            self._thread = thread

    def take(self) -> ShardGroup | None:
        """The group that waits, loaded first if need be; None if there is none that lives."""
        if (thread := self._thread) is not None:
            thread.join()
        with self._lock:
            group, ready = self.group, self._ready
            self.group, self._ready = None, False
            self._retry_at = time.monotonic() + DELAY_S
        if group is None or not ready:
            return None
        if group.death is not None:
            _end(group)
            return None
        return group

    def look(self) -> None:
        """Replaces a group that has died while it waited, or could not be loaded."""
        with self._lock:
            group = self.group
            dead = self._ready and group is not None and group.death is not None
            if dead:
                self.group, self._ready = None, False
        if dead and group is not None:
            _logger.warning("the spare shards have died, and others are loaded: %s", group.death)
            _end(group)
        if self.group is None and time.monotonic() >= self._retry_at:
            self.load()

    def hurry(self) -> None:
        """Has :meth:`close`, now or later, wait only a moment."""
        self._hurried.set()
        if (group := self.group) is not None:
            group.hurry()

    def close(self) -> None:
        """Ends the group. Idempotent."""
        with self._lock:
            self._closing = True
            group, self.group, self._ready = self.group, None, False
        if group is not None:
            _end(group)
        if (thread := self._thread) is not None and thread is not threading.current_thread():
            join(thread, _END_S, self._hurried)

    def _load(self) -> None:
        group: ShardGroup | None = None
        try:
            group = self._generations.new_group()
            with self._lock:
                if self._closing:
                    return
                self.group = group
            group.load()
            self.num_bytes = sum(shard["weight_bytes"] for shard in group.query("stats"))
            with self._lock:
                if not self._closing:
                    self._ready = True
                    _logger.info("spare shards wait, with %.0f MiB of weights", self.num_bytes / 2**20)
                    return
        except Exception as error:
            if not self._closing:
                _logger.warning("spare shards could not be loaded; next try in %g s: %s", RETRY_S, error)
        if group is not None:
            _end(group)
        with self._lock:
            if self.group is group:
                self.group = None


def join(thread: threading.Thread, timeout_s: float, hurried: threading.Event) -> None:
    """Waits for a thread's end at most so long, and only a moment more once somebody is in a hurry."""
    deadline = time.monotonic() + timeout_s
    while thread.is_alive() and time.monotonic() < deadline and not hurried.is_set():
        thread.join(_MOMENT_S)
    thread.join(_MOMENT_S)


def _end(group: ShardGroup) -> None:
    try:
        group.hurry()
        group.close()
    except Exception:
        _logger.exception("spare shards could not be ended")
