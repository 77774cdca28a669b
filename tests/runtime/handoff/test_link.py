"""A link finds its peer, says what came of each call, and leaves nothing when it is closed."""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from headwise.runtime.handoff import link as link_module
from headwise.runtime.handoff.link import OWN_PREFILL, Answer, PrefillLink
from headwise.runtime.handoff.local import LocalServer
from headwise.runtime.handoff.messages import Ask, Load, State, Status
from headwise.runtime.handoff.receiving import Cause
from headwise.runtime.handoff.service import HandoffService
from headwise.v1 import kv_transfer_pb2 as pb
from headwise.v1.kv_transfer_pb2_grpc import KvHandoffServiceServicer
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.handoff import KvEndpoint
from tests.runtime.handoff.conftest import (
    DEADLINE_S,
    EPOCH,
    HELLO,
    IDENTITY,
    FakeEngine,
    Renewals,
    TcpServer,
    about,
    ask,
    ask_of,
    commit,
    connected,
    key_of,
    wait_until,
)

MakeLink = Callable[..., PrefillLink]
Serve = Callable[..., TcpServer]
TOKEN = "token-0123456789abcdef"


# Meeting


def test_a_link_meets_an_engine_of_the_same_program(local: LocalServer, engine: FakeEngine, link: MakeLink) -> None:
    changes: queue.SimpleQueue[None] = queue.SimpleQueue()
    one = link(local.address, on_change=lambda: changes.put(None))
    changes.get(timeout=DEADLINE_S)
    assert one.session == about(version=1, load=Load(0, 0.25, 100))
    assert (one.name, one.problem, one.load, one.digests) == (OWN_PREFILL, None, one.session.load, set())
    assert engine.decodes[HELLO.epoch] == HELLO.endpoints


def test_a_link_meets_an_engine_by_tls(
    serve: Serve, service: HandoffService, link: MakeLink, authority: Any, certificates: Path
) -> None:
    server = serve(service, credentials=authority[0])
    connected(link(server.address, credentials=authority[1]))
    foreign = grpc.ssl_channel_credentials((certificates / "other-ca.pem").read_bytes())
    stranger, clear = link(server.address, credentials=foreign), link(server.address)
    for one in (stranger, clear):
        wait_until(lambda one=one: one.problem)
        assert one.session is None and "UNAVAILABLE" in str(one.problem)


class Guard(grpc.ServerInterceptor):
    """Lets in who has the token."""

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        if ("authorization", f"Bearer {TOKEN}") in details.invocation_metadata:
            return continuation(details)

        def refuse(request: Any, context: grpc.ServicerContext) -> None:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "nobody has this token")

        return grpc.unary_unary_rpc_method_handler(refuse)


