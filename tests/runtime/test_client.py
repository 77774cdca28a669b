"""The client's own part of a call, against a service that does as it is told."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import grpc
import psutil
import pytest

from headwise.runtime.client import Client, Increment, ServerError
from headwise.v1 import inference_pb2 as pb
from headwise.v1.inference_pb2_grpc import InferenceServiceServicer, add_InferenceServiceServicer_to_server
from headwise.workers.errors import InvalidValueError
from tests.runtime.conftest import Run

T = TypeVar("T")
Command = Callable[..., tuple[int, str, str]]
DEADLINE_S = 60.0
HELLO = pb.GenerateResponse(increment=pb.GenerateIncrement(text="hello", token_ids=[1]))


def result(reason: pb.FinishReason, error: str = "") -> pb.GenerateResponse:
    return pb.GenerateResponse(result=pb.GenerateResult(samples=[pb.SampleResult(finish_reason=reason, error=error)]))


class Service(InferenceServiceServicer):
    """Answers with ``responses``, then with ``code``, or nothing more where that is None.

    Attributes:
        asked: a call has come. left: a call's client has gone, or has all of it.
    """

    def __init__(self) -> None:
        self.responses = [HELLO]
        self.code: grpc.StatusCode | None = None
        self.asked, self.left = threading.Event(), threading.Event()
        self.metadata: dict[str, str] = {}

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        ended = threading.Event()
        context.add_callback(ended.set)
        context.add_callback(self.left.set)
        self.metadata = {key: str(value) for key, value in context.invocation_metadata()}
        self.asked.set()
        yield from self.responses
        if self.code is None:
            ended.wait(DEADLINE_S)
        elif self.code is not grpc.StatusCode.OK:
            context.abort(self.code, "as told")

    def GetModel(self, request: pb.GetModelRequest, context: grpc.ServicerContext) -> pb.GetModelResponse:
        return pb.GetModelResponse(name="told")


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def address(service: Service) -> Iterator[str]:
    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool)
        add_InferenceServiceServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        assert server.stop(0).wait(DEADLINE_S)


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    made = Client(address, timeout=DEADLINE_S)
    yield made
    on_a_thread(made.close).result(DEADLINE_S)
    assert clients_threads() == 0


def on_a_thread(work: Callable[[], T]) -> Future[T]:
    """Not a pool's: those are waited for without a deadline."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def clients_threads() -> int:
    return sum(thread.name == "headwise-client" for thread in threading.enumerate())


# Closing


@pytest.mark.parametrize("call", ["generate", "first", "next"])
def test_closing_ends_the_calls_of_other_threads(service: Service, client: Client, call: str) -> None:
    service.responses = [HELLO] if call == "next" else []
    stream = client.stream([1])
    if call == "next":
        assert isinstance(next(stream), Increment)
    waiter = on_a_thread(lambda: client.generate([1]) if call == "generate" else next(stream))
    assert service.asked.wait(DEADLINE_S)
    on_a_thread(client.close).result(DEADLINE_S)
    with pytest.raises(ServerError, match="the client is closed") as error:
        waiter.result(DEADLINE_S)
    assert error.value.code is grpc.StatusCode.UNAVAILABLE
    assert service.left.wait(DEADLINE_S)


@pytest.mark.filterwarnings("error")
def test_a_closed_client_says_so(service: Service, client: Client) -> None:
    stream, unread = client.stream([1]), client.stream([1])
    next(stream)
    client.close()
    client.close()
    assert service.left.wait(DEADLINE_S)
    for call in (lambda: next(stream), lambda: next(unread), lambda: client.generate([1]), client.model):
        with pytest.raises(ServerError, match="the client is closed") as error:
            call()
        assert error.value.code is grpc.StatusCode.UNAVAILABLE
    assert list(stream) == []
    gc.collect()  # what was never awaited would warn now


