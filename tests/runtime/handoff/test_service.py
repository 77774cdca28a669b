"""Each RPC of KvHandoffService, over a real channel: what it does, how often, and for whom."""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from headwise.runtime.handoff import service as service_module
from headwise.runtime.handoff.errors import MismatchError
from headwise.runtime.handoff.local import LocalServer
from headwise.runtime.handoff.messages import Hello, HelloAnswer, Load, State, Status
from headwise.runtime.handoff.service import HandoffService, host_of
from headwise.v1 import kv_transfer_pb2 as pb
from headwise.v1.kv_transfer_pb2_grpc import KvHandoffServiceStub
from headwise.workers.errors import HeadwiseError, InvalidValueError
from headwise.workers.kv.handoff import KvEndpoint
from tests.effort import examples
from tests.runtime.handoff.conftest import (
    DEADLINE_S,
    DECODE_EPOCH,
    ENDPOINTS,
    EPOCH,
    HELLO,
    IDENTITY,
    FakeEngine,
    TcpServer,
    about,
    ask_of,
    key_of,
    wait_until,
)

CODE = grpc.StatusCode
METHODS = ("Hello", "Prefill", "Renew", "Commit", "AbortTransfer", "Query")


def failure(method: Any, request: Any, timeout: float = DEADLINE_S) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as error:
        method(request, timeout=timeout)
    return error.value.code(), error.value.details()  # type: ignore[attr-defined]


def greet(stub: KvHandoffServiceStub, hello: Hello = HELLO) -> HelloAnswer:
    return HelloAnswer.of(stub.Hello(hello.message(), timeout=DEADLINE_S))


def test_hello_tells_two_engines_of_each_other(stub: KvHandoffServiceStub, engine: FakeEngine) -> None:
    expected = about(version=1, load=Load(0, 0.25, 100))
    assert greet(stub) == greet(stub) == expected
    assert engine.decodes == {DECODE_EPOCH: ENDPOINTS}


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("version", {"min_version": 2, "max_version": 3}),
        ("fingerprint", {"fingerprint": "another"}),
        ("dtype", {"dtype": "bfloat16", "block_size": 8}),
        ("block_size", {"block_size": 8}),
        ("policy", {"policy": "window"}),
        ("num_layers", {"num_layers": 3}),
        ("num_kv_heads", {"num_kv_heads": 2}),
        ("head_dim", {"head_dim": 4}),
    ],
)
def test_engines_that_do_not_fit_are_told_in_which_field(
    stub: KvHandoffServiceStub, engine: FakeEngine, field: str, changes: dict[str, Any]
) -> None:
    identity = replace(IDENTITY, **changes)
    endpoints = [KvEndpoint((0, identity.num_kv_heads), "127.0.0.1:1")]
    code, message = failure(stub.Hello, replace(HELLO, identity=identity, endpoints=endpoints).message())
    assert code is CODE.FAILED_PRECONDITION and message.startswith(f"{field}: ")
    assert not engine.decodes


def test_the_highest_common_version_is_spoken(engine: FakeEngine) -> None:
    service = HandoffService(about(identity=replace(IDENTITY, max_version=4)), engine.run)
    hello = replace(HELLO, identity=replace(IDENTITY, min_version=1, max_version=3))
    assert service.answer("Hello", hello.message(), "unix:").result(DEADLINE_S).version == 3


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("unix:", "loopback"),
        ("unix:/tmp/some", "loopback"),
        ("ipv4:127.0.0.1:80", "loopback"),
        ("ipv6:%5B::1%5D:80", "loopback"),
        ("ipv6:[::ffff:127.0.0.1]:80", "loopback"),
        ("ipv4:192.0.2.1:80", "192.0.2.1"),
        ("ipv6:%5B::ffff:192.0.2.1%5D:80", "192.0.2.1"),
        ("ipv6:%5B2001:db8::1%5D:80", "2001:db8::1"),
    ],
)
def test_the_host_that_calls_is_known(peer: str, host: str) -> None:
    assert host_of(peer) == host


@pytest.mark.parametrize("peer", ["", "vsock:1:2", "ipv4:somewhere:80"])
def test_a_caller_without_a_host_is_refused(peer: str) -> None:
    with pytest.raises(InvalidValueError, match="peer"):
        host_of(peer)


