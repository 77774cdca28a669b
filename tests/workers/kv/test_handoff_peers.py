"""A peer that is broken, lies or is a stranger fails its own transfers, and nothing else here."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import torch

from headwise.v1 import kv_transfer_pb2 as pb
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv import receiver
from headwise.workers.kv.fences import FenceStream
from headwise.workers.kv.handoff import HandoffOp, HandoffSpec, KvEndpoint
from headwise.workers.kv.kv_transport import GrpcTransport, SharedMemoryTransport
from headwise.workers.kv.transfer import encode_result
from tests.workers.kv.handoff_ranks import DEADLINE_S, Group, fence_of, groups, ok
from tests.workers.kv.handoff_wire import BLOCKS, SHARED, Gate, Handover, Messages, Wire

PUSH = "/headwise.v1.KvTransferService/Push"


@contextlib.contextmanager
def receiver_that(answers: Callable[[Iterator[bytes], grpc.ServicerContext], pb.PushResponse]) -> Iterator[str]:
    """The address of a KvTransferService."""
    handler: Any = grpc.stream_unary_rpc_method_handler(answers, None, pb.PushResponse.SerializeToString)
    with ThreadPoolExecutor(4) as threads:
        server = grpc.server(threads)
        service = PUSH.split("/")[1]
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Push": handler}),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait(DEADLINE_S)


@pytest.mark.parametrize("told", [0, 1, 2**64 - 1])
@pytest.mark.parametrize("reads", [False, True])
def test_an_answer_that_is_not_of_what_was_sent_fails_the_push(told: int, reads: bool) -> None:
    def answer(messages: Iterator[bytes], context: grpc.ServicerContext) -> pb.PushResponse:
        if reads:
            list(messages)
        return pb.PushResponse(num_bytes=told)

    with groups() as (prefill, _), receiver_that(answer) as one, receiver_that(answer) as two:
        ends = {"destinations": [KvEndpoint((0, 3), one), KvEndpoint((0, 3), two)], "timeout_s": DEADLINE_S}
        (result,) = prefill.run(HandoffOp.PUSH, fence_of(), blocks=BLOCKS, **ends)
        assert f"num_bytes={told} in the answer" in result.error
        assert encode_result(result)  # it fits a message


def test_what_a_peer_says_is_told_as_one_line_and_not_long() -> None:
    def answer(messages: Iterator[bytes], context: grpc.ServicerContext) -> pb.PushResponse:
        context.abort(grpc.StatusCode.INTERNAL, "a\nb\x1b[2J" + 500 * "\N{SNOWMAN}")
        raise AssertionError

    with groups() as (prefill, _), receiver_that(answer) as address:
        ends = {"destinations": [KvEndpoint((0, 3), address)], "timeout_s": DEADLINE_S}
        (result,) = prefill.run(HandoffOp.PUSH, fence_of(), blocks=BLOCKS, **ends)
        assert "INTERNAL: a?b?[2J\N{SNOWMAN}" in result.error and result.error.isprintable()
        assert len(result.error) < 400


@pytest.fixture
def black_hole() -> Iterator[str]:
    """An address that answers nothing, not even that nobody listens."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(4):  # more than may wait to be accepted
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_an_address_that_swallows_everything_costs_no_more_than_the_timeout_and_stops_at_once(black_hole: str) -> None:
    with groups((9, 3), (1, 2)) as (prefill, decode):
        ends = {"blocks": BLOCKS, "destinations": [KvEndpoint((0, 3), black_hole)]}
        begun = time.monotonic()
        (result,) = prefill.run(HandoffOp.PUSH, fence_of(2), timeout_s=0.2, **ends)
        assert "timeout_s=0.2" in result.error or "DEADLINE" in result.error
        waits = prefill.begin(HandoffOp.PUSH, fence_of(3), timeout_s=DEADLINE_S, **ends)
        handover = Handover(prefill, decode)  # to others, meanwhile
        assert ok(handover.push()()) and ok(handover.filled())
        assert ok(prefill.run(HandoffOp.STOP, fence_of(3))) and waits()[0].error == "it was stopped"
        assert time.monotonic() - begun < 5


def test_a_stream_that_goes_on_after_its_fence_is_filled_is_cut(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "PATIENCE_S", 0.05)
    go = threading.Event()

    def stay(messages: Messages) -> Messages:
        yield from messages
        go.wait(DEADLINE_S)

    with groups() as (prefill, decode):
        handover = Handover(prefill, decode)
        wire.fault = stay
        sent = handover.push()
        assert ok(handover.filled()) and "CANCELLED" in sent()[0].error
        go.set()


