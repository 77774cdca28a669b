"""Clients that break the rules of HTTP/2: others are served meanwhile, and the server ends when it is told to."""

from __future__ import annotations

import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headwise.runtime import SamplingParams
from headwise.runtime.server import metrics
from headwise.runtime.server.slots import HEALTH_CALLS_OF_CONNECTION
from headwise.v1 import inference_pb2 as pb
from tests.runtime.server.conftest import DEADLINE_S, Running
from tests.runtime.server.http2 import CONTINUATION, END_STREAM, HEADERS, WINDOW_UPDATE, RawClient, frame, header
from tests.runtime.server.test_service import PROMPT, wait_until

Serve = Callable[..., Running]
Attack = Callable[[str, ExitStack], None]

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef"
SHORT = SamplingParams(max_tokens=2, ignore_eos=True)
DRAIN_S, MARGIN_S = 1.0, 4.0
SLOTS = 1 + 1 + 256
"""Of a client of a server with max_queued_requests=1 and max_num_seqs=1."""

CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
GENERATE, STATS = "/headwise.v1.InferenceService/Generate", "/headwise.v1.InferenceService/GetStats"
REQUEST = pb.GenerateRequest(
    token_ids=pb.TokenIds(ids=PROMPT), sampling_params=pb.SamplingParams(max_tokens=400, ignore_eos=True)
).SerializeToString()


def zero_window_of_a_stranger(address: str, stack: ExitStack) -> None:
    """Asks for the health more often than there are calls, and never takes a byte of an answer."""
    client = stack.enter_context(RawClient(address))
    stack.enter_context(in_background(client.until_closed))
    client.call(WATCH)
    for _ in range(SLOTS + 100):
        client.call(CHECK)


def zero_window_of_a_tenant(address: str, stack: ExitStack) -> None:
    for method, message in ((STATS, b""), (GENERATE, REQUEST)):
        client = stack.enter_context(RawClient(address))
        stack.enter_context(in_background(client.until_closed))
        for _ in range(SLOTS + 100):
            client.call(method, message, BOB)


def slow_read(address: str, stack: ExitStack) -> None:
    """Reads a byte at a time."""
    client = stack.enter_context(RawClient(address, window=1, receive_buffer=1024))
    stop = threading.Event()

    def trickle() -> None:
        while not stop.wait(0.01):
            for stream in range(1, 7, 2):
                client.send(frame(WINDOW_UPDATE, 0, stream, (1).to_bytes(4)))
            client.receive(1)

    for method, message, token in ((GENERATE, REQUEST, BOB), (WATCH, b"", ""), (STATS, b"", BOB)):
        client.call(method, message, token)
    stack.enter_context(in_background(trickle))
    stack.callback(stop.set)


def unread_refusals(address: str, stack: ExitStack) -> None:
    """Is refused more often than the server has places, on several connections, and reads not even that."""
    stop, sent = threading.Event(), threading.Semaphore(0)
    for _ in range(12):
        client = stack.enter_context(RawClient(address, receive_buffer=1024))

        def go_on(client: RawClient = client) -> None:
            while not stop.wait(0.02):
                client.call(STATS, None)
                sent.release()

        stack.enter_context(in_background(go_on))
    stack.callback(stop.set)
    for _ in range(2 * SLOTS + 1500):
        assert sent.acquire(timeout=DEADLINE_S)


def half_closed(address: str, stack: ExitStack) -> None:
    """Sends the headers of calls and no message; and calls on a connection that it closes at its end."""
    client = stack.enter_context(RawClient(address, window=1 << 20))
    stack.enter_context(in_background(client.until_closed))
    for _ in range(SLOTS + 100):
        client.call(CHECK, None, ended=False)
        client.call(STATS, None, BOB, ended=False)
    closed = stack.enter_context(RawClient(address))
    for _ in range(20):
        closed.call(CHECK)
        closed.call(GENERATE, REQUEST, BOB)
    closed.half_close()


def headers_without_end(address: str, stack: ExitStack) -> None:
    client, stop = stack.enter_context(RawClient(address)), threading.Event()
    stream = client.headers(CHECK, flags=0)

    def go_on() -> None:
        count = 0
        with suppress(OSError):  # the server has closed the connection
            while not stop.wait(0.001):
                client.send(frame(CONTINUATION, 0, stream, header(f"x-{count}", "x" * 100)))
                count += 1

    stack.enter_context(in_background(go_on))
    stack.callback(stop.set)