@pytest.mark.parametrize(
    ("peer", "address", "right"),
    [
        ("unix:", "127.0.0.1:1", True),
        ("unix:", "[::1]:65535", True),
        ("ipv4:127.0.0.1:9", "127.9.9.9:5", True),
        ("ipv4:127.0.0.1:9", "localhost:5", True),
        ("ipv4:192.0.2.1:9", "192.0.2.1:5", True),
        ("ipv6:[2001:db8::1]:9", "[2001:db8:0::1]:5", True),
        ("unix:", "192.0.2.1:5", False),
        ("unix:", "[::1%30]:5", False),
        ("unix:", "[::1%5d:5,[2001:db8::1]:5", False),
        ("ipv4:127.0.0.1:9", "192.0.2.1:5", False),
        ("ipv4:192.0.2.1:9", "127.0.0.1:5", False),
        ("ipv4:192.0.2.1:9", "localhost:5", False),
        ("ipv4:192.0.2.1:9", "192.0.2.2:5", False),
        ("ipv4:192.0.2.1:9", "[::ffff:192.0.2.2]:5", False),
        ("ipv4:192.0.2.1:9", "169.254.169.254:80", False),
        ("unix:", "somewhere.example:5", False),
        ("unix:", "127.0.0.1", False),
        ("unix:", "127.0.0.1:0", False),
        ("unix:", "127.0.0.1:65536", False),
        ("unix:", "127.0.0.1:+5", False),
        ("unix:", "user@127.0.0.1:5", False),
        ("unix:", "127.0.0.1:5,192.0.2.1:5", False),
        ("unix:", "192.0.2.1:5,127.0.0.1:5", False),
        ("unix:", "unix:/tmp/some:5", False),
        ("unix:", "ipv4:192.0.2.1,127.0.0.1:5", False),
        ("unix:", "dns://192.0.2.1/127.0.0.1:5", False),
        ("unix:", "2130706433:5", False),
    ],
)
def test_ranks_connect_to_no_host_but_the_callers(engine: FakeEngine, peer: str, address: str, right: bool) -> None:
    service = HandoffService(about(), engine.run, encrypts=True)
    hello = replace(HELLO, endpoints=[KvEndpoint((0, 3), address)], tls=True)
    answer = service.answer("Hello", hello.message(), peer)
    if right:
        answer.result(DEADLINE_S)
    else:
        with pytest.raises(InvalidValueError, match=r"endpoints\.address"):
            answer.result(DEADLINE_S)
    assert bool(engine.decodes) == right


def test_kv_goes_to_another_machine_only_encrypted(service: HandoffService) -> None:
    hello = replace(HELLO, endpoints=[KvEndpoint((0, 3), "192.0.2.1:5")])
    with pytest.raises(InvalidValueError, match="tls"):
        service.answer("Hello", hello.message(), "ipv4:192.0.2.1:9").result(DEADLINE_S)


@pytest.mark.parametrize("encrypts", [False, True])
def test_engines_that_do_not_both_encrypt_are_no_match(engine: FakeEngine, encrypts: bool) -> None:
    """Else every prompt would be computed, and its keys and values would not arrive."""
    service = HandoffService(about(), engine.run, encrypts)
    service.answer("Hello", replace(HELLO, tls=encrypts).message(), "unix:").result(DEADLINE_S)
    with pytest.raises(MismatchError, match=r"tls: .*--handoff-ca"):
        service.answer("Hello", replace(HELLO, epoch=5, tls=not encrypts).message(), "unix:").result(DEADLINE_S)
    assert [*engine.decodes] == [HELLO.epoch]


def test_an_epoch_stays_with_the_engine_that_told_it(engine: FakeEngine) -> None:
    service = HandoffService(about(), engine.run, encrypts=True)
    service.answer("Hello", replace(HELLO, tls=True).message(), "unix:").result(DEADLINE_S)
    other = replace(HELLO, endpoints=[KvEndpoint((0, 3), "127.0.0.1:666")], tls=True)
    with pytest.raises(InvalidValueError, match="epoch"):
        service.answer("Hello", other.message(), "unix:").result(DEADLINE_S)
    remote = replace(HELLO, endpoints=[KvEndpoint((0, 3), "192.0.2.1:666")], tls=True)
    with pytest.raises(InvalidValueError, match="epoch"):
        service.answer("Hello", remote.message(), "ipv4:192.0.2.1:9").result(DEADLINE_S)
    assert engine.decodes == {DECODE_EPOCH: ENDPOINTS}


def test_the_engine_not_heard_of_for_longest_makes_room(
    service: HandoffService, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "MAX_DECODES", 3)

    def call(method: str, request: Any) -> Any:
        return service.answer(method, request, "unix:").result(DEADLINE_S)

    for epoch in (1, 2, 3):
        call("Hello", replace(HELLO, epoch=epoch).message())
    call("Prefill", ask_of(key_of(1, decode_epoch=1)).message())
    call("Hello", replace(HELLO, epoch=4).message())
    assert sorted(engine.decodes) == [1, 3, 4]


