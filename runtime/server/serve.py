"""``headwise serve``: the life of a server, from loading the model to draining."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from headwise.cluster.group import ShardGroupDied
from headwise.runtime.addresses import check_port
from headwise.runtime.aio import AsyncLLM
from headwise.runtime.async_model import AsyncModel
from headwise.runtime.config import EngineConfig
from headwise.runtime.deployment.control import Control
from headwise.runtime.deployment.front import NoReplicaError
from headwise.runtime.deployment.model import DeployedModel, make_replicas
from headwise.runtime.deployment.options import ReplicaOptions
from headwise.runtime.handoff.service import HandoffService
from headwise.runtime.heap import frozen_heap
from headwise.runtime.server.auth import Access, AuthInterceptor, Tokens, read_tokens
from headwise.runtime.server.deployment import DeploymentService
from headwise.runtime.server.gateway import Gateway, check_gateway
from headwise.runtime.server.handoff import AsyncHandoffService
from headwise.runtime.server.health import HealthMonitor
from headwise.runtime.server.metrics import Metrics
from headwise.runtime.server.service import InferenceService
from headwise.runtime.server.sessions import Sessions
from headwise.runtime.server.single import SingleEngine
from headwise.runtime.server.slots import Slots
from headwise.runtime.server.tracing import check_tracing
from headwise.runtime.tls import server_credentials
from headwise.v1 import deployment_pb2, kv_transfer_pb2
from headwise.v1 import inference_pb2 as pb
from headwise.v1.deployment_pb2_grpc import add_DeploymentServiceServicer_to_server
from headwise.v1.inference_pb2_grpc import add_InferenceServiceServicer_to_server
from headwise.v1.kv_transfer_pb2_grpc import add_KvHandoffServiceServicer_to_server
from headwise.workers.addresses import is_loopback, join
from headwise.workers.errors import InvalidValueError

if TYPE_CHECKING:
    from headwise.runtime.server.otlp import Tracing

MAX_MESSAGE_BYTES = 5 << 20
"""The largest request: the longest text, or a million tokens."""

_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    # Clients and gateways ping while idle, some every second; none of them is to be cut off for it.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
    # A client that is gone without a word is noticed.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Nor does a client stay that says nothing at all.
    ("grpc.server_handshake_timeout_ms", 20_000),
    # Two servers on one port would each get some of the clients.
    ("grpc.so_reuseport", 0),
]

_GRACE_S = 0.5
"""For the last words of calls that have ended to reach their clients."""
_END_S = 5.0
_LOOK_S = 0.05
"""How often a server that drains looks whether peers have got what they asked for."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Where a server listens, who may use it, and its time limits.

    Attributes:
        name: the model's name for clients.
        host, port: where gRPC is served; port 0 takes a free one. Default: 127.0.0.1:50051.
        metrics_port: where Prometheus metrics are served; 0 takes a free port; None, the default, serves none.
        metrics_host: the address of the metrics; everybody who reaches it may read them. Default: 127.0.0.1.
        openai_port: where OpenAI's API is served, on ``host``; 0 takes a free port; None, the default, serves none.
        tls_cert, tls_key: PEM files of the server's certificate and its key, to encrypt connections; None does not.
        tls_client_ca: a PEM file; only clients with a certificate that it signed are let in. Needs tls_cert. Without a
            token_file, the common name of a client's certificate (or else its first alternative name) is its tenant.
        admins: the tenants that are admins by the names of their certificates. Default: none.
        peers: the same of the tenants that are peers: engines that have KV computed here. Default: none.
        token_file: only clients with a token of this file are let in; see
            :func:`~headwise.runtime.server.auth.read_tokens`.
        insecure: whether a host that is not loopback may be served to everybody, or in clear text. Default: False.
        max_queued_requests: most requests that may wait. Default: 1024.
        drain_timeout_s: seconds for running requests to end, once the server is told to stop. Default: 30.
        stall_timeout_s: seconds that a client may leave a stream unread. Default: 30.
        max_request_s: seconds that a request may take, its waiting included. Default: 3600.
        replicas: how many engines serve the model, each in a process of its own; None, the default, is one in this
            process.
        otlp_endpoint: the URL of a collector that gets a trace of each request, by OTLP over gRPC; None, the default:
            there are no traces.
        as_json: whether the line that says that the server is ready is JSON. Default: False.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 50051
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"
    openai_port: int | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    admins: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    token_file: Path | None = None
    insecure: bool = False
    max_queued_requests: int = 1024
    drain_timeout_s: float = 30.0
    stall_timeout_s: float = 30.0
    max_request_s: float = 3600.0
    replicas: ReplicaOptions | None = None
    otlp_endpoint: str | None = None
    as_json: bool = False