def test_a_stream_whose_fence_is_open_may_take_its_time(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, real = threading.Semaphore(0), FenceStream.is_stray

    def is_stray(stream: FenceStream, patience_s: float) -> bool:
        looked.release()
        return real(stream, patience_s)

    monkeypatch.setattr(receiver, "PATIENCE_S", 0.02)
    monkeypatch.setattr(FenceStream, "is_stray", is_stray)
    with groups() as (prefill, decode):
        handover, gate = Handover(prefill, decode), Gate()
        wire.fault = gate
        sent = handover.push()
        assert gate.reached.wait(DEADLINE_S)
        for _ in range(3):
            assert looked.acquire(timeout=DEADLINE_S)
        gate.go.set()
        assert ok(sent()) and ok(handover.filled())


def test_strangers_do_not_take_all_file_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "MAX_CONNECTIONS", 8)
    with groups() as (prefill, decode):
        host, _, port = decode.endpoints[0].address.partition(":")
        closed = 0
        with contextlib.ExitStack() as stack:
            for _ in range(30):
                client = stack.enter_context(socket.create_connection((host, int(port)), DEADLINE_S))
                closed += not client.recv(1)  # what is taken is greeted
            assert closed == 22
        deadline = time.monotonic() + DEADLINE_S
        handover = Handover(prefill, decode)
        while not ok(handover.push()()) and time.monotonic() < deadline:  # until it is noticed that they are gone
            pass
        assert ok(handover.filled())


@pytest.mark.parametrize("name", ["headwise-kv-receive", "headwise-kv-watch", "headwise-kv-push"])
def test_a_thread_that_the_system_has_not_fails_a_push_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    left, real = [1], threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == name and left:
            left.pop()
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with groups() as (prefill, decode):
        handover = Handover(prefill, decode)
        assert not ok(handover.push(0.2)()) and not left
        assert ok(handover.push()()) and ok(handover.filled())
        handover.check_arrived()


def test_a_rank_that_takes_no_shared_memory_reads_none(wire: Wire) -> None:
    """Whatever the message says: its process and file may be those of somebody else."""
    with groups(shared_memory=True) as (prefill, decode):
        other = Group((9, 3), 1, HandoffSpec(True, shared_memory=False))
        handover = Handover(prefill, decode)
        assert ok(handover.push()()) and ok(handover.filled())
        assert ok(other.run(HandoffOp.OPEN, handover.fence, blocks=[0, 1, 2, 3], sources=prefill.heads))
        with grpc.insecure_channel(other.endpoints[0].address) as channel:
            push: Any = channel.stream_unary(PUSH)
            with pytest.raises(grpc.RpcError, match="this rank takes none"):
                push(iter(wire.sent), timeout=DEADLINE_S)
        assert torch.equal(other.ranks[0].content(), other.content)
        other.close()


@pytest.mark.parametrize("transport", [GrpcTransport, SharedMemoryTransport])
@pytest.mark.parametrize("address", ["192.0.2.1:7", "[2001:db8::1]:7", "decode.example:7"])
def test_nothing_goes_to_another_host_in_clear_text(transport: Any, address: str) -> None:
    with pytest.raises(InvalidValueError, match=r"^ca=None: keys, values and tickets would go in clear text"):
        transport(address, HandoffSpec())
    for near in ("127.0.0.1:7", "[::1]:7", "localhost:7"):
        transport(near, HandoffSpec()).close()


@SHARED
def test_a_certificate_for_another_host_is_not_trusted(certificates: Any, shared_memory: bool) -> None:
    """It is for 127.0.0.1; whoever signed it is trusted."""
    good = {"tls_cert": str(certificates / "good.pem"), "tls_key": str(certificates / "good.key")}
    sends = HandoffSpec(shared_memory=shared_memory, ca=str(certificates / "good-ca.pem"))
    prefill = Group((9, 3), 1, sends)
    decode = Group((9, 3), 1, HandoffSpec(True, "127.0.0.2", shared_memory, **good))
    handover = Handover(prefill, decode)
    (sent,) = handover.push()()
    assert "UNAVAILABLE" in sent.error and "127.0.0.2" in sent.error
    assert ok(decode.run(HandoffOp.CLOSE, handover.fence)) and not ok(handover.filled())
    prefill.close()
    decode.close()