def test_a_prompt_is_accepted_once_however_often_it_is_asked(stub: KvHandoffServiceStub, engine: FakeEngine) -> None:
    greet(stub)
    ask = ask_of(key_of(1))
    first, second = (stub.Prefill(ask.message(), timeout=DEADLINE_S) for _ in range(2))
    assert first == second == pb.PrefillResponse(expected_s=1.5, load=Load(8, 0.25, 100).message())
    assert engine.asks == {ask.key: ask}


def test_a_prompt_that_has_no_room_is_refused_with_the_number(stub: KvHandoffServiceStub) -> None:
    greet(stub)
    code, message = failure(stub.Prefill, ask_of(key_of(1), tenant="full").message())
    assert code is CODE.RESOURCE_EXHAUSTED and "max_transfers=8" in message


@pytest.mark.parametrize(
    ("field", "changes"),
    [("token_ids", {"token_ids": [1] * 68}), ("token_ids", {"token_ids": [1] * 6}), ("lease_s", {"lease_s": 30.5})],
)
def test_a_prompt_outside_this_engines_limits_is_refused(
    stub: KvHandoffServiceStub, engine: FakeEngine, field: str, changes: dict[str, Any]
) -> None:
    greet(stub)
    code, message = failure(stub.Prefill, ask_of(key_of(1), first_block=0, **changes).message())
    assert code is CODE.INVALID_ARGUMENT and message.startswith(field)
    assert not engine.asks


@pytest.mark.parametrize("key", [key_of(1, decode_epoch=6), key_of(1, prefill_epoch=6)], ids=["decode", "prefill"])
def test_who_has_not_said_hello_to_this_epoch_is_not_known(
    stub: KvHandoffServiceStub, engine: FakeEngine, key: Any
) -> None:
    greet(stub)
    one = key.message()
    for method, request in (
        (stub.Prefill, ask_of(key).message()),
        (stub.Renew, pb.RenewRequest(keys=[key_of(2).message(), one], lease_s=1)),
        (stub.Commit, pb.CommitRequest(key=one)),
        (stub.Query, pb.QueryRequest(keys=[one])),
    ):
        assert failure(method, request)[0] is CODE.NOT_FOUND
    stub.AbortTransfer(pb.AbortTransferRequest(key=one), timeout=DEADLINE_S)
    assert +engine.calls == {"hello": 1}


def test_transfers_of_one_host_are_nothing_to_another(service: HandoffService, engine: FakeEngine) -> None:
    service.answer("Hello", HELLO.message(), "unix:").result(DEADLINE_S)
    service.answer("Prefill", ask_of(key_of(1)).message(), "unix:").result(DEADLINE_S)
    there, abort = "ipv4:192.0.2.1:9", pb.AbortTransferRequest(key=key_of(1).message())
    with pytest.raises(HeadwiseError, match="epoch"):
        service.answer("Commit", pb.CommitRequest(key=key_of(1).message()), there).result(DEADLINE_S)
    service.answer("AbortTransfer", abort, there).result(DEADLINE_S)
    assert engine.calls["commit"] == engine.calls["abort"] == 0


def test_leases_are_renewed_in_a_batch(stub: KvHandoffServiceStub, engine: FakeEngine) -> None:
    greet(stub)
    keys = [key_of(number) for number in range(1, 5)]
    engine.statuses_of = {keys[1]: Status(State.PUSHED), keys[3]: Status(State.FAILED, "no\nluck")}
    request = pb.RenewRequest(keys=[key.message() for key in keys], lease_s=30)
    response = stub.Renew(request, timeout=DEADLINE_S)
    expected = [State.UNKNOWN, State.PUSHED, State.UNKNOWN, State.FAILED]
    assert [status.state for status in response.statuses] == expected
    assert response.statuses[3].reason == "no?luck"
    assert engine.batches == [keys]
    query = pb.QueryRequest(keys=[key.message() for key in keys])
    assert stub.Query(query, timeout=DEADLINE_S).statuses == response.statuses
    assert len(engine.batches) == 1


@pytest.mark.parametrize("lease_s", [0.0, -1.0, 30.1, float("nan"), float("inf")])
def test_a_lease_outside_the_limits_is_refused(stub: KvHandoffServiceStub, lease_s: float) -> None:
    greet(stub)
    code, message = failure(stub.Renew, pb.RenewRequest(lease_s=lease_s))
    assert code is CODE.INVALID_ARGUMENT and message.startswith("lease_s")


