"""Processes that are killed or stopped in the middle of a handoff."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import grpc
import pytest

from headwise.workers.kv.handoff import HandoffOp, HandoffSpec
from headwise.workers.kv.shared_file import SharedFile, SharedReader
from tests.workers.kv.handoff_ranks import DEADLINE_S, Rank, fence_of, groups, ok
from tests.workers.processes import FORKED

HEADS = [(0, 3)]


@contextmanager
def process(target: Any) -> Iterator[tuple[Any, int]]:
    """What a process says first, and its pid; it is killed in the end."""
    here, there = FORKED.Pipe()
    child = FORKED.Process(target=target, args=(there,), daemon=True)
    child.start()
    there.close()
    try:
        assert here.poll(DEADLINE_S)
        yield here.recv(), child.pid or 0
    finally:
        child.kill()
        child.join(DEADLINE_S)
        here.close()


def receive(connection: Connection) -> None:
    rank = Rank(HEADS, 0, HandoffSpec(receives=True), 12)
    assert ok([rank.run(HandoffOp.OPEN, fence_of(), blocks=[0, 1], sources=HEADS)])
    connection.send(rank.endpoint)
    signal.pause()


def share(connection: Connection) -> None:
    file = SharedFile(1 << 20)
    file.view[:] = b"7" * (1 << 20)
    connection.send(file.place)
    signal.pause()


@pytest.mark.thorough
@pytest.mark.parametrize("signal_number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_receiver_that_is_stopped_or_killed_costs_no_more_than_the_timeout(signal_number: int) -> None:
    with groups() as (prefill, decode), process(receive) as (endpoint, pid):
        os.kill(pid, signal_number)
        begun = time.monotonic()
        (sent,) = prefill.run(HandoffOp.PUSH, fence_of(), blocks=[3, 4], destinations=[endpoint], timeout_s=0.5)
        assert endpoint.address in sent.error or "timeout_s=0.5" in sent.error
        assert time.monotonic() - begun < 5
        assert ok(decode.run(HandoffOp.OPEN, fence_of(2), blocks=[0, 1], sources=HEADS))
        push = {"blocks": [3, 4], "destinations": decode.endpoints, "timeout_s": DEADLINE_S}
        assert ok(prefill.run(HandoffOp.PUSH, fence_of(2), **push))


def receive_and_end(connection: Connection) -> None:
    rank = Rank(HEADS, 0, HandoffSpec(receives=True), 12)
    connection.send(rank.endpoint)
    connection.recv()


@pytest.mark.thorough
def test_streams_do_not_keep_a_process_from_ending() -> None:
    here, there = FORKED.Pipe()
    child = FORKED.Process(target=receive_and_end, args=(there,), daemon=True)
    child.start()
    try:
        assert here.poll(DEADLINE_S)
        reached, go = threading.Event(), threading.Event()

        def silent() -> Iterator[bytes]:
            reached.set()
            go.wait(DEADLINE_S)
            yield b""

        with grpc.insecure_channel(here.recv().address) as channel:
            push: Any = channel.stream_unary("/headwise.v1.KvTransferService/Push")
            call = push.future(silent())
            assert reached.wait(DEADLINE_S)
            here.send(None)
            child.join(DEADLINE_S)
            assert child.exitcode == 0
            go.set()
            with pytest.raises(grpc.RpcError):
                call.result(timeout=DEADLINE_S)
    finally:
        child.kill()
        here.close()
        there.close()


@pytest.mark.thorough
def test_memory_of_a_process_that_is_killed_is_gone_with_its_last_reader() -> None:
    before = shared_memory()
    with process(share) as (place, pid):
        reader = SharedReader(*place)
        assert reader.read(5, 10) == b"7" * 10
        os.kill(pid, signal.SIGKILL)
    assert reader.read(0, 2 << 20) == b"7" * (1 << 20)
    reader.close()
    with pytest.raises(OSError):
        SharedReader(*place)
    assert shared_memory() == before


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))
