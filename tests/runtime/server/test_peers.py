"""Who may have KV handed over: peers, and what a peer may do beside that."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from headwise.runtime import SamplingParams
from headwise.runtime.client import AsyncClient, ServerError
from headwise.runtime.engine.generation import Generation
from headwise.runtime.handoff.link import Answer, PrefillLink
from headwise.runtime.handoff.messages import State, Status
from headwise.runtime.handoff.service import HandoffService
from headwise.runtime.server.auth import Tenant, check_method, read_tokens
from headwise.runtime.server.errors import PermissionDeniedError
from headwise.v1 import inference_pb2 as pb
from headwise.v1 import kv_transfer_pb2
from headwise.v1.kv_transfer_pb2_grpc import KvHandoffServiceStub
from tests.runtime.handoff.conftest import HELLO, FakeEngine, about, ask_of, key_of, wait_until
from tests.runtime.server.conftest import DEADLINE_S, Running

Serve = Callable[..., Running]
CODE = grpc.StatusCode
ALICE, DECODE, OPS = "alice-0123456789abcdef", "decode-0123456789abcdef", "ops-0123456789abcdef"
SERVICE = "headwise.v1.KvHandoffService"


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"alice {ALICE}\ndecode-1 {DECODE} peer\nops {OPS} admin\n")
    return path


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine()
    yield engine
    engine.close()


@pytest.fixture
def handoff(engine: FakeEngine) -> HandoffService:
    return HandoffService(about(), engine.run)


@pytest.fixture
def link() -> Iterator[Callable[..., PrefillLink]]:
    made: list[PrefillLink] = []

    def make(address: str, token: str | None = None, credentials: grpc.ChannelCredentials | None = None) -> PrefillLink:
        made.append(PrefillLink(address, HELLO, credentials, token, lambda: None))
        return made[-1]

    yield make
    for one in made:
        one.close()


def refused(link: PrefillLink) -> str:
    wait_until(lambda: link.problem)
    assert link.session is None
    return str(link.problem)


def committed(link: PrefillLink, engine: FakeEngine) -> Answer:
    answers: list[Answer] = []
    link.ask(ask_of(key_of(1)), answers.append)
    link.commit(key_of(1), answers.append)
    wait_until(lambda: key_of(1) in engine.decided)
    engine.decided[key_of(1)].set_result(Status(State.COMMITTED))
    wait_until(lambda: len(answers) == 2)
    assert key_of(1) in engine.asks
    return answers[1]


def test_a_token_file_names_peers(token_file: Path, tmp_path: Path) -> None:
    tokens = read_tokens(token_file)
    assert tokens.tenant([("authorization", f"Bearer {DECODE}")]) == Tenant("decode-1", peer=True)
    assert tokens.tenant([("authorization", f"Bearer {OPS}")]) == Tenant("ops", admin=True)


@pytest.mark.parametrize(
    ("tenant", "handoff", "events", "others"),
    [
        (Tenant("a"), False, True, True),
        (Tenant("a", admin=True), False, True, True),
        (Tenant("a", peer=True), True, True, False),
        (Tenant("a", admin=True, peer=True), True, True, True),
    ],
)
def test_which_methods_are_for_whom(tenant: Tenant, handoff: bool, events: bool, others: bool) -> None:
    def may(method: str) -> bool:
        try:
            check_method(tenant, method)
        except PermissionDeniedError:
            return False
        return True

    assert may(f"/{SERVICE}/Hello") is may(f"/{SERVICE}/Commit") is handoff
    assert may("/headwise.v1.InferenceService/SubscribeKvEvents") is events  # which else asks for an admin
    assert may("/headwise.v1.InferenceService/Generate") is may("/headwise.v1.InferenceService/Drain") is others
    assert may("/vllm.grpc.engine.VllmEngine/Generate") is others


def test_everybody_on_loopback_is_a_peer(
    serve: Serve, handoff: HandoffService, engine: FakeEngine, link: Callable[..., PrefillLink]
) -> None:
    running = serve(service=handoff)
    one = link(running.address)
    wait_until(lambda: one.session)
    assert committed(one, engine).status == Status(State.COMMITTED)
    with running.client() as client:
        client.generate([5] * 40, SamplingParams(max_tokens=1, ignore_eos=True))
    wait_until(lambda: one.digests)  # the KV events of the server's own engine


def test_only_a_peers_token_hands_over(
    serve: Serve, handoff: HandoffService, engine: FakeEngine, link: Callable[..., PrefillLink], token_file: Path
) -> None:
    running = serve(options={"token_file": token_file}, service=handoff)
    for token, code in (
        (ALICE, "PERMISSION_DENIED"),
        (OPS, "PERMISSION_DENIED"),
        (None, "UNAUTHENTICATED"),
        ("x" * 20, "UNAUTHENTICATED"),
    ):
        assert code in refused(link(running.address, token))
    assert not engine.calls
    one = link(running.address, DECODE)
    wait_until(lambda: one.session)
    assert committed(one, engine).status == Status(State.COMMITTED)


def test_a_peer_does_nothing_else(serve: Serve, handoff: HandoffService, token_file: Path) -> None:
    running = serve(options={"token_file": token_file}, service=handoff)
    with running.client(token=DECODE) as peer:
        calls: list[Callable[[], Any]] = [
            lambda: peer.generate([5, 6], SamplingParams(max_tokens=1)),
            lambda: peer.tokenize("a"),
            lambda: peer.detokenize([1]),
            lambda: peer.abort("alice/1"),
            peer.model,
            peer.stats,
            peer.drain,
        ]
        for call in calls:
            with pytest.raises(ServerError) as error:
                call()
            assert error.value.code is CODE.PERMISSION_DENIED

    async def first_event() -> pb.SubscribeKvEventsResponse:
        async with AsyncClient(running.address, token=DECODE) as client, aclosing(client.kv_events()) as events:
            return await anext(events)

    assert asyncio.run(first_event()).HasField("snapshot")


def test_a_peer_is_named_by_the_certificate(
    serve: Serve, handoff: HandoffService, engine: FakeEngine, link: Callable[..., PrefillLink], certificates: Path
) -> None:
    both = certificates / "both-ca.pem"
    both.write_text((certificates / "good-ca.pem").read_text() + (certificates / "other-ca.pem").read_text())
    tls = {"tls_cert": certificates / "good.pem", "tls_key": certificates / "good.key", "tls_client_ca": both}
    running = serve(options=tls | {"peers": ("other",)}, service=handoff)

    def files(*names: str) -> list[bytes]:
        return [(certificates / name).read_bytes() for name in names]

    def of(name: str) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(*files("good-ca.pem", f"{name}.key", f"{name}.pem"))

    assert "PERMISSION_DENIED" in refused(link(running.address, credentials=of("good")))
    one = link(running.address, credentials=of("other"))
    wait_until(lambda: one.session)
    assert committed(one, engine).cause is None


def test_strangers_on_a_public_host_are_no_peers(
    serve: Serve, handoff: HandoffService, link: Callable[..., PrefillLink]
) -> None:
    running = serve(options={"host": "0.0.0.0", "insecure": True}, service=handoff)
    port = running.address.rpartition(":")[2]
    assert "PERMISSION_DENIED" in refused(link(f"127.0.0.1:{port}"))


def test_statuses_are_those_of_a_handoff(serve: Serve, handoff: HandoffService, engine: FakeEngine) -> None:
    running = serve(service=handoff)
    with grpc.insecure_channel(running.address) as channel:
        stub = KvHandoffServiceStub(channel)

        def failure(method: Any, request: Any, timeout: float = DEADLINE_S) -> tuple[grpc.StatusCode, str]:
            with pytest.raises(grpc.RpcError) as error:
                method(request, timeout=timeout)
            return error.value.code(), error.value.details()  # type: ignore[attr-defined]

        def prefill(**changes: Any) -> tuple[grpc.StatusCode, str]:
            return failure(stub.Prefill, ask_of(key_of(1), **changes).message())

        assert prefill()[0] is CODE.NOT_FOUND
        hello = HELLO.message()
        stub.Hello(hello, timeout=DEADLINE_S)
        hello.identity.dtype = "bfloat16"
        code, message = failure(stub.Hello, hello)
        assert code is CODE.FAILED_PRECONDITION and message.startswith("dtype: ")
        code, message = prefill(tenant="full")
        assert code is CODE.RESOURCE_EXHAUSTED and "max_transfers=8" in message
        code, message = prefill(first_block=5)
        assert code is CODE.INVALID_ARGUMENT and message.startswith("first_block")
        commit = kv_transfer_pb2.CommitRequest(key=key_of(1).message())
        assert failure(stub.Commit, commit, timeout=0.2)[0] is CODE.DEADLINE_EXCEEDED
        calls = [stub.Commit.future(commit, timeout=DEADLINE_S) for _ in range(50)]
        wait_until(lambda: engine.calls["commit"] == 51)
        stub.Query(kv_transfer_pb2.QueryRequest(), timeout=DEADLINE_S)  # none of those is in the way
        engine.decided[key_of(1)].set_result(Status(State.COMMITTED))
        assert all(call.result(DEADLINE_S).status.state == State.COMMITTED for call in calls)


def test_the_service_is_named_only_where_it_is(serve: Serve, handoff: HandoffService) -> None:
    for one, there in ((serve(service=handoff), True), (serve(), False)):
        with grpc.insecure_channel(one.address) as channel:
            assert (SERVICE in ProtoReflectionDescriptorDatabase(channel).get_services()) is there
            health = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service=SERVICE)
            if there:
                assert health.Check(request, timeout=DEADLINE_S).status == health_pb2.HealthCheckResponse.SERVING
                continue
            with pytest.raises(grpc.RpcError) as error:
                KvHandoffServiceStub(channel).Hello(HELLO.message(), timeout=DEADLINE_S)
            assert error.value.code() is CODE.UNIMPLEMENTED  # type: ignore[attr-defined]


def test_a_server_that_drains_takes_no_prompt_and_lets_transfers_end(
    serve: Serve, handoff: HandoffService, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = serve(service=handoff)
    with grpc.insecure_channel(running.address) as channel, running.client() as client:
        stub = KvHandoffServiceStub(channel)
        stub.Hello(HELLO.message(), timeout=DEADLINE_S)
        stub.Prefill(ask_of(key_of(1)).message(), timeout=DEADLINE_S)
        stream = client.stream([5] * 4, SamplingParams(max_tokens=400, ignore_eos=True))
        next(stream)  # keeps the server from ending
        asked = threading.Event()
        drain = running.server.sessions.drain
        running.loop.call_soon_threadsafe(lambda: (drain(), asked.set()))
        assert asked.wait(DEADLINE_S)
        for method, request in ((stub.Hello, HELLO.message()), (stub.Prefill, ask_of(key_of(2)).message())):
            with pytest.raises(grpc.RpcError) as error:
                method(request, timeout=DEADLINE_S)
            assert error.value.code() is CODE.UNAVAILABLE  # type: ignore[attr-defined]
        renew = kv_transfer_pb2.RenewRequest(keys=[key_of(1).message()], lease_s=1)
        assert stub.Renew(renew, timeout=DEADLINE_S).statuses[0].state == State.COMPUTING
        stream.close()
    assert running.end() == 0


def test_a_server_that_stops_waits_until_prompts_are_handed_over(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    running, over, looks = serve(), threading.Event(), threading.Semaphore(0)

    def handing_over(generation: Generation) -> bool:
        if running.server.sessions.draining:
            looks.release()
        return not over.is_set()

    monkeypatch.setattr(Generation, "handing_over", property(handing_over))
    running.stop()
    try:
        for _ in range(10):  # by the engine and by the server
            assert looks.acquire(timeout=DEADLINE_S)
        assert not running.exit_code.done()
    finally:
        over.set()
    assert running.exit_code.result(DEADLINE_S) == 0
