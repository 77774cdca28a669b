"""Engines here are shared by the tests of a module, and get other shards in the middle of a test: what they leave
behind is looked at once they are closed."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from headwise.runtime.chaos.books import leftovers

DEADLINE_S = 10.0


@pytest.fixture(scope="module", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before, threads = leftovers(), set(threading.enumerate())
    yield
    assert leftovers() <= before
    for thread in set(threading.enumerate()) - threads:
        if thread.name in ("headwise-shard", "headwise-engine", "headwise-recovery"):
            thread.join(DEADLINE_S)
            assert not thread.is_alive(), f"{thread.name} goes on"