@pytest.mark.filterwarnings("error")
def test_closing_while_many_threads_call(address: str) -> None:
    for _ in range(20):
        client, busy = Client(address, timeout=DEADLINE_S), threading.Semaphore(0)

        def call(client: Client = client, busy: threading.Semaphore = busy) -> None:
            while client.model().name == "told":
                busy.release()

        callers = [on_a_thread(call) for _ in range(4)]
        assert all(busy.acquire(timeout=DEADLINE_S) for _ in callers)
        on_a_thread(client.close).result(DEADLINE_S)
        for caller in callers:
            with pytest.raises(ServerError, match="the client is closed"):
                caller.result(DEADLINE_S)
    assert clients_threads() == 0


def test_a_client_that_cannot_be_made_leaves_nothing() -> None:
    def fail() -> int:
        with pytest.raises(InvalidValueError, match="ca="):
            Client("127.0.0.1:1", ca=Path("/nowhere"))
        return psutil.Process().num_fds()

    before = fail()
    assert max(fail() for _ in range(3)) <= before
    assert clients_threads() == 0


# Leaving early


def test_the_collector_may_end_a_stream_on_the_clients_thread(service: Service, client: Client) -> None:
    ended_by: Future[str] = Future()

    class Reader:
        def __init__(self) -> None:
            self.stream = client.stream([1])
            self.me = self
            next(self.stream)

        def __del__(self) -> None:
            ended_by.set_result(threading.current_thread().name)

    gc.disable()
    try:
        Reader()
        client._loop.call_soon_threadsafe(gc.collect)
        assert ended_by.result(DEADLINE_S) == "headwise-client"
    finally:
        gc.enable()
    assert service.left.wait(DEADLINE_S)
    assert on_a_thread(client.model).result(DEADLINE_S).name == "told"


def test_leaving_a_stream_ends_its_request(service: Service, client: Client) -> None:
    for _ in client.stream([1]):
        break
    assert service.left.wait(DEADLINE_S)


def test_a_wait_that_is_interrupted_ends_its_request(
    service: Service, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Future[Any], timeout: float | None = None) -> None:
        assert service.asked.wait(DEADLINE_S)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.generate([1])
    assert service.left.wait(DEADLINE_S)


