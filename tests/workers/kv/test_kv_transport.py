"""Shared memory where both ends have it, and the wire where they have not."""

from __future__ import annotations

import itertools
import os

import pytest

from headwise.workers.kv import fences, kv_transport
from headwise.workers.kv.handoff import HandoffOp, HandoffSpec, KvEndpoint
from headwise.workers.kv.kv_transport import GrpcTransport, SharedMemoryTransport
from headwise.workers.kv.pusher import connect
from headwise.workers.kv.shared_file import SharedReader, host_id
from tests.workers.kv.handoff_ranks import groups, ok
from tests.workers.kv.handoff_wire import Handover, Wire


def test_where_shared_memory_cannot_be_read_the_bytes_go_over_the_wire(
    wire: Wire, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreadable(pid: int, fd: int) -> SharedReader:
        raise PermissionError("hidden")

    monkeypatch.setattr(fences, "SharedReader", unreadable)
    with groups((9, 3), (3, 2), shared_memory=True) as (prefill, decode):
        for number in (1, 2):
            handover = Handover(prefill, decode, number)
            assert ok(handover.push()()) and ok(handover.filled())
            handover.check_arrived()
    assert caplog.text.count("KV does not go through shared memory") == 3


def test_where_there_is_no_shared_memory_the_bytes_go_over_the_wire(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(name: str, flags: int) -> int:
        raise OSError("no memory")

    with groups(shared_memory=True) as (prefill, decode):
        monkeypatch.setattr(os, "memfd_create", none)
        handover = Handover(prefill, decode)
        assert ok(handover.push()()) and ok(handover.filled())
        handover.check_arrived()
        assert host_id() == b""


@pytest.mark.parametrize("readable", [9, 1])
def test_more_than_a_file_holds_goes_in_several_streams(
    wire: Wire, monkeypatch: pytest.MonkeyPatch, readable: int
) -> None:
    """Each opens the file, and after the first it is too late for another way."""
    opened, real = itertools.count(), SharedReader.__init__

    def init(self: SharedReader, pid: int, fd: int) -> None:
        if next(opened) == readable:
            raise PermissionError("hidden")
        real(self, pid, fd)

    monkeypatch.setattr(kv_transport, "FILE_BYTES", 5000)  # two messages
    monkeypatch.setattr(SharedReader, "__init__", init)
    with groups(shared_memory=True) as (prefill, decode):
        handover = Handover(prefill, decode)
        (sent,) = handover.push()()
        assert next(opened) == 2
        if readable == 9:
            assert ok([sent]) and ok(handover.filled())
            handover.check_arrived()
        else:
            assert "shared memory cannot be read" in sent.error
            assert ok(decode.run(HandoffOp.CLOSE, handover.fence)) and not ok(handover.filled())


def test_shared_memory_is_used_on_one_host_and_if_it_may() -> None:
    here = KvEndpoint((0, 1), "127.0.0.1:1", host_id())
    for spec, end, expected in (
        (HandoffSpec(), here, [SharedMemoryTransport, GrpcTransport]),
        (HandoffSpec(shared_memory=False), here, [GrpcTransport]),
        (HandoffSpec(), KvEndpoint((0, 1), "127.0.0.1:1", b"elsewhere"), [GrpcTransport]),
        (HandoffSpec(), KvEndpoint((0, 1), "127.0.0.1:1"), [GrpcTransport]),
    ):
        ways = connect(spec)(end)
        assert list(map(type, ways)) == expected
        for way in ways:
            way.close()
    with groups(shared_memory=True) as (_, decode):
        assert decode.endpoints[0].host_id == here.host_id != b""
    with groups(shared_memory=False) as (_, decode):
        assert decode.endpoints[0].host_id == b""