def test_anybody_may_ask_how_busy_the_engine_is(stub: KvHandoffServiceStub) -> None:
    response = stub.Query(pb.QueryRequest(), timeout=DEADLINE_S)
    assert response == pb.QueryResponse(epoch=EPOCH, load=Load(0, 0.25, 100).message())


def test_a_commit_is_answered_once_it_is_decided(stub: KvHandoffServiceStub, engine: FakeEngine) -> None:
    greet(stub)
    request = pb.CommitRequest(key=key_of(1).message())
    calls = [stub.Commit.future(request, timeout=DEADLINE_S) for _ in range(2)]
    wait_until(lambda: engine.calls["commit"] == 2)
    assert not any(call.done() for call in calls)
    engine.decided[key_of(1)].set_result(Status(State.COMMITTED))
    assert [call.result(DEADLINE_S).status.state for call in calls] == [State.COMMITTED] * 2
    assert stub.Commit(request, timeout=DEADLINE_S).status.state == State.COMMITTED


def test_a_commit_waits_no_longer_than_its_caller(stub: KvHandoffServiceStub, engine: FakeEngine) -> None:
    greet(stub)
    request = pb.CommitRequest(key=key_of(1).message())
    assert failure(stub.Commit, request, timeout=0.2)[0] is CODE.DEADLINE_EXCEEDED
    # More than there are threads: those whose callers have left take none.
    for most in (14, 28, 42):  # the call that was in a hurry may not have come
        calls = [stub.Commit.future(request, timeout=DEADLINE_S) for _ in range(14)]
        wait_until(lambda most=most: engine.calls["commit"] >= most)
        for call in calls:
            call.cancel()
        wait_until(lambda: answers(stub))
    engine.decided[key_of(1)].set_result(Status(State.FAILED, "not finite"))
    assert stub.Commit(request, timeout=DEADLINE_S).status.reason == "not finite"


def answers(stub: KvHandoffServiceStub) -> bool:
    try:
        stub.Query(pb.QueryRequest(), timeout=DEADLINE_S)
        return True
    except grpc.RpcError:  # as many calls are open as may be
        return False


def test_an_abort_may_come_twice_or_for_nothing(stub: KvHandoffServiceStub, engine: FakeEngine) -> None:
    greet(stub)
    stub.Prefill(ask_of(key_of(1)).message(), timeout=DEADLINE_S)
    for _ in range(2):
        request = pb.AbortTransferRequest(key=key_of(1).message(), reason="gone")
        assert stub.AbortTransfer(request, timeout=DEADLINE_S) == pb.AbortTransferResponse()
    assert engine.statuses_of[key_of(1)] == Status(State.FAILED, "gone")
    assert failure(stub.AbortTransfer, pb.AbortTransferRequest())[0] is CODE.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("error", "code"),
    [(HeadwiseError("node and file"), CODE.UNAVAILABLE), (RuntimeError("a prompt"), CODE.INTERNAL)],
)
def test_how_an_engine_ended_is_no_peers_business(
    error: Exception, code: grpc.StatusCode, caplog: pytest.LogCaptureFixture
) -> None:
    def run(function: Any, /) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(error)
        return future

    server = TcpServer(HandoffService(about(), run))
    try:
        with grpc.insecure_channel(server.address) as channel, caplog.at_level(logging.DEBUG):
            stub = KvHandoffServiceStub(channel)
            for method, request in (
                (stub.Hello, HELLO.message()),
                (stub.Commit, pb.CommitRequest(key=key_of(1).message())),
            ):
                found, message = failure(method, request)
                assert found is code
                assert "node" not in message + caplog.text and "prompt" not in message + caplog.text
    finally:
        server.close()


def test_no_secret_is_told_or_logged(stub: KvHandoffServiceStub, caplog: pytest.LogCaptureFixture) -> None:
    greet(stub)
    with caplog.at_level(logging.DEBUG):
        told = []
        for changes in ({"tenant": "full"}, {"owner": bytes(300)}, {"token_ids": [771177] * 5}, {"first_block": 9}):
            told.append(failure(stub.Prefill, ask_of(key_of(1), **changes).message())[1])
        told.append(failure(stub.Prefill, ask_of(key_of(1, prefill_epoch=1)).message())[1])
    for text in [*told, caplog.text]:
        assert "771177" not in text and "nobody" not in text


