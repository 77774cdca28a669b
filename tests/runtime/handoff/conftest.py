"""An engine that only remembers what it was asked, and the ways to reach it."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest

from headwise.runtime.handoff import link as link_module
from headwise.runtime.handoff.errors import RefusedError
from headwise.runtime.handoff.link import Answer, PrefillLink
from headwise.runtime.handoff.local import LocalServer
from headwise.runtime.handoff.messages import Ask, Hello, HelloAnswer, Identity, Load, State, Status, TransferKey
from headwise.runtime.handoff.service import HandoffService, Outbound
from headwise.v1.inference_pb2_grpc import InferenceServiceServicer, add_InferenceServiceServicer_to_server
from headwise.v1.kv_transfer_pb2_grpc import (
    KvHandoffServiceServicer,
    KvHandoffServiceStub,
    add_KvHandoffServiceServicer_to_server,
)
from headwise.workers.kv.handoff import KvEndpoint

T = TypeVar("T")
DEADLINE_S = 30.0
IDENTITY = Identity(1, 1, "a model", "float32", 4, "dense", 2, 3, 8)
EPOCH, DECODE_EPOCH = 7, 5
ENDPOINTS = [KvEndpoint((0, 2), "127.0.0.1:4001", b"host"), KvEndpoint((2, 3), "127.0.0.1:4002", b"host")]
HELLO = Hello(IDENTITY, DECODE_EPOCH, ENDPOINTS)
SECRET_TOKENS = [771177, 881188, 991199, 661166]
TICKET = b"a ticket that nobody is told of\xf0"


def about(**changes: Any) -> HelloAnswer:
    fields: dict[str, Any] = {"identity": IDENTITY, "epoch": EPOCH, "ranks": [(0, 3)], "max_tokens": 64}
    return HelloAnswer(**fields | {"max_transfers": 8} | changes)


def key_of(number: int, attempt: int = 1, decode_epoch: int = DECODE_EPOCH, prefill_epoch: int = EPOCH) -> TransferKey:
    return TransferKey(number.to_bytes(16, "big"), attempt, decode_epoch, prefill_epoch)


def ask_of(key: TransferKey, **changes: Any) -> Ask:
    fields: dict[str, Any] = {"fence": 3, "ticket": TICKET, "token_ids": SECRET_TOKENS * 2, "first_block": 1}
    fields |= {"namespace": bytes(32), "owner": b"alice", "tenant": "alice", "deadline_s": 20.0, "lease_s": 10.0}
    return Ask(key, **fields | changes)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        threading.Event().wait(0.005)


class FakeEngine(Outbound):
    """An engine with a thread, and a place for every ask but where the ask's tenant is ``full``.

    Attributes:
        calls: how often each method was called.
        statuses_of: how transfers stand.
        decided: what commits wait for; made by :meth:`commit`.
        going: while it is not set, the engine hangs.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.decodes: dict[int, list[KvEndpoint]] = {}
        self.asks: dict[TransferKey, Ask] = {}
        self.statuses_of: dict[TransferKey, Status] = {}
        self.decided: dict[TransferKey, Future[Status]] = {}
        self.batches: list[list[TransferKey]] = []
        self.going = threading.Event()
        self.going.set()
        self._thread = ThreadPoolExecutor(1, "fake-engine")

    def run(self, function: Callable[[Outbound], T], /) -> Future[T]:
        def go() -> T:
            assert self.going.wait(DEADLINE_S)
            return function(self)

        return self._thread.submit(go)

    def close(self) -> None:
        self.going.set()
        self._thread.shutdown()

    def hello(self, epoch: int, endpoints: list[KvEndpoint]) -> Load:
        self.calls["hello"] += 1
        self.decodes[epoch] = endpoints
        return self.load()

    def forget(self, epoch: int) -> None:
        self.calls["forget"] += 1
        del self.decodes[epoch]

    def accept(self, ask: Ask) -> tuple[float, Load]:
        self.calls["accept"] += 1
        if ask.tenant == "full":
            raise RefusedError("8 transfers run, max_transfers=8")
        if ask.key not in self.asks:
            self.asks[ask.key] = ask
            self.statuses_of[ask.key] = Status(State.COMPUTING)
        return 1.5, self.load()

    def renew(self, keys: list[TransferKey], lease_s: float) -> list[Status]:
        self.calls["renew"] += 1
        self.batches.append(keys)
        return self.statuses(keys)

    def statuses(self, keys: list[TransferKey]) -> list[Status]:
        return [self.statuses_of.get(key, Status(State.UNKNOWN)) for key in keys]

    def load(self) -> Load:
        return Load(len(self.asks) * 8, 0.25, 100)

    def commit(self, key: TransferKey) -> Future[Status]:
        self.calls["commit"] += 1
        return self.decided.setdefault(key, Future())

    def abort(self, key: TransferKey, reason: str) -> None:
        self.calls["abort"] += 1
        self.statuses_of[key] = Status(State.FAILED, reason)


class TcpServer:
    """A service on a TCP port of loopback, in clear text or by TLS."""

    def __init__(
        self,
        service: KvHandoffServiceServicer,
        port: int = 0,
        credentials: grpc.ServerCredentials | None = None,
        inference: InferenceServiceServicer | None = None,
        **options: Any,
    ) -> None:
        self._threads = ThreadPoolExecutor(16)
        self._server = grpc.server(self._threads, options=[("grpc.so_reuseport", 0)], **options)
        add_KvHandoffServiceServicer_to_server(service, self._server)
        if inference is not None:
            add_InferenceServiceServicer_to_server(inference, self._server)
        name = f"127.0.0.1:{port}"
        bind = self._server.add_insecure_port
        self.port = bind(name) if credentials is None else self._server.add_secure_port(name, credentials)
        self.address = f"127.0.0.1:{self.port}"
        self._server.start()

    def close(self) -> None:
        self._server.stop(None).wait(DEADLINE_S)
        self._threads.shutdown()


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


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine()
    yield engine
    engine.close()


@pytest.fixture
def service(engine: FakeEngine) -> HandoffService:
    return HandoffService(about(), engine.run)


@pytest.fixture
def local(service: HandoffService) -> Iterator[LocalServer]:
    server = LocalServer(service)
    yield server
    server.close()


@pytest.fixture
def stub(local: LocalServer) -> Iterator[KvHandoffServiceStub]:
    with grpc.insecure_channel(local.address) as channel:
        yield KvHandoffServiceStub(channel)


@pytest.fixture
def link() -> Iterator[Callable[..., PrefillLink]]:
    """Makes links, and closes them."""
    made: list[PrefillLink] = []

    def make(
        address: str,
        hello: Hello = HELLO,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> PrefillLink:
        made.append(PrefillLink(address, hello, credentials, token, on_change))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., TcpServer]]:
    """Starts servers on TCP ports, and closes them."""
    made: list[TcpServer] = []

    def make(service: KvHandoffServiceServicer, *arguments: Any, **options: Any) -> TcpServer:
        made.append(TcpServer(service, *arguments, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def authority(certificates: Path) -> tuple[grpc.ServerCredentials, grpc.ChannelCredentials]:
    """What a server and a link of one authority have."""
    files = [(certificates / f"good{end}").read_bytes() for end in (".key", ".pem", "-ca.pem")]
    return grpc.ssl_server_credentials([(files[0], files[1])]), grpc.ssl_channel_credentials(files[2])