def serve(config: EngineConfig, options: ServeOptions) -> int:
    """Loads the model and serves it until the server is told to stop, by a signal or Drain, or its engine ends.

    Returns:
        The exit code: 0 once drained; 1 after a second signal, or if requests had to be ended; 3 if the engine ended by
        itself.

    Raises:
        InvalidValueError: an option is wrong.
        UnsupportedModelError, CheckpointError, GroupStartError, ShardGroupDied: as of
            :class:`~headwise.runtime.llm.LLM`.
    """
    _checked(options)  # before a model is loaded for nothing
    _check_ports(options)
    _configure_logging()

    def ready(about: dict[str, Any]) -> None:
        fields = " ".join(f"{name}={value}" for name, value in about.items())
        print(json.dumps({"ready": True, **about}) if options.as_json else f"ready {fields}", flush=True)

    async def run(server: Server) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, server.stop)
        return await server.run(ready)

    with _terminable():
        llm = _load(config, options)
        try:
            with frozen_heap():
                return asyncio.run(run(Server(llm, options, llm.handoff_service(), _control(llm))))
        finally:
            llm.shutdown()  # where something came before run() could


class Server:
    """One engine behind one port. After its creation, everything happens on one event loop.

    Attributes:
        sessions: the calls that run.
    """

    def __init__(
        self,
        llm: AsyncModel[Any],
        options: ServeOptions,
        handoff: HandoffService | None = None,
        control: Control | None = None,
    ) -> None:
        """
        Args:
            handoff: what the engine does for peers; None: nothing.
            control: of the replicas; None: there is one engine, in this process.

        Raises:
            InvalidValueError: a file that the options name cannot be used, or everybody could use the server.
        """
        self._llm, self._options, self._handoff = llm, options, handoff
        if control is None:
            assert isinstance(llm, AsyncLLM), "several engines have a control of their own"
            control = SingleEngine(llm)
        self._control = control
        self._tokens, self._credentials = _checked(options)
        self._stopping, self._hurry = asyncio.Event(), asyncio.Event()
        self._gateway: Gateway | None = None
        metrics = Metrics(lambda: llm.stats_within(5.0))
        by_certificate = options.tls_client_ca is not None
        admins, peers = frozenset(options.admins), frozenset(options.peers)
        access = Access(self._tokens, by_certificate, admins, peers, is_loopback(options.host))
        self._tracing = _tracing(options)
        trace = self._tracing.record if self._tracing is not None else None
        self.sessions = Sessions(llm, metrics, access, options.stall_timeout_s, options.max_request_s, trace)

    def stop(self) -> None:
        """Drains the server and ends it. A second call ends it at once, whatever it is doing."""
        if not self._stopping.is_set():
            self._stopping.set()
            return
        self._hurry.set()
        self._llm.hurry()
        if self._gateway is not None:
            self._gateway.kill()

    async def run(self, ready: Callable[[dict[str, Any]], None]) -> int:
        """Serves until the server is stopped or drained, or its engine ends. Closes the engine and returns the exit
        code.

        Args:
            ready: called with the server's addresses and limits, once it serves.
        """
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._llm.close)
            if self._tracing is not None:
                stack.push_async_callback(asyncio.to_thread, self._tracing.close)
            options, sessions = self._options, self.sessions
            health = HealthMonitor(sessions, self._services())
            server = self._make_server(sessions, health)
            port = self._bind(server)
            internal = server.add_insecure_port("127.0.0.1:0") if self._options.openai_port is not None else 0
            metrics_port = None
            if options.metrics_port is not None:
                metrics_port, stop = _serve_metrics(sessions.metrics, options.metrics_host, options.metrics_port)
                stack.callback(stop)
            await server.start()
            stack.push_async_callback(self._end, server)
            monitor = asyncio.create_task(health.run())
            stack.callback(monitor.cancel)
            if options.openai_port is not None:
                self._gateway = self._make_gateway(options.openai_port, internal)
                stack.push_async_callback(self._gateway.stop)
                await self._start(self._gateway)
            if not self._stopping.is_set() and not self._llm.ended.is_set():
                ready(self._about(port, metrics_port))
            return await self._until_done(sessions, health)

    async def _until_done(self, sessions: Sessions, health: HealthMonitor) -> int:
        drained = asyncio.create_task(sessions.drained.wait())
        ended, stopping = asyncio.create_task(self._llm.ended.wait()), asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait([drained, ended, stopping], return_when=asyncio.FIRST_COMPLETED)
            sessions.drain()
            health.set(False)
            if self._llm.ended.is_set():
                return self._died()
            idle, hurry = asyncio.create_task(self._idle(sessions)), asyncio.create_task(self._hurry.wait())
            await asyncio.wait(
                [idle, hurry, ended], timeout=self._options.drain_timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            hurry.cancel()
            idle.cancel()
            if self._llm.ended.is_set():
                return self._died()
            if running := sessions.num_calls:
                _logger.warning("%d requests had to be ended", running)
            return 1 if running or self._hurry.is_set() else 0
        finally:
            for task in (drained, ended, stopping):
                task.cancel()

    async def _idle(self, sessions: Sessions) -> None:
        """Returns once no call runs, and no prompt is computed for a peer."""
        await sessions.idle()
        while self._llm.is_handing_over:
            await asyncio.sleep(_LOOK_S)

    async def _end(self, server: grpc.aio.Server) -> None:
        """Ends the calls that are open; those that are being answered have a moment for it."""
        grace = None if self._hurry.is_set() else _GRACE_S
        try:
            await asyncio.wait_for(server.stop(grace), _END_S)
        except TimeoutError:
            _logger.error("calls did not end within %g s", _END_S)

    def _died(self) -> int:
        failure = self._llm.failure
        expected = isinstance(failure, (ShardGroupDied, NoReplicaError))
        _logger.error("the engine has ended: %s", failure, exc_info=None if expected else failure)
        return 3

    def _make_server(self, sessions: Sessions, health: HealthMonitor) -> grpc.aio.Server:
        slots = Slots(sessions)
        guards = [*([AuthInterceptor(self._tokens, sessions.refuse)] if self._tokens else []), slots]
        options = [
            *_CHANNEL_OPTIONS,
            ("grpc.max_concurrent_streams", slots.of_connection),
            # The other half of the files that this process may open is for the engine.
            ("grpc.max_allowed_incoming_connections", min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, 1 << 30)),
        ]
        server = grpc.aio.server(interceptors=guards, options=options, maximum_concurrent_rpcs=slots.total)
        add_InferenceServiceServicer_to_server(InferenceService(sessions, self._options.name), server)
        add_DeploymentServiceServicer_to_server(DeploymentService(sessions, self._control), server)
        health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
        if self._handoff is not None:
            add_KvHandoffServiceServicer_to_server(AsyncHandoffService(sessions, self._handoff), server)
        if self._options.openai_port is not None:
            # Here and not above: the packages of an extra.
            from headwise.runtime.server import vllm_engine

            vllm_engine.add_to(server, vllm_engine.VllmEngineService(sessions, health, self._options.name))
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        names = (*self._services(), health_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        return server

    async def _start(self, gateway: Gateway) -> None:
        """Waits for the gateway, but not once the server is stopped or its engine has ended."""
        starting = asyncio.create_task(gateway.start())
        over = [asyncio.create_task(event.wait()) for event in (self._stopping, self._llm.ended)]
        try:
            await asyncio.wait([starting, *over], return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
        finally:
            for task in (starting, *over):
                task.cancel()

    def _services(self) -> list[str]:
        gateway = [GATEWAY_SERVICE] if self._options.openai_port is not None else []
        return [_SERVICE, _DEPLOYMENT_SERVICE, *gateway, *([_HANDOFF_SERVICE] if self._handoff is not None else [])]

    def _make_gateway(self, port: int, engine_port: int) -> Gateway:
        """
        Raises:
            InvalidValueError: the model has no tokenizer, which the gateway needs.
        """
        if self._llm.inputs.tokenizer is None:
            raise InvalidValueError("--openai-port", port, "the model's directory has no tokenizer")
        options, tls = self._options, None
        if options.tls_cert is not None and options.tls_key is not None:
            tls = options.tls_cert, options.tls_key
        return Gateway(options.host, port, engine_port, self._llm.model_path, tls)

    def _bind(self, server: grpc.aio.Server) -> int:
        """
        Raises:
            InvalidValueError: another process has the address, or this host does not have it.
        """
        address = join(self._options.host, self._options.port)
        try:
            if self._credentials is not None:
                return server.add_secure_port(address, self._credentials)
            return server.add_insecure_port(address)
        except RuntimeError:
            limit = "the address cannot be bound: another process has it, or it is none of this host"
            raise InvalidValueError("--port", address, limit, "choose another, or 0 for a free one") from None

    def _about(self, port: int, metrics_port: int | None) -> dict[str, Any]:
        llm, options = self._llm, self._options
        about: dict[str, Any] = {
            "address": join(options.host, port),
            "model": options.name,
            "kv_tokens": llm.num_blocks * llm.config.block_size,
            "max_model_len": llm.inputs.max_model_len,
            "max_num_seqs": llm.config.max_num_seqs,
            **({"replicas": options.replicas.replicas} if options.replicas is not None else {}),
            "max_queued_requests": llm.max_queued_requests,
            "tls": self._credentials is not None,
            "tokens": bool(self._tokens),
        }
        about |= _about_handoffs(llm.config)
        if metrics_port is not None:
            about["metrics"] = join(options.metrics_host, metrics_port)
        if self._gateway is not None:
            about["openai"] = f"{'https' if about['tls'] else 'http'}://{join(options.host, self._gateway.port)}/v1"
        return about


def _load(config: EngineConfig, options: ServeOptions) -> AsyncModel[Any]:
    """The model, on one engine of this process or on replicas."""
    if options.replicas is None:
        return AsyncLLM(config, max_queued_requests=options.max_queued_requests)
    factory = make_replicas(config, options.replicas)
    return DeployedModel(config, options.replicas, factory, max_queued_requests=options.max_queued_requests)


def _control(llm: AsyncModel[Any]) -> Control | None:
    """Of the replicas; None where there are none."""
    return llm if isinstance(llm, DeployedModel) else None


_SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
_DEPLOYMENT_SERVICE = deployment_pb2.DESCRIPTOR.services_by_name["DeploymentService"].full_name
_HANDOFF_SERVICE = kv_transfer_pb2.DESCRIPTOR.services_by_name["KvHandoffService"].full_name
GATEWAY_SERVICE = "vllm.grpc.engine.VllmEngine"


def _about_handoffs(config: EngineConfig) -> dict[str, Any]:
    """Who computes prompts for whom."""
    if config.prefill is not None:
        prefill_tp = config.prefill.get("tensor_parallel_size", config.tensor_parallel_size)
        return {"prefill": f"tp={prefill_tp}", "decode": f"tp={config.tensor_parallel_size}"}
    if config.handoff is None:
        return {}
    peers = {"prefill": ",".join(config.handoff.peers)} if config.handoff.role == "decode" else {}
    return {"role": config.handoff.role, **peers}


def _checked(options: ServeOptions) -> tuple[Tokens, grpc.ServerCredentials | None]:
    """The tokens and the TLS credentials of the options."""
    tokens, credentials = read_tokens(options.token_file), _credentials(options)
    _check_exposure(options, tokens, credentials)
    for role, names in (("admin", options.admins), ("peer", options.peers)):
        if names and (tokens or options.tls_client_ca is None):
            limit = f"names the certificates of {role}s, and tenants are not told apart by certificates here"
            fix = f"give --tls-client-ca and no --token-file; in a token file, write {role} after the token"
            raise InvalidValueError(f"--{role}", ", ".join(names), limit, fix)
    if options.otlp_endpoint is not None:
        check_tracing(options.otlp_endpoint)
    if options.openai_port is not None:
        check_gateway()
        if tokens or options.tls_client_ca is not None:
            flag = "--token-file" if tokens else "--tls-client-ca"
            limit = f"the gateway would let in whom {flag} keeps out: it does not pass on who its clients are"
            fix = f"leave {flag} out, or run a gateway of your own in front that knows its clients"
            raise InvalidValueError("--openai-port", options.openai_port, limit, fix)
    return tokens, credentials


def _tracing(options: ServeOptions) -> Tracing | None:
    if options.otlp_endpoint is None:
        return None
    # Here and not above: the packages of an extra.
    from headwise.runtime.server.otlp import Tracing

    return Tracing(options.otlp_endpoint, options.name)


def _credentials(options: ServeOptions) -> grpc.ServerCredentials | None:
    if options.tls_cert is None or options.tls_key is None:
        for flag, value in (("--tls-cert", options.tls_cert), ("--tls-key", options.tls_key)):
            if value is not None:
                raise InvalidValueError(flag, str(value), "a certificate and its key go together")
        if options.tls_client_ca is not None:
            raise InvalidValueError("--tls-client-ca", str(options.tls_client_ca), "needs --tls-cert and --tls-key")
        return None
    return server_credentials(options.tls_cert, options.tls_key, options.tls_client_ca)


def _check_exposure(options: ServeOptions, tokens: Tokens, credentials: grpc.ServerCredentials | None) -> None:
    if options.insecure or is_loopback(options.host):
        return
    if not tokens and options.tls_client_ca is None:
        limit = "is not loopback, and anybody who reaches it could use the server"
        fix = "give --tls-cert and --tls-key, and --token-file or --tls-client-ca with them; or say --insecure"
        raise InvalidValueError("--host", options.host, limit, fix)
    if credentials is None:
        limit = "is not loopback, and tokens would go there in clear text"
        raise InvalidValueError("--host", options.host, limit, "give --tls-cert and --tls-key, or say --insecure")


def _check_ports(options: ServeOptions) -> None:
    """Tries each address, and gives it back: it is bound for good only once the model is loaded."""
    for flag, host, port in (
        ("--port", options.host, options.port),
        ("--metrics-port", options.metrics_host, options.metrics_port),
        ("--openai-port", options.host, options.openai_port),
    ):
        if port is not None:
            check_port(flag, host, port)


def _serve_metrics(metrics: Metrics, host: str, port: int) -> tuple[int, Callable[[], None]]:
    try:
        return metrics.serve(host, port)
    except (OSError, socket.gaierror) as error:
        raise InvalidValueError("--metrics-port", port, f"cannot be bound: {error.strerror}") from None


def _configure_logging() -> None:
    """Logs requests as JSON lines and everything else as text, all on stderr."""
    plain = logging.StreamHandler(sys.stderr)
    plain.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(logging.Formatter("%(message)s"))
    root, requests = logging.getLogger("headwise"), logging.getLogger("headwise.requests")
    root.handlers, requests.handlers = [plain], [lines]
    root.propagate = requests.propagate = False
    root.setLevel(logging.INFO)


@contextmanager
def _terminable() -> Iterator[None]:
    """While the model loads, SIGTERM interrupts it like Ctrl-C, so that everything is closed."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        with suppress(ValueError):
            signal.signal(signal.SIGTERM, previous)
