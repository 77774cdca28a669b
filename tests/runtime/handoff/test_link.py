"""A link finds its peer, keeps leases alive, notices when the peer is lost, and says what came of each call."""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from headwise.runtime.handoff import link as link_module
from headwise.runtime.handoff.link import Answer, PrefillLink
from headwise.runtime.handoff.local import LocalServer
from headwise.runtime.handoff.messages import Ask, Load, State, Status, TransferKey
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
    TcpServer,
    about,
    ask_of,
    key_of,
    wait_until,
)

MakeLink = Callable[..., PrefillLink]
Serve = Callable[..., TcpServer]
TOKEN = "token-0123456789abcdef"
ROOT = Path(__file__).parents[3]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renews and tries again within a moment."""
    monkeypatch.setattr(link_module, "RENEW_S", 0.03)
    monkeypatch.setattr(link_module, "BACKOFF_S", 0.01)
    monkeypatch.setattr(link_module, "MAX_BACKOFF_S", 0.05)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "CALL_TIMEOUT_S", 0.3)
    monkeypatch.setattr(link_module, "COMMIT_TIMEOUT_S", 0.3)


def connected(link: PrefillLink) -> PrefillLink:
    wait_until(lambda: link.session)
    assert link.problem is None
    return link


def ask(link: PrefillLink, what: Ask) -> Answer:
    answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    link.ask(what, answers.put)
    return answers.get(timeout=DEADLINE_S)


def commit(link: PrefillLink, key: TransferKey) -> Answer:
    answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    link.commit(key, answers.put)
    return answers.get(timeout=DEADLINE_S)


class Renewals:
    """What a link told of transfers."""

    def __init__(self) -> None:
        self.told: queue.SimpleQueue[tuple[TransferKey, Status | None]] = queue.SimpleQueue()

    def __call__(self, key: TransferKey, status: Status | None) -> None:
        self.told.put((key, status))

    def next(self) -> tuple[TransferKey, Status | None]:
        return self.told.get(timeout=DEADLINE_S)

    def until(self, key: TransferKey, status: Status | None) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while self.next() != (key, status):
            assert time.monotonic() < deadline


# Meeting


def test_a_link_meets_an_engine_of_the_same_program(local: LocalServer, engine: FakeEngine, link: MakeLink) -> None:
    changes: queue.SimpleQueue[None] = queue.SimpleQueue()
    one = link(local.address, on_change=lambda: changes.put(None))
    changes.get(timeout=DEADLINE_S)
    assert one.session == about(version=1, load=Load(0, 0.25, 100))
    assert (one.name, one.problem, one.load, one.digests) == (local.address, None, one.session.load, set())
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


# Leases


@pytest.mark.usefixtures("quick")
def test_leases_are_renewed_in_one_batch(local: LocalServer, engine: FakeEngine, link: MakeLink) -> None:
    one = connected(link(local.address))
    keys, renewals = [key_of(number) for number in range(1, 4)], Renewals()
    for key in keys:
        assert ask(one, ask_of(key)).cause is None
    for key in keys:
        one.track(key, renewals)
    wait_until(lambda: keys in engine.batches)
    for key in keys:
        renewals.until(key, Status(State.COMPUTING))
    engine.statuses_of[keys[0]] = Status(State.PUSHED)
    renewals.until(keys[0], Status(State.PUSHED))
    one.untrack(keys[0])
    wait_until(lambda: engine.batches[-1] == keys[1:])
    del engine.statuses_of[keys[1]]
    renewals.until(keys[1], Status(State.UNKNOWN))
    wait_until(lambda: engine.batches[-1] == keys[2:])


@pytest.mark.usefixtures("quick")
def test_more_leases_than_a_message_holds_are_renewed(
    local: LocalServer, engine: FakeEngine, link: MakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "MAX_KEYS", 2)
    one = connected(link(local.address))
    keys = [key_of(number) for number in range(1, 6)]
    engine.statuses_of = {key: Status(State.COMPUTING) for key in keys}
    for key in keys:
        one.track(key, lambda key, status: None)
    wait_until(lambda: {key for batch in engine.batches[-3:] for key in batch} == {*keys})
    assert all(len(batch) <= 2 for batch in engine.batches)


@pytest.mark.usefixtures("quick", "impatient")
def test_a_peer_that_does_not_answer_is_given_up_and_met_again(
    local: LocalServer, engine: FakeEngine, link: MakeLink
) -> None:
    one, renewals, key = connected(link(local.address)), Renewals(), key_of(1)
    engine.statuses_of[key] = Status(State.COMPUTING)
    one.track(key, renewals)
    renewals.until(key, Status(State.COMPUTING))
    engine.going.clear()
    renewals.until(key, None)
    assert one.session is None and "DEADLINE_EXCEEDED" in str(one.problem)
    engine.going.set()
    connected(one)
    renewals.until(key, Status(State.COMPUTING))


@pytest.mark.usefixtures("quick", "impatient")
def test_a_peer_without_transfers_is_watched_too(local: LocalServer, engine: FakeEngine, link: MakeLink) -> None:
    one = connected(link(local.address))
    engine.asks[key_of(9)] = ask_of(key_of(9))
    wait_until(lambda: one.load == Load(8, 0.25, 100))
    engine.going.clear()
    wait_until(lambda: one.session is None)


@pytest.mark.usefixtures("quick")
def test_a_peer_that_has_restarted_does_not_know_its_old_transfers(
    serve: Serve, service: HandoffService, engine: FakeEngine, link: MakeLink
) -> None:
    server = serve(service)
    one, renewals, old = connected(link(server.address)), Renewals(), key_of(1)
    assert ask(one, ask_of(old)).cause is None
    one.track(old, renewals)
    renewals.until(old, Status(State.COMPUTING))
    server.close()
    renewals.until(old, None)
    wait_until(lambda: one.session is None)
    assert ask(one, ask_of(old)).cause == Cause.UNREACHABLE
    again = FakeEngine()
    try:
        serve(HandoffService(about(epoch=EPOCH + 1), again.run), server.port)
        connected(one)
        told = renewals.next()
        while told[1] is None:
            told = renewals.next()
        assert told[1].state is State.UNKNOWN and "epoch" in told[1].reason
        assert one.session is not None and one.session.epoch == EPOCH + 1
        assert ask(one, ask_of(old)).cause == Cause.PEER
        connected(one)
        assert ask(one, ask_of(key_of(1, prefill_epoch=EPOCH + 1))).cause is None
    finally:
        again.close()


@pytest.mark.usefixtures("quick")
def test_a_new_epoch_of_the_same_server_is_noticed(local: LocalServer, service: HandoffService, link: MakeLink) -> None:
    one = connected(link(local.address))
    service.about = about(epoch=EPOCH + 1)
    wait_until(lambda: one.session is not None and one.session.epoch == EPOCH + 1)


@pytest.mark.usefixtures("quick")
def test_an_engine_that_was_forgotten_says_hello_again(
    local: LocalServer, service: HandoffService, engine: FakeEngine, link: MakeLink
) -> None:
    one, renewals, key = connected(link(local.address)), Renewals(), key_of(1)
    assert ask(one, ask_of(key)).cause is None
    one.track(key, renewals)
    renewals.until(key, Status(State.COMPUTING))
    engine.run(lambda outbound: service._decodes.clear()).result(DEADLINE_S)
    wait_until(lambda: engine.calls["hello"] == 2)
    renewals.until(key, None)
    renewals.until(key, Status(State.COMPUTING))


@contextmanager
def another_process() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A peer that can be stopped and killed, and its address."""
    command = [sys.executable, "-m", "tests.runtime.handoff.stopped_peer"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


@pytest.mark.usefixtures("quick", "impatient")
def test_a_stopped_peer_holds_up_nobody(link: MakeLink) -> None:
    with another_process() as (process, address):
        one, renewals, key = connected(link(address)), Renewals(), key_of(1)
        assert ask(one, ask_of(key)).cause is None
        one.track(key, renewals)
        renewals.until(key, Status(State.COMPUTING))
        process.send_signal(signal.SIGSTOP)
        assert ask(one, ask_of(key_of(2))).cause == Cause.UNREACHABLE
        renewals.until(key, None)
        process.send_signal(signal.SIGCONT)
        renewals.until(key, Status(State.COMPUTING))
        process.send_signal(signal.SIGSTOP)
        answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        one.commit(key, answers.put)
        started = time.monotonic()
        one.close()
        assert time.monotonic() - started < 1.0
        assert answers.get(timeout=DEADLINE_S).cause in (Cause.CANCELLED, Cause.UNREACHABLE)


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