def test_a_token_is_sent_and_shown_to_nobody(
    serve: Serve, service: HandoffService, link: MakeLink, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(service, interceptors=[Guard()])
    with caplog.at_level(logging.DEBUG):
        one, stranger = link(server.address, token=TOKEN), link(server.address, token=TOKEN + "x")
        connected(one)
        wait_until(lambda: stranger.problem)
        assert stranger.problem == "UNAUTHENTICATED: nobody has this token"
        assert ask(one, ask_of(key_of(1))).cause is None
        assert ask(stranger, ask_of(key_of(2))).cause == Cause.REFUSED
        assert TOKEN not in caplog.text + repr(one) + str(one.problem)


def test_a_token_goes_in_clear_to_no_other_machine() -> None:
    with pytest.raises(InvalidValueError, match="token") as error:
        PrefillLink("192.0.2.1:5", HELLO, None, TOKEN, lambda: None)
    assert TOKEN not in str(error.value)


def test_a_link_may_be_closed_on_its_own_thread(local: LocalServer, caplog: pytest.LogCaptureFixture) -> None:
    """As where a forgotten LLM is collected there."""
    closed, made = threading.Event(), list[PrefillLink]()
    ready = threading.Event()

    def close() -> None:
        assert ready.wait(DEADLINE_S)
        made[0].close()
        closed.set()

    made.append(PrefillLink(local.address, HELLO, None, None, close))
    ready.set()
    assert closed.wait(DEADLINE_S)
    made[0].close()
    assert "failed" not in caplog.text


@pytest.mark.usefixtures("quick")
def test_an_engine_that_comes_later_is_met(serve: Serve, service: HandoffService, link: MakeLink) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    one = link(f"127.0.0.1:{port}")
    wait_until(lambda: one.problem)
    assert one.session is None and "UNAVAILABLE" in str(one.problem)
    serve(service, port)
    connected(one)


class Busy(KvHandoffServiceServicer):
    """Turns everybody away."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def Hello(self, request: pb.HelloRequest, context: grpc.ServicerContext) -> pb.HelloResponse:
        self.times.append(time.monotonic())
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many")


def test_hello_is_said_less_and_less_often(serve: Serve, link: MakeLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "BACKOFF_S", 0.02)
    monkeypatch.setattr(link_module, "MAX_BACKOFF_S", 0.1)
    busy = Busy()
    one = link(serve(busy).address)
    wait_until(lambda: len(busy.times) >= 7)
    gaps = [later - earlier for earlier, later in zip(busy.times, busy.times[1:], strict=False)]
    for gap, least in zip(gaps, (0.02, 0.04, 0.08, 0.1, 0.1, 0.1), strict=False):
        assert gap >= 0.8 * least
    assert one.problem == "RESOURCE_EXHAUSTED: too many"


def test_an_engine_that_does_not_fit_is_named_once(
    engine: FakeEngine,
    serve: Serve,
    link: MakeLink,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link_module, "MISMATCH_BACKOFF_S", 0.02)
    service = HandoffService(about(identity=replace(IDENTITY, dtype="bfloat16")), engine.run)
    calls: list[str] = []
    answer = service.answer
    monkeypatch.setattr(service, "answer", lambda method, *rest: calls.append(method) or answer(method, *rest))
    with caplog.at_level(logging.INFO):
        one = link(serve(service).address)
        wait_until(lambda: calls.count("Hello") >= 5)
        errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1 and "dtype: 'bfloat16' here, 'float32' there" in errors[0]
    assert one.session is None and "dtype" in str(one.problem)
    service.about = about()
    connected(one)


class Liar(KvHandoffServiceServicer):
    def __init__(self, response: pb.HelloResponse) -> None:
        self._response = response

    def Hello(self, request: pb.HelloRequest, context: grpc.ServicerContext) -> pb.HelloResponse:
        return self._response


@pytest.mark.parametrize(
    ("response", "problem"),
    [
        (about(identity=replace(IDENTITY, head_dim=9)).message(), "head_dim"),
        (about(identity=replace(IDENTITY, max_version=2), version=2).message(), "version"),
        (about(ranks=[(0, 2)]).message(), "ranks"),
        (pb.HelloResponse(), "identity"),
    ],
)
def test_what_a_peer_tells_is_checked_here_too(
    serve: Serve, link: MakeLink, response: pb.HelloResponse, problem: str
) -> None:
    one = link(serve(Liar(response)).address)
    wait_until(lambda: one.problem)
    assert one.session is None and problem in str(one.problem)


# Asking


def test_what_came_of_a_call_is_told(local: LocalServer, engine: FakeEngine, link: MakeLink) -> None:
    one = connected(link(local.address))
    accepted = ask(one, ask_of(key_of(1)))
    assert accepted == Answer(None, expected_s=1.5, load=Load(8, 0.25, 100)) and one.load == accepted.load
    refused = ask(one, ask_of(key_of(2), tenant="full"))
    assert refused.cause == Cause.REFUSED and "max_transfers=8" in refused.detail
    invalid = ask(one, ask_of(key_of(2), first_block=9))
    assert invalid.cause == Cause.PEER and "first_block" in invalid.detail
    assert ask(one, ask_of(key_of(2, prefill_epoch=6))).cause == Cause.PEER
    key = key_of(1)
    wait_until(lambda: one.session)  # which was in doubt
    committed: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    one.commit(key, committed.put)
    wait_until(lambda: engine.calls["commit"])
    engine.decided[key].set_result(Status(State.COMMITTED))
    assert committed.get(timeout=DEADLINE_S) == Answer(None, status=Status(State.COMMITTED))
    one.abort(key, "no\nmore")
    wait_until(lambda: engine.statuses_of[key] == Status(State.FAILED, "no?more"))
    one.close()
    assert ask(one, ask_of(key)).cause == commit(one, key).cause == Cause.CANCELLED


def test_nobody_there_is_told_at_once(link: MakeLink) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    one = link(f"127.0.0.1:{port}")
    assert ask(one, ask_of(key_of(1))).cause == Cause.UNREACHABLE


@pytest.mark.usefixtures("impatient")
def test_an_answer_that_is_lost_is_asked_for_again(local: LocalServer, engine: FakeEngine, link: MakeLink) -> None:
    one = connected(link(local.address))
    accept = engine.accept

    def slow(what: Ask) -> tuple[float, Load]:
        answer = accept(what)
        engine.going.wait(DEADLINE_S)  # the ask is in, the caller hears nothing
        return answer

    engine.accept = slow  # type: ignore[method-assign]
    engine.going.clear()
    threading.Timer(0.5, engine.going.set).start()
    engine._thread.submit(lambda: None)
    what = ask_of(key_of(1))
    assert ask(one, what).cause == Cause.UNREACHABLE
    engine.going.set()
    connected(one)
    assert ask(one, what).cause is None
    assert engine.asks == {what.key: what}
    undecided = commit(one, what.key)
    assert undecided.cause == Cause.UNREACHABLE
    engine.decided[what.key].set_result(Status(State.COMMITTED))
    connected(one)
    assert commit(one, what.key).status == Status(State.COMMITTED)


class Rubbish(Liar):
    def Prefill(self, request: pb.PrefillRequest, context: grpc.ServicerContext) -> pb.PrefillResponse:
        return pb.PrefillResponse(load=pb.Load(token_s=-1.0))

    def Commit(self, request: pb.CommitRequest, context: grpc.ServicerContext) -> pb.CommitResponse:
        return pb.CommitResponse()

    def Renew(self, request: pb.RenewRequest, context: grpc.ServicerContext) -> pb.RenewResponse:
        return pb.RenewResponse()

    def Query(self, request: pb.QueryRequest, context: grpc.ServicerContext) -> pb.QueryResponse:
        return pb.QueryResponse(epoch=EPOCH)


@pytest.mark.usefixtures("quick")
def test_rubbish_is_the_peers_fault(serve: Serve, link: MakeLink) -> None:
    one = connected(link(serve(Rubbish(about().message())).address))
    assert ask(one, ask_of(key_of(1))).cause == commit(one, key_of(1)).cause == Cause.PEER
    renewals = Renewals()
    one.track(key_of(1), renewals)
    assert renewals.next() == (key_of(1), None)


@pytest.mark.usefixtures("quick")
def test_a_callback_that_fails_ends_nothing(
    local: LocalServer, engine: FakeEngine, link: MakeLink, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*told: object) -> None:
        raise RuntimeError("at the caller's")

    one = connected(link(local.address, on_change=fail))
    one.ask(ask_of(key_of(1)), fail)
    one.track(key_of(1), fail)
    wait_until(lambda: engine.calls["renew"] >= 3)
    assert ask(one, ask_of(key_of(2))).cause is None
    assert caplog.text.count("at the caller's") >= 3


# The end


def sockets() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue
    return {one for one in found if one.startswith("socket:")}


def test_closing_leaves_no_thread_and_no_socket(serve: Serve, service: HandoffService, engine: FakeEngine) -> None:
    server = serve(service)
    threads, before = set(threading.enumerate()), sockets()
    one = connected(PrefillLink(server.address, HELLO, None, None, lambda: None))
    ours = sockets() - before
    answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    for number in range(3):
        one.commit(key_of(number), answers.put)
    wait_until(lambda: engine.calls["commit"] == 3)
    started = time.monotonic()
    one.close()
    one.close()
    assert time.monotonic() - started < 1.0
    assert [answers.get_nowait().cause for _ in range(3)] == [Cause.CANCELLED] * 3
    assert one.session is None and ours
    of_server = ("ThreadPoolExecutor", "fake-engine")
    wait_until(lambda: not [t for t in set(threading.enumerate()) - threads if not t.name.startswith(of_server)])
    wait_until(lambda: not ours & sockets())


def test_closing_does_not_wait_for_a_peer_that_never_speaks() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        one = PrefillLink(f"127.0.0.1:{silent.getsockname()[1]}", HELLO, None, None, lambda: None)
        answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        one.ask(ask_of(key_of(1)), answers.put)
        silent.settimeout(DEADLINE_S)
        connection, _ = silent.accept()
        with connection:
            started = time.monotonic()
            one.close()
            assert time.monotonic() - started < 1.0
        assert answers.get(timeout=DEADLINE_S).cause == Cause.CANCELLED


def test_an_endpoint_elsewhere_is_the_links_problem(local: LocalServer, link: MakeLink) -> None:
    one = link(local.address, hello=replace(HELLO, endpoints=[KvEndpoint((0, 3), "192.0.2.1:5")]))
    wait_until(lambda: one.problem)
    assert "INVALID_ARGUMENT: endpoints.address" in str(one.problem)
