"""Who may come in: tokens and tenants, certificates, hosts."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from collections.abc import Callable
from contextlib import aclosing, nullcontext
from pathlib import Path
from typing import Any

import grpc
import pytest

from headwise.cluster.group import ShardGroupDied
from headwise.runtime import SamplingParams
from headwise.runtime.client import AsyncClient, Client, ServerError
from headwise.runtime.config import engine_config
from headwise.runtime.server import serve as serve_module
from headwise.runtime.server.auth import Tenant, _name, read_tokens
from headwise.runtime.server.errors import UnauthenticatedError
from headwise.runtime.server.options import ServeOptions, checked
from headwise.runtime.server.sessions import Sessions
from headwise.v1 import inference_pb2 as pb
from headwise.workers.errors import InvalidValueError
from tests.runtime.server.conftest import DEADLINE_S, Running
from tests.thread_group import ThreadShardGroup

Serve = Callable[..., Running]
ALICE, BOB, ROOT = "alice-0123456789abcdef", "bob-0123456789abcdef", "root-0123456789abcdef"
PROMPT = list(range(3, 40))
SHORT = SamplingParams(max_tokens=2, ignore_eos=True)


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"# who may\nalice {ALICE}\nbob {BOB}  # another\n\nops {ROOT} admin\n")
    return path


def test_a_token_file_is_read(token_file: Path) -> None:
    tokens = read_tokens(token_file)
    assert tokens.tenant([("authorization", f"Bearer {ALICE}")]) == Tenant("alice")
    assert tokens.tenant([("other", "x"), ("authorization", f"bearer {ROOT}")]) == Tenant("ops", admin=True)
    for metadata in (
        [],
        [("authorization", ALICE)],
        [("authorization", f"Bearer {ALICE}x")],
        [("authorization", "Bearer ")],
    ):
        with pytest.raises(UnauthenticatedError):
            tokens.tenant(metadata)
    assert ALICE not in repr(vars(tokens))


def test_a_token_may_hold_what_starts_a_comment_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"alice {ALICE}#1\nbob {BOB}#2 # no admin\n")
    tokens = read_tokens(path)
    assert tokens.tenant([("authorization", f"Bearer {ALICE}#1")]) == Tenant("alice")
    assert tokens.tenant([("authorization", f"Bearer {BOB}#2")]) == Tenant("bob")
    for cut in (ALICE, BOB):
        with pytest.raises(UnauthenticatedError):
            tokens.tenant([("authorization", f"Bearer {cut}")])


@pytest.mark.parametrize(
    "text",
    [
        f"alice #{ALICE}\n",
        f"alice {ALICE} admin#\n",
        "",
        "# nothing\n",
        "alice\n",
        f"alice {ALICE} boss\n",
        "alice short\n",
        f"alice {ALICE}\nbob {ALICE}\n",
    ],
)
def test_a_bad_token_file_is_refused_without_telling_tokens(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(InvalidValueError, match="--token-file") as error:
        read_tokens(path)
    assert ALICE not in str(error.value)


def test_tenants_share_nothing_and_see_nothing_of_each_other(serve: Serve, token_file: Path) -> None:
    running = serve(options={"token_file": token_file})
    with running.client(token=ALICE) as alice, running.client(token=BOB) as bob:
        assert alice.generate(PROMPT, SHORT).cached_tokens == 0
        assert alice.generate(PROMPT, SHORT).cached_tokens == 32
        assert bob.generate(PROMPT, SHORT).cached_tokens == 0
        for salt in ("alice", "alice\x1f", "\x1f"):
            assert bob.generate(PROMPT, SHORT, cache_salt=salt).cached_tokens == 0
        assert alice.generate(PROMPT, SHORT, cache_salt="mine").cached_tokens == 0
        stream = alice.stream(PROMPT, SamplingParams(max_tokens=300, ignore_eos=True), request_id="same")
        next(stream)
        bob.abort("same")
        bob.abort("alice/same")
        assert bob.generate(PROMPT, SHORT, request_id="same").completion_tokens == 2
        assert list(stream)[-1].completion_tokens == 300  # type: ignore[union-attr]
        assert not alice.stats().json


def test_an_admin_ends_requests_of_others_by_their_full_names(serve: Serve, token_file: Path) -> None:
    running = serve(options={"token_file": token_file})
    with running.client(token=ALICE) as alice, running.client(token=ROOT) as root:
        stream = alice.stream(PROMPT, SamplingParams(max_tokens=450, ignore_eos=True), request_id="1")
        next(stream)
        root.abort("1")
        assert root.stats().num_running == 1 and root.stats().json
        root.abort("alice/1")
        last = list(stream)[-1]
        assert last.samples[0].finish_reason == "abort"  # type: ignore[union-attr]


def test_how_the_engine_ended_is_told_to_admins_alone(
    serve: Serve, token_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def die(group: ThreadShardGroup) -> object:
        raise ShardGroupDied(1, "10.1.2.3", "of /home/ops/a.py")

    running = serve(options={"token_file": token_file}, on_shard_death="fail")
    with running.client(token=ALICE, retries=0) as alice, running.client(token=ROOT, retries=0) as root:
        long = SamplingParams(max_tokens=400, ignore_eos=True)
        streams = [client.stream(PROMPT, long) for client in (alice, root)]
        for stream in streams:
            next(stream)
        monkeypatch.setattr(ThreadShardGroup, "collect", die)
        for stream, is_told in zip(streams, (False, True), strict=True):
            with pytest.raises(ServerError) as error:
                list(stream)
            assert error.value.code is grpc.StatusCode.UNAVAILABLE
            assert ("10.1.2.3" in str(error.value)) is ("/home/ops" in str(error.value)) is is_told
    assert running.exit_code.result(DEADLINE_S) == 3
    assert "10.1.2.3" in caplog.text


def test_names_of_tenants_and_ids_do_not_run_together() -> None:
    engine_id = Sessions._engine_id
    names = {engine_id(None, Tenant("a"), "b/c"), engine_id(None, Tenant("a/b"), "c")}  # type: ignore[arg-type]
    assert len(names) == 2


@pytest.mark.parametrize("token", [None, "wrong-0123456789abcdef"])
def test_a_call_without_a_valid_token_is_refused(serve: Serve, token_file: Path, token: str | None) -> None:
    running = serve(options={"token_file": token_file})
    with running.client(token=token) as client:
        calls: list[Callable[[], Any]] = [
            lambda: client.generate(PROMPT, SHORT),
            lambda: client.tokenize("a"),
            lambda: client.detokenize([1]),
            lambda: client.abort("a"),
            client.model,
            client.stats,
            client.drain,
        ]
        for call in calls:
            with pytest.raises(ServerError) as error:
                call()
            assert error.value.code is grpc.StatusCode.UNAUTHENTICATED


def test_only_an_admin_drains_and_sees_the_blocks_of_all(serve: Serve, token_file: Path) -> None:
    running = serve(options={"token_file": token_file})
    with running.client(token=ALICE) as alice, pytest.raises(ServerError) as error:
        alice.drain()
    assert error.value.code is grpc.StatusCode.PERMISSION_DENIED

    async def first_event(token: str) -> pb.SubscribeKvEventsResponse:
        async with AsyncClient(running.address, token=token) as client, aclosing(client.kv_events()) as events:
            return await anext(events)

    with pytest.raises(ServerError) as error:
        asyncio.run(first_event(ALICE))
    assert error.value.code is grpc.StatusCode.PERMISSION_DENIED
    assert asyncio.run(first_event(ROOT)).HasField("snapshot")
    with running.client(token=ROOT) as root:
        root.drain()
    assert running.end() == 0


def test_tls_and_certificates_of_clients(serve: Serve, certificates: Path) -> None:
    tls = {"tls_cert": certificates / "good.pem", "tls_key": certificates / "good.key"}
    good, other = certificates / "good-ca.pem", certificates / "other-ca.pem"
    running = serve(options=tls)
    with running.client(ca=good) as client:
        assert client.generate(PROMPT, SHORT).completion_tokens == 2
    for options in ({"ca": other}, {"tls": True}, {}):
        with running.client(retries=0, **options) as client, pytest.raises(ServerError) as error:
            client.generate(PROMPT, SHORT, timeout=10.0)
        assert error.value.code is grpc.StatusCode.UNAVAILABLE
    mutual = serve(options=tls | {"tls_client_ca": other})
    with mutual.client(ca=good, cert=certificates / "other.pem", key=certificates / "other.key") as client:
        assert client.generate(PROMPT, SHORT).completion_tokens == 2
        assert_no_admin(client)
    with mutual.client(ca=good, retries=0) as client, pytest.raises(ServerError):
        client.generate(PROMPT, SHORT, timeout=10.0)


def assert_no_admin(client: Client) -> None:
    assert not client.stats().json
    with pytest.raises(ServerError) as error:
        client.drain()
    assert error.value.code is grpc.StatusCode.PERMISSION_DENIED


def test_an_admin_is_named_by_the_certificate(serve: Serve, certificates: Path) -> None:
    """``other`` is one tenant and an admin; ``good``, by a second authority that is trusted too, is another."""
    both = certificates / "both-ca.pem"
    both.write_text((certificates / "good-ca.pem").read_text() + (certificates / "other-ca.pem").read_text())
    tls = {"tls_cert": certificates / "good.pem", "tls_key": certificates / "good.key", "tls_client_ca": both}
    running = serve(options=tls | {"admins": ("other",)})

    def client(name: str) -> Client:
        return running.client(
            ca=certificates / "good-ca.pem", cert=certificates / f"{name}.pem", key=certificates / f"{name}.key"
        )

    with client("good") as good, client("other") as other:
        assert good.generate(PROMPT, SHORT).cached_tokens == 0
        assert other.generate(PROMPT, SHORT).cached_tokens == 0  # nothing of another tenant
        assert good.generate(PROMPT, SHORT).cached_tokens == 32
        assert_no_admin(good)
        assert other.stats().json
        other.drain()
    assert running.end() == 0


@pytest.mark.parametrize(
    ("certificate", "name"),
    [
        ({"x509_common_name": [b"ops"], "x509_subject_alternative_name": [b"a"]}, "ops"),
        ({"x509_common_name": [b""], "x509_subject_alternative_name": [b"spiffe://a/b", b"c"]}, "spiffe://a/b"),
        ({"x509_subject": [rb"CN=a\\00b"], "x509_common_name": [rb"a\00b"]}, r"a\00b"),
        ({"x509_subject": [rb"CN=ops\00evil"], "x509_common_name": [b"ops"]}, None),
        ({"x509_common_name": [b"a\x1fb"]}, None),
        ({"x509_common_name": [b"a\x1fb"], "x509_subject_alternative_name": [b"ops"]}, None),
        ({}, None),
    ],
)
def test_the_name_in_a_certificate(certificate: dict[str, list[bytes]], name: str | None) -> None:
    if name is not None:
        assert _name(certificate) == name
        return
    with pytest.raises(UnauthenticatedError):
        _name(certificate)


def test_a_name_with_a_nul_is_not_the_name_before_it(serve: Serve, certificates: Path) -> None:
    """gRPC for Python cuts it there."""
    names = {"cut": b"ops\0evil", "long": b"ops\0" + b"x" * 200, "plain": b"ops"}
    tls = {"tls_cert": certificates / "good.pem", "tls_key": certificates / "good.key"}
    running = serve(options=tls | {"tls_client_ca": certificates / "good-ca.pem", "admins": ("ops",)})
    for file, name in names.items():
        names_der = b"\x82" + _der_length(len(name)) + name
        der = b"\x30" + _der_length(len(names_der)) + names_der
        (certificates / "ext-der").write_text(f"subjectAltName=DER:{der.hex(':')}\n")
        for made in (
            f"req -new -key good.key -subj / -out {file}.csr",
            f"x509 -req -in {file}.csr -CA good-ca.pem -CAkey good-ca.key -extfile ext-der -out {file}.pem",
        ):
            subprocess.run(["openssl", *made.split()], check=True, capture_output=True, timeout=30, cwd=certificates)
        files = {"ca": "good-ca.pem", "cert": f"{file}.pem", "key": "good.key"}
        with running.client(retries=0, **{key: certificates / path for key, path in files.items()}) as client:
            if file == "plain":
                assert client.stats().json
                continue
            with pytest.raises(ServerError) as error:
                client.stats()
            assert error.value.code is grpc.StatusCode.UNAUTHENTICATED


def _der_length(length: int) -> bytes:
    return bytes([length]) if length < 128 else bytes([0x81, length])


def test_strangers_on_a_public_host_are_no_admins(serve: Serve, certificates: Path) -> None:
    tls = {"tls_cert": certificates / "good.pem", "tls_key": certificates / "good.key"}
    for options, ca in (({}, None), (tls, certificates / "good-ca.pem")):
        running = serve(options={"host": "0.0.0.0", "insecure": True} | options)
        port = running.address.rpartition(":")[2]
        with Client(f"127.0.0.1:{port}", ca=ca, timeout=DEADLINE_S) as client:
            assert client.generate(PROMPT, SHORT).completion_tokens == 2
            assert_no_admin(client)


ELSEWHERE = ("10.0.0.1:50051", "example.org:1", "dns:///example.org:1", "ipv4:127.0.0.1:1,8.8.8.8:1", "[::]:1")
HERE = ("localhost:1", "127.8.8.8:1", "[::1]:1", "ipv6:[::1]:1", "dns:///localhost:1", "unix:///tmp/a")


@pytest.mark.parametrize("target", [*ELSEWHERE, "dns://8.8.8.8/localhost:1"])
def test_no_client_sends_a_token_elsewhere_in_clear_text(target: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(InvalidValueError, match="token=") as error:
            kind(target, token=ALICE)
        assert ALICE not in str(error.value)
    with Client(target, token=ALICE, tls=True), Client(target, token=ALICE, insecure=True), Client(target):
        pass


@pytest.mark.parametrize("target", HERE)
def test_a_token_may_go_to_this_machine(target: str) -> None:
    with Client(target, token=ALICE):
        pass


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"host": "0.0.0.0", "token_file": True}, "--host"),
        ({"host": "0.0.0.0", "tls": True}, "--host"),
        ({"host": "0.0.0.0", "tls": True, "insecure": True, "admins": ("a",)}, "--admin"),
        ({"admins": ("a",)}, "--admin"),
        ({"peers": ("a",)}, "--peer"),
        ({"tls": True, "tls_client_ca": True, "token_file": True, "peers": ("a",)}, "--peer"),
        ({"tls": True, "tls_client_ca": True, "token_file": True, "admins": ("a",)}, "--admin"),
        ({"host": "0.0.0.0", "tls": True, "token_file": True}, None),
        ({"host": "0.0.0.0", "tls": True, "tls_client_ca": True}, None),
        ({"host": "0.0.0.0", "token_file": True, "insecure": True}, None),
        ({"host": "0.0.0.0", "tls": True, "insecure": True}, None),
        ({"token_file": True}, None),
    ],
)
def test_what_protects_a_public_host(
    options: dict[str, Any], flag: str | None, token_file: Path, certificates: Path
) -> None:
    if options.pop("tls", False):
        options |= {"tls_cert": certificates / "good.pem", "tls_key": certificates / "good.key"}
    for name, path in {"token_file": token_file, "tls_client_ca": certificates / "good-ca.pem"}.items():
        if name in options:
            options[name] = path
    with pytest.raises(InvalidValueError, match=flag) if flag else nullcontext():
        checked(ServeOptions("tiny", **options))


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"host": "0.0.0.0"}, "--host"),
        ({"host": "::"}, "--host"),
        ({"host": "example.org"}, "--host"),
        ({"tls_cert": Path("a")}, "--tls-cert"),
        ({"tls_key": Path("a")}, "--tls-key"),
        ({"tls_client_ca": Path("a")}, "--tls-client-ca"),
        ({"tls_cert": Path("/nowhere"), "tls_key": Path("/nowhere")}, "--tls-cert"),
        ({"token_file": Path("/nowhere")}, "--token-file"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], flag: str) -> None:
    with pytest.raises(InvalidValueError, match=flag):
        checked(ServeOptions("tiny", **options))


@pytest.mark.parametrize(
    ("files", "flag"),
    [
        ({"tls_cert": "good.key"}, "--tls-cert"),
        ({"tls_cert": "half"}, "--tls-cert"),
        ({"tls_cert": "."}, "--tls-cert"),
        ({"tls_key": "good.pem"}, "--tls-key"),
        ({"tls_key": "other.key"}, "--tls-key=.* is not the key of"),
        ({"tls_key": "elliptic"}, "--tls-key=.* is not the key of"),
        ({"tls_key": "encrypted"}, "--tls-key=.*not encrypted"),
        ({"tls_client_ca": "good.key"}, "--tls-client-ca"),
        ({"tls_client_ca": "ext"}, "--tls-client-ca"),
    ],
)
def test_files_of_tls_are_checked_before_a_model_is_loaded(
    files: dict[str, str], flag: str, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (certificates / "half").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    for made in (
        "ecparam -genkey -name prime256v1 -noout -out elliptic",
        "rsa -in good.key -aes128 -passout pass:secret -out encrypted",
    ):
        subprocess.run(["openssl", *made.split()], check=True, capture_output=True, timeout=30, cwd=certificates)
    monkeypatch.setattr(serve_module, "AsyncLLM", lambda *_, **__: pytest.fail("loaded"))
    paths = {
        name: certificates / file for name, file in ({"tls_cert": "good.pem", "tls_key": "good.key"} | files).items()
    }
    with pytest.raises(InvalidValueError, match=flag):
        serve_module.serve(engine_config(model="nowhere"), ServeOptions("tiny", port=0, **paths))
    if "tls_client_ca" not in paths:
        with pytest.raises(InvalidValueError, match=flag.replace("--tls-", "")):
            Client("127.0.0.1:1", cert=paths["tls_cert"], key=paths["tls_key"])


@pytest.mark.parametrize("flag", ["--port", "--metrics-port", "--openai-port"])
def test_a_port_is_checked_before_a_model_is_loaded(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_module, "AsyncLLM", lambda *_, **__: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        name = flag.removeprefix("--").replace("-", "_")
        options = ServeOptions("tiny", **{"port": 0} | {name: other.getsockname()[1]})
        with pytest.raises(InvalidValueError, match=f"{flag}=.*in use"):
            serve_module.serve(engine_config(model="nowhere"), options)
    with pytest.raises(InvalidValueError, match=r"--port=.*192\.0\.2\.1:0"):  # an address of no host
        serve_module.serve(
            engine_config(model="nowhere"), ServeOptions("tiny", host="192.0.2.1", port=0, insecure=True)
        )


@pytest.mark.parametrize(
    "options", [{"host": "127.0.0.1"}, {"host": "::1"}, {"host": "localhost"}, {"host": "0.0.0.0", "insecure": True}]
)
def test_hosts_that_are_not(options: dict[str, Any]) -> None:
    checked(ServeOptions("tiny", **options))


def test_the_gateway_lets_in_nobody_who_is_kept_out(token_file: Path, certificates: Path) -> None:
    good = {"tls_cert": certificates / "good.pem", "tls_key": certificates / "good.key"}
    for options in ({"token_file": token_file}, good | {"tls_client_ca": certificates / "good-ca.pem"}):
        with pytest.raises(InvalidValueError, match="--openai-port"):
            checked(ServeOptions("tiny", openai_port=0, **options))
    checked(ServeOptions("tiny", openai_port=0, **good))


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_what_goes_to_this_machine_goes_by_no_proxy(name: str, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy would read the token, and look for the server on its own machine."""
    running = serve()
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(0.0)
        monkeypatch.setenv("grpc_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for variable in ("no_grpc_proxy", "no_proxy"):
            monkeypatch.delenv(variable, raising=False)
        port = running.address.rpartition(":")[2]
        with Client(f"{name}:{port}", token=ALICE, timeout=10.0, retries=0) as client:
            assert client.stats().num_blocks
        with pytest.raises(BlockingIOError):
            proxy.accept()
