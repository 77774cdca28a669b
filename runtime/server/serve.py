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
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from headwise.cluster.group import ShardGroupDied
from headwise.runtime.aio import AsyncLLM
from headwise.runtime.async_model import AsyncModel
from headwise.runtime.config import EngineConfig
from headwise.runtime.deployment.control import Control
from headwise.runtime.deployment.front import NoReplicaError
from headwise.runtime.deployment.model import DeployedModel, make_replicas
from headwise.runtime.deployment.options import ReplicaOptions
from headwise.runtime.handoff.service import HandoffService
from headwise.runtime.heap import frozen_heap
from headwise.runtime.server.auth import Access, AuthInterceptor
from headwise.runtime.server.deployment import DeploymentService
from headwise.runtime.server.gateway import Gateway
from headwise.runtime.server.handoff import AsyncHandoffService
from headwise.runtime.server.health import HealthMonitor
from headwise.runtime.server.metrics import Metrics
from headwise.runtime.server.options import ServeOptions, check_ports, checked
from headwise.runtime.server.service import InferenceService
from headwise.runtime.server.sessions import Sessions
from headwise.runtime.server.single import SingleEngine
from headwise.runtime.server.slots import Slots
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
    checked(options)  # before a model is loaded for nothing
    check_ports(options)
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
        self._tokens, self._credentials = checked(options)
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
        about |= _about_handoffs(llm.config, options.replicas)
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


def _about_handoffs(config: EngineConfig, replicas: ReplicaOptions | None) -> dict[str, Any]:
    """Who computes prompts for whom."""
    if config.prefill is not None:
        prefill_tp = config.prefill.get("tensor_parallel_size", config.tensor_parallel_size)
        counts = ("", "") if replicas is None else (f"{replicas.prefill}x ", f"{replicas.replicas}x ")
        return {"prefill": f"{counts[0]}tp={prefill_tp}", "decode": f"{counts[1]}tp={config.tensor_parallel_size}"}
    if config.handoff is None:
        return {}
    peers = {"prefill": ",".join(config.handoff.peers)} if config.handoff.role == "decode" else {}
    return {"role": config.handoff.role, **peers}


def _tracing(options: ServeOptions) -> Tracing | None:
    if options.otlp_endpoint is None:
        return None
    # Here and not above: the packages of an extra.
    from headwise.runtime.server.otlp import Tracing

    return Tracing(options.otlp_endpoint, options.name)


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
