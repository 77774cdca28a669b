"""What streams feel of long prompts: the counting, and the pinning of ranks."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from headwise.runtime import LLM
from headwise.runtime.bench import interference
from headwise.runtime.bench.interference import Seen, pin, seen_of
from headwise.runtime.bench.latency import Timeline


def test_what_is_seen_of_known_times() -> None:
    timelines = [Timeline(10.0, [12.0, 12.5]), Timeline(11.0, [11.5, 14.0])]
    watched = [[9.0, 10.5, 11.5, 14.5], [10.0, 13.0]]
    assert seen_of(timelines, watched, 30, num_handed=2) == Seen(
        gaps=[(1.5, 1.0), (3.0, 3.0)],  # one begins before the first prompt is due, one ends after the last token
        first_s=[2.0, 0.5],
        tok_s=(2 / 4, (2 * 30 + 4) / 4),
        num_handed=2,
    )


def test_ranks_in_this_process_are_not_pinned(checkpoint: Callable[..., Path]) -> None:
    before = os.sched_getaffinity(0)
    with LLM(checkpoint("gqa"), executor="local", prefill={}, kv_memory="8MiB", quiet=True) as llm:
        assert not pin(llm)
    assert os.sched_getaffinity(0) == before


def test_every_thread_of_a_process_is_found() -> None:
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    try:
        assert {threading.get_native_id(), thread.native_id} <= {*interference._threads([os.getpid()])}
    finally:
        ended.set()
        thread.join()
