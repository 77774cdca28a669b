"""Who may open a port for KV, and who may send to it."""

from __future__ import annotations

import threading
from typing import Any

import grpc
import pytest

from headwise.workers.errors import InvalidValueError
from headwise.workers.kv import receiver
from headwise.workers.kv.handoff import HandoffOp, HandoffSpec
from tests.workers.kv.handoff_ranks import DEADLINE_S, Group, Rank, fence_of, groups, ok
from tests.workers.kv.handoff_wire import SHARED, Handover, Wire


def test_a_transfer_that_is_replayed_is_refused(wire: Wire) -> None:
    with groups() as (prefill, decode):
        handover = Handover(prefill, decode)
        assert ok(handover.push()()) and ok(handover.filled())
        handover.reuse()
        with grpc.insecure_channel(decode.endpoints[0].address) as channel:
            push: Any = channel.stream_unary("/headwise.v1.KvTransferService/Push")
            for messages in (wire.sent, wire.sent[-1:]):
                with pytest.raises(grpc.RpcError) as raised:
                    push(iter(messages), timeout=DEADLINE_S)
                assert raised.value.code() == grpc.StatusCode.NOT_FOUND
        handover.check_reused()


def test_a_stream_that_shows_no_ticket_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "PATIENCE_S", 0.05)
    with groups() as (_, decode), grpc.insecure_channel(decode.endpoints[0].address) as channel:
        push: Any = channel.stream_unary("/headwise.v1.KvTransferService/Push")
        go = threading.Event()
        call = push.future(message for message in [b""] if go.wait(DEADLINE_S))
        with pytest.raises((grpc.RpcError, grpc.FutureCancelledError)):
            call.result(timeout=DEADLINE_S)
        assert call.code() == grpc.StatusCode.CANCELLED
        go.set()


def test_more_than_a_message_may_have_is_refused() -> None:
    with groups() as (_, decode), grpc.insecure_channel(decode.endpoints[0].address) as channel:
        push: Any = channel.stream_unary("/headwise.v1.KvTransferService/Push")
        with pytest.raises(grpc.RpcError) as raised:
            push(iter([bytes(3 << 20)]), timeout=DEADLINE_S)
        assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (HandoffSpec(True, "0.0.0.0"), r"^host='0.0.0.0': must be a loopback address where the port is not encrypted"),
        (HandoffSpec(True, "192.0.2.1"), "^host='192.0.2.1': must be a loopback address"),
        (HandoffSpec(True, "0.0.0.0", tls_cert="c", tls_key="k"), "^host='0.0.0.0': must be an address by which"),
        (HandoffSpec(True, tls_cert="c"), "^tls_cert='c': a certificate and its key"),
        (HandoffSpec(True, tls_cert="/none.pem", tls_key="/none.key"), "^tls_key='/none.key': cannot be read: No such"),
    ],
)
def test_what_must_not_be_bound_is_refused(spec: HandoffSpec, why: str) -> None:
    with pytest.raises(InvalidValueError, match=why):
        Rank([(0, 3)], 0, spec, 4)


@SHARED
def test_a_port_that_knows_an_authority_takes_from_those_it_signed(certificates: Any, shared_memory: bool) -> None:
    def files(name: str) -> dict[str, str]:
        return {"tls_cert": str(certificates / f"{name}.pem"), "tls_key": str(certificates / f"{name}.key")}

    ca = str(certificates / "good-ca.pem")
    decode = Group((9, 3), 2, HandoffSpec(True, shared_memory=shared_memory, ca=ca, **files("good")))
    for own, welcome in ((files("good"), True), (files("other"), False), ({}, False)):
        prefill = Group((9, 3), 1, HandoffSpec(shared_memory=shared_memory, ca=ca, **own), seed=1)
        handover = Handover(prefill, decode)
        (sent,) = handover.push()()
        assert bool(sent.error) != welcome
        if welcome:
            assert ok(handover.filled())
            handover.check_arrived()
        assert ok(decode.run(HandoffOp.CLOSE, handover.fence))
        prefill.close()
    decode.close()


@SHARED
def test_encrypted_ports_take_from_who_trusts_them(certificates: Any, shared_memory: bool) -> None:
    good = {"tls_cert": str(certificates / "good.pem"), "tls_key": str(certificates / "good.key")}
    decode = Group((9, 3), 2, HandoffSpec(True, shared_memory=shared_memory, **good))
    for ca, code in (("good-ca.pem", ""), ("other-ca.pem", "UNAVAILABLE"), (None, "UNAVAILABLE")):
        path = None if ca is None else str(certificates / ca)
        prefill = Group((9, 3), 1, HandoffSpec(shared_memory=shared_memory, ca=path), seed=1)
        handover = Handover(prefill, decode)
        (sent,) = handover.push()()
        assert code in sent.error and bool(sent.error) == bool(code)
        if not code:
            assert ok(handover.filled())
            handover.check_arrived()
        assert ok(decode.run(HandoffOp.CLOSE, handover.fence))
        prefill.close()
    wrong = HandoffSpec(ca=str(certificates / "none.pem"))
    prefill = Group((9, 3), 1, wrong)
    (sent,) = prefill.run(HandoffOp.PUSH, fence_of(), blocks=[0], destinations=decode.endpoints, timeout_s=DEADLINE_S)
    assert "ca=" in sent.error and "cannot be read" in sent.error
    prefill.close()
    decode.close()