def silence(address: str, stack: ExitStack) -> None:
    host, _, port = address.rpartition(":")
    for _ in range(100):
        stack.enter_context(socket.create_connection((host, int(port))))


@contextmanager
def in_background(work: Callable[[], None]) -> Iterator[None]:
    """Runs ``work`` on a thread; it ends when its connection is closed, or it is told to."""

    def run() -> None:
        with suppress(OSError):
            work()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield


@pytest.mark.parametrize(
    "attack",
    [
        zero_window_of_a_stranger,
        zero_window_of_a_tenant,
        slow_read,
        unread_refusals,
        half_closed,
        headers_without_end,
        silence,
    ],
)
def test_others_are_served_and_the_server_ends(serve: Serve, tmp_path: Path, attack: Attack) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"alice {ALICE}\nbob {BOB}\n")
    options = {"token_file": path, "drain_timeout_s": DRAIN_S, "stall_timeout_s": 0.5}
    running = serve(options=options, max_queued_requests=1, max_num_seqs=1)
    with ExitStack() as stack:
        channel = stack.enter_context(grpc.insecure_channel(running.address))
        alice = stack.enter_context(running.client(token=ALICE))
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        attack(running.address, stack)
        until = time.monotonic() + 1.5  # some stall timeouts
        while time.monotonic() < until:
            answer = health.Check(health_pb2.HealthCheckRequest(), timeout=2.0)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            assert alice.stats().num_blocks
        wait_until(lambda: alice.stats().num_running == 0)  # of one who does not read, too
        assert alice.generate(PROMPT, SHORT).completion_tokens == 2
        stopped = time.monotonic()
        running.stop()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        code = running.exit_code.result(DEADLINE_S)
        assert code == 0 or (code == 1 and attack is slow_read)  # whose request may still run
        assert time.monotonic() - stopped < DRAIN_S + MARGIN_S


def test_the_end_of_a_stalled_call_can_be_read_later(serve: Serve) -> None:
    running = serve(options={"stall_timeout_s": 0.3, "metrics_port": 0})
    with RawClient(running.address) as client:
        stream = client.call(GENERATE, REQUEST)
        wait_until(lambda: 'headwise_requests_total{code="CANCELLED"} 1.0' in running.metrics())
        client.send(frame(WINDOW_UPDATE, 0, stream, (1 << 20).to_bytes(4)))
        ends = (kind for kind, flags, number, _ in client.frames() if number == stream and flags & END_STREAM)
        assert next(ends) == HEADERS


def test_the_engine_keeps_half_of_the_files(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 40))
    running = serve()
    with ExitStack() as stack:
        host, _, port = running.address.rpartition(":")
        sockets = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(30)]
        for one in sockets:
            one.settimeout(DEADLINE_S)
        with pytest.raises(ConnectionError):  # one is refused
            assert all(one.recv(9) or stop() for one in sockets)


def stop() -> None:
    raise ConnectionResetError


def test_who_says_nothing_keeps_no_thread_of_the_metrics(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "SILENCE_S", 0.2)
    running = serve(options={"metrics_port": 0})
    host, _, port = running.about["metrics"].rpartition(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as silent:
        assert silent.recv(1) == b""
    assert "headwise_engine_up 1.0" in running.metrics()


def test_a_connection_has_so_many_calls_of_the_health_service(serve: Serve) -> None:
    with grpc.insecure_channel(serve().address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        watches = [health.Watch(request, timeout=DEADLINE_S) for _ in range(HEALTH_CALLS_OF_CONNECTION)]
        for watch in watches:
            next(watch)
        for call in (lambda: next(health.Watch(request, timeout=DEADLINE_S)), lambda: health.Check(request)):
            with pytest.raises(grpc.RpcError) as error:
                call()
            assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
        watches[0].cancel()
        wait_until(lambda: answers(health))


def answers(health: health_pb2_grpc.HealthStub) -> bool:
    try:
        return bool(health.Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S))
    except grpc.RpcError:
        return False
