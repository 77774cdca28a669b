"""Pages of new memory: taken before the first step, or beside the steps where streams wait.

To find and clear a gigabyte takes the system up to two seconds. A step that comes to a page first has to wait for it,
so they are taken before. Streams whose ranks have died would wait for all of them, and need a few at first.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE, since Linux 5.14. It changes no byte, whoever writes meanwhile."""
_CHUNK_BYTES = 2 << 20
"""At a time, a huge page: the rank's own thread may have to wait for the end of it."""
_NICE = 19
_DELAY_S = 5.0
"""Until then streams whose ranks have died are computed again."""
_SHARE = 0.1
"""Of the time; steps that run beside it get slower by no more."""


def take_pages(arrays: Sequence[Bytes]) -> None:
    """Takes the pages of arrays here and now; of new ones, for it writes zeros."""
    for array in arrays:
        array[:: mmap.PAGESIZE] = 0


class PageTaker:
    """Takes the pages of arrays in order, a little at a time. Close it before the arrays are given up."""

    def __init__(self, arrays: Sequence[Bytes]) -> None:
        """Where the system knows no such thing, the pages are taken here and now."""
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        rest = [array for array in arrays if not _take_chunk(array, 0)]
        if rest:
            take_pages(rest)
            return
        self._thread = threading.Thread(target=self._work, args=(arrays,), name="headwise-pages", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Takes no more. Idempotent."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def join(self, timeout_s: float) -> bool:
        """Waits until all pages are taken, or the time is over; returns whether they are."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def _work(self, arrays: Sequence[Bytes]) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        pause_s = _DELAY_S
        for array in arrays:
            for start in range(0, array.nbytes, _CHUNK_BYTES):
                if self._closing.wait(pause_s):
                    return
                started = time.monotonic()
                _take_chunk(array, start)
                pause_s = (time.monotonic() - started) * (1 / _SHARE - 1)


def _take_chunk(array: Bytes, start: int) -> bool:
    """Takes the whole pages of a chunk of an array; returns whether the system can do that."""
    address, page = array.ctypes.data, mmap.PAGESIZE
    first = -(-(address + start) // page) * page
    stop = min(address + start + _CHUNK_BYTES, address + array.nbytes) // page * page
    if stop <= first:
        return True
    pointer, size = ctypes.c_void_p(first), ctypes.c_size_t(stop - first)
    return int(ctypes.CDLL(None).madvise(pointer, size, _POPULATE_WRITE)) == 0
