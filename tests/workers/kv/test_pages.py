"""Pages that are taken beside steps: all of them, without a byte changed."""

from __future__ import annotations

import mmap
import threading
from pathlib import Path

import numpy as np
import pytest

from headwise.workers.kv import pages
from headwise.workers.kv.pages import Bytes, PageTaker

DEADLINE_S = 60.0
MIB = 1 << 20


def resident() -> int:
    """Bytes of this process that have pages."""
    fields = Path("/proc/self/smaps_rollup").read_text().split()
    return int(fields[fields.index("Rss:") + 1]) << 10


def new_array(num_bytes: int) -> Bytes:
    """An array without pages: numpy's own may lie in memory that was used before."""
    return np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)


def test_all_pages_are_taken_and_what_is_written_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_DELAY_S", 0.0)
    monkeypatch.setattr(pages, "_SHARE", 1.0)
    arrays = [new_array(200 * MIB + 5), np.zeros(3, np.uint8), np.zeros(0, np.uint8)]
    before = resident()
    taker = PageTaker(arrays)
    for at in range(0, arrays[0].nbytes, 999_983):
        arrays[0][at] = 7
    assert taker.join(DEADLINE_S)
    assert resident() - before > 190 * MIB
    assert (arrays[0][::999_983] == 7).all() and int(arrays[0].sum()) == 7 * len(arrays[0][::999_983])


def test_where_the_system_cannot_do_that_they_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_POPULATE_WRITE", 9999)
    array, before = new_array(64 * MIB), resident()
    assert PageTaker([array]).join(0.0)
    assert resident() - before > 60 * MIB and not array.any()


def test_it_ends_when_it_is_closed() -> None:
    taker = PageTaker([new_array(512 * MIB)])
    taker.close()
    taker.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "headwise-pages"]