def test_a_new_epoch_does_not_know_the_one_before(
    stub: KvHandoffServiceStub, service: HandoffService, engine: FakeEngine
) -> None:
    greet(stub)
    service.about = about(epoch=EPOCH + 1)
    assert failure(stub.Prefill, ask_of(key_of(1)).message())[0] is CODE.NOT_FOUND
    assert greet(stub).epoch == EPOCH + 1
    stub.Prefill(ask_of(key_of(1, prefill_epoch=EPOCH + 1)).message(), timeout=DEADLINE_S)


VALID = [
    HELLO.message(),
    ask_of(key_of(1)).message(),
    pb.RenewRequest(keys=[key_of(1).message()], lease_s=1),
    pb.CommitRequest(key=key_of(2).message()),
    pb.AbortTransferRequest(key=key_of(1).message(), reason="why"),
    pb.QueryRequest(keys=[key_of(1).message()]),
]
LISTED = {
    *(CODE.OK, CODE.INVALID_ARGUMENT, CODE.NOT_FOUND, CODE.FAILED_PRECONDITION),
    CODE.DEADLINE_EXCEEDED,  # a Commit that is not decided
    CODE.INTERNAL,  # bytes that are no message
}


@given(method=st.integers(0, 5), sent=st.integers(0, 5), data=st.data())
@examples(300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_server_lives_through_any_bytes(local: LocalServer, method: int, sent: int, data: st.DataObject) -> None:
    message = bytearray(VALID[sent].SerializeToString())
    for at in data.draw(st.lists(st.integers(0, len(message) - 1), max_size=4)):
        message[at] = data.draw(st.integers(0, 255))
    raw = bytes(message) + data.draw(st.binary(max_size=8))
    with grpc.insecure_channel(local.address) as channel:
        call = channel.unary_unary(f"/headwise.v1.KvHandoffService/{METHODS[method]}")
        is_commit = METHODS[method] == "Commit"
        answer = call.future(raw, timeout=0.05 if is_commit else DEADLINE_S)
        error = answer.exception(DEADLINE_S)
        assert answer.code() in LISTED
        assert (answer.code() is CODE.INTERNAL) == (not parses(METHODS[method], raw))
        if error is not None:
            assert "771177" not in error.details() and "nobody" not in error.details()
        assert answers(KvHandoffServiceStub(channel))


def parses(method: str, raw: bytes) -> bool:
    kind = getattr(pb, f"{method}Request")
    try:
        kind.FromString(raw)
    except Exception:
        return False
    return True


def test_the_socket_of_a_program_is_its_users_alone(service: HandoffService) -> None:
    server = LocalServer(service)
    folder = Path(server.address.removeprefix("unix:")).parent
    assert folder.name.startswith("headwise-")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and folder.stat().st_uid == os.getuid()
    server.close()
    assert not folder.exists()
    server.close()


def test_a_server_that_is_closed_waits_for_no_engine(engine: FakeEngine, service: HandoffService) -> None:
    before = set(threading.enumerate())
    server = LocalServer(service)
    with grpc.insecure_channel(server.address) as channel:
        stub = KvHandoffServiceStub(channel)
        greet(stub)
        undecided = stub.Commit.future(pb.CommitRequest(key=key_of(1).message()), timeout=DEADLINE_S)
        wait_until(lambda: engine.calls["commit"])
        engine.going.clear()
        stuck = stub.Query.future(pb.QueryRequest(), timeout=DEADLINE_S)
        started = time.monotonic()
        server.close()
        assert time.monotonic() - started < 2.0
        for call in (undecided, stuck):
            assert call.exception(DEADLINE_S).code() in (CODE.UNAVAILABLE, CODE.CANCELLED)
    engine.going.set()
    wait_until(lambda: not [one for one in set(threading.enumerate()) - before if "fake-engine" not in one.name])


@pytest.mark.parametrize("long", [True, False])
def test_a_long_tmpdir_is_not_in_the_way(
    service: HandoffService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long: bool
) -> None:
    folder = tmp_path / ("x" * 100 if long else "x")
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    server = LocalServer(service)
    assert server.address.startswith("unix:/tmp/headwise-" if long else f"unix:{folder}")
    server.close()


def test_the_server_of_a_program_may_be_closed_by_a_call_that_it_answers(engine: FakeEngine) -> None:
    """As where a forgotten LLM is collected there."""
    closed = threading.Event()
    servers: list[LocalServer] = []

    def close(function: Any) -> Future[Any]:
        servers[0].close()
        closed.set()
        return engine.run(function)

    servers.append(LocalServer(HandoffService(about(), close)))
    with grpc.insecure_channel(servers[0].address) as channel:
        failure(KvHandoffServiceStub(channel).Hello, HELLO.message())
    assert closed.wait(DEADLINE_S)
    servers[0].close()