def test_a_program_may_end_in_the_middle_of_a_stream(service: Service, address: str) -> None:
    program = (
        "from headwise.runtime.client import Client\n"
        f"stream = Client({address!r}).stream([1])\n"
        "print(next(stream).text)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE_S)
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello\n", "")
    assert service.left.wait(DEADLINE_S)


def test_a_stream_without_a_result_is_an_error(service: Service, client: Client) -> None:
    service.code = grpc.StatusCode.OK
    with pytest.raises(ServerError, match="without a result"):
        client.generate([1])
    stream = client.stream([1])
    assert isinstance(next(stream), Increment)
    with pytest.raises(ServerError, match="without a result") as error:
        next(stream)
    assert error.value.code is grpc.StatusCode.INTERNAL


# The command line


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Exit code, stdout and stderr of ``headwise generate``."""
    run = Run(monkeypatch, capfd)
    return lambda *arguments: run("generate", "hi", *arguments)


def test_generate_fails_where_the_request_failed(service: Service, address: str, generate: Command) -> None:
    service.responses, service.code = [HELLO, result(pb.FINISH_REASON_STOP)], grpc.StatusCode.OK
    assert generate("--server", address) == (0, "hello\n", "")
    service.responses = [HELLO, result(pb.FINISH_REASON_ERROR, "the grammar went wrong")]
    assert generate("--server", address) == (1, "hello\n", "headwise: the grammar went wrong\n")
    code, out, err = generate("--server", address, "--json")
    assert (code, err) == (1, "headwise: the grammar went wrong\n")
    [sample] = json.loads(out)["samples"]
    assert (sample["text"], sample["finish_reason"]) == ("hello", "error")


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, 2),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 1),
        (grpc.StatusCode.UNAUTHENTICATED, 1),
    ],
)
def test_generate_exits_by_what_the_server_says(
    service: Service, address: str, generate: Command, status: grpc.StatusCode, code: int
) -> None:
    service.responses, service.code = [], status
    assert generate("--server", address) == (code, "", f"headwise: {status.name}: as told\n")


def test_generate_waits_no_longer_than_its_timeout(service: Service, address: str, generate: Command) -> None:
    started = time.monotonic()
    code, out, err = generate("--server", address, "--timeout", "0.2")
    assert (code, out) == (1, "hello") and "DEADLINE_EXCEEDED" in err and "Traceback" not in err
    assert 0.2 <= time.monotonic() - started < DEADLINE_S / 2
    assert service.left.wait(DEADLINE_S)


def test_generate_sends_no_token_in_clear_text(
    service: Service,
    address: str,
    generate: Command,
    certificate: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service.responses, service.code = [HELLO, result(pb.FINISH_REASON_STOP)], grpc.StatusCode.OK
    port = address.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost"):
        assert generate("--server", f"{host}:{port}", "--token", "a-secret-of-mine")[0] == 0
        assert service.metadata["authorization"] == "Bearer a-secret-of-mine"
    service.asked.clear()
    monkeypatch.setenv("HEADWISE_TOKEN", "a-secret-of-mine")
    # The first is this machine too, and the service would answer.
    for server in (f"0.0.0.0:{port}", "127.0.0.1.example.com:1", "[2001:db8::1]:1", "dns:///example.com:1", "[", ""):
        code, out, err = generate("--server", server)
        assert (code, out) == (2, "") and "--token=" in err and "--tls-ca" in err and "secret" not in err
    assert generate("--server", f"0.0.0.0:{port}", "--timeout", "2", "--tls-ca", str(certificate))[0] == 1
    assert not service.asked.is_set()
    monkeypatch.delenv("HEADWISE_TOKEN")
    assert generate("--server", f"0.0.0.0:{port}")[0] == 0 and "authorization" not in service.metadata


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=x -keyout key -out ca"
    subprocess.run(command.split(), check=True, capture_output=True, timeout=DEADLINE_S, cwd=tmp_path)
    return tmp_path / "ca"


def test_flags_for_servers_that_are_wrong_exit_with_2(generate: Command, tmp_path: Path) -> None:
    code, _, err = generate("--server", "127.0.0.1:1", "--tls-ca", str(tmp_path / "nowhere"))
    assert code == 2 and "--tls-ca" in err and "Traceback" not in err


def test_flags_of_the_other_way_to_generate_are_refused(
    service: Service,
    address: str,
    generate: Command,
    certificate: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for flag, value in [
        ("--model", "smollm2"),
        ("-m", "smollm2"),
        ("--tp", "1"),  # the default, but given
        ("--dtype", "auto"),
        ("--device", "cpu"),
        ("--executor", "nonsense"),
        ("--max-model-len", "100"),
        ("--kv-memory", "banana"),
        ("--cpus-per-rank", "1"),
        ("--address", "auto"),
    ]:
        wanted = (
            f"headwise: {'--model' if flag == '-m' else flag}: is for a model loaded here; leave it out with --server\n"
        )
        assert generate("--server", address, flag, value) == (2, "", wanted)
    assert not service.asked.is_set()
    for flag, value in [("--token", "a-secret-of-mine"), ("--tls-ca", str(certificate)), ("--timeout", "1")]:
        code, out, err = generate("--model", "nowhere", flag, value)
        assert (code, out) == (2, "")
        assert err == f"headwise: {flag}: is for a server; leave it out, or give --server\n"
    # Not given for this run.
    monkeypatch.setenv("HEADWISE_TOKEN", "a-secret-of-mine")
    code, _, err = generate("--model", "nowhere", "--executor", "local")
    assert code == 2 and "model='nowhere'" in err
