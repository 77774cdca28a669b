"""The KvTransferService of a rank: where other groups push KV to."""

from __future__ import annotations

import ipaddress
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import grpc

from headwise.v1 import kv_transfer_pb2 as pb
from headwise.workers.addresses import is_loopback, join
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.chunk import OVERHEAD_BYTES, PAYLOAD_BYTES
from headwise.workers.kv.fences import Fences, PushRefused, Refusal
from headwise.workers.kv.handoff import HandoffSpec

MAX_STREAMS = 64
"""At once: more are refused before anything of them is read."""

MAX_CONNECTIONS = 256
"""At once: each takes a file descriptor of this process, and strangers are not to take them all."""

PATIENCE_S = 10.0
"""A stream that brings nothing for so long is cut if it has shown no ticket, or its fence is over."""

UNREADABLE = grpc.StatusCode.FAILED_PRECONDITION
"""The receiver cannot read the sender's shared memory."""

_STATUS = {
    Refusal.UNKNOWN: grpc.StatusCode.NOT_FOUND,
    Refusal.WRONG: grpc.StatusCode.INVALID_ARGUMENT,
    Refusal.DAMAGED: grpc.StatusCode.DATA_LOSS,
    Refusal.UNREADABLE: UNREADABLE,
    Refusal.FAILED: grpc.StatusCode.INTERNAL,
}

_END_S = 2.0
_logger = logging.getLogger(__name__)


class Receiver:
    """Serves until it is closed, on threads of its own.

    Attributes:
        address: where it listens, host:port.
    """

    def __init__(self, fences: Fences, spec: HandoffSpec, largest_layer: int) -> None:
        """
        Args:
            largest_layer: bytes of one layer of one block.

        Raises:
            InvalidValueError: the host cannot be bound, or must not be without TLS; a file of TLS cannot be used.
        """
        self._fences = fences
        handler: Any = grpc.stream_unary_rpc_method_handler(
            self._push, request_deserializer=None, response_serializer=pb.PushResponse.SerializeToString
        )
        options = [
            ("grpc.max_receive_message_length", max(PAYLOAD_BYTES, largest_layer) + OVERHEAD_BYTES),
            ("grpc.so_reuseport", 0),
            # What may be on its way in a stream that nobody reads; else it would grow with what the network can do.
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", 2 * PAYLOAD_BYTES),
            # A sender that is gone without a word is noticed.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.server_handshake_timeout_ms", 20_000),
            ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
            ("grpc.max_connection_idle_ms", 60_000),  # a pusher ends its own before
        ]
        threads: Any = _DaemonThreads()
        self._server = grpc.server(threads, options=options, maximum_concurrent_rpcs=MAX_STREAMS)
        service = pb.DESCRIPTOR.services_by_name["KvTransferService"].full_name
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Push": handler}),))
        self.address = join(spec.host, _bind(self._server, spec))
        self._server.start()

    def close(self) -> None:
        """Cuts the streams. Idempotent."""
        self._server.stop(None).wait(_END_S)

    def _push(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> pb.PushResponse:
        stream, over = self._fences.stream(context.cancel), threading.Event()

        def watch() -> None:
            while not over.wait(PATIENCE_S):
                if stream.is_stray(PATIENCE_S):
                    context.cancel()

        try:
            threading.Thread(target=watch, name="headwise-kv-watch", daemon=True).start()
            for message in messages:
                stream.receive(message)
            return pb.PushResponse(num_bytes=stream.end())
        except PushRefused as error:
            # What comes after its fence was closed is nothing to worry about.
            level = logging.INFO if error.refusal == Refusal.UNKNOWN else logging.WARNING
            _logger.log(level, "a push of KV from %s was refused: %s", context.peer(), error)
            context.abort(_STATUS[error.refusal], str(error))
        except grpc.RpcError:  # the peer is gone, or the fence was closed
            stream.broke()
            raise
        except Exception as error:
            stream.broke()
            _logger.error("a push of KV from %s failed: %s: %s", context.peer(), type(error).__name__, error)
            context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__} at the receiver")
        finally:
            over.set()
        raise AssertionError("abort() raises")


class _DaemonThreads(Executor):
    """A thread for each call; unlike those of ThreadPoolExecutor none keeps the process from ending."""

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(call(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        try:
            threading.Thread(target=run, name="headwise-kv-receive", daemon=True).start()
        except RuntimeError as error:  # the system has no thread; gRPC would serve nobody any more
            _logger.error("a push of KV was dropped: %s", error)
            future.set_exception(error)
        return future


def _bind(server: grpc.Server, spec: HandoffSpec) -> int:
    """The port, which the system picks."""
    if (spec.tls_cert is None) != (spec.tls_key is None):
        raise InvalidValueError("tls_cert", spec.tls_cert, "a certificate and its key (tls_key) go together")
    if spec.tls_cert is None and not is_loopback(spec.host):
        limit = "must be a loopback address where the port is not encrypted"
        raise InvalidValueError("host", spec.host, limit, "give tls_cert and tls_key")
    if _is_any(spec.host):
        raise InvalidValueError("host", spec.host, "must be an address by which the other engine reaches this one")
    try:
        if spec.tls_cert is None or spec.tls_key is None:
            return server.add_insecure_port(join(spec.host, 0))
        chain = read_pem("tls_key", spec.tls_key), read_pem("tls_cert", spec.tls_cert)
        senders = read_pem("ca", spec.ca) if spec.ca is not None else None
        credentials = grpc.ssl_server_credentials([chain], senders, senders is not None)
        return server.add_secure_port(join(spec.host, 0), credentials)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, InvalidValueError):
            raise
        limit = "cannot be bound, or not with tls_cert and tls_key" if spec.tls_cert else "cannot be bound"
        raise InvalidValueError("host", spec.host, limit) from None


def read_pem(field: str, path: str) -> bytes:
    """
    Raises:
        InvalidValueError: the file cannot be read, or is not PEM.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InvalidValueError(field, path, f"cannot be read: {error.strerror}") from None
    if b"-----BEGIN" not in data:
        raise InvalidValueError(field, path, "must be a PEM file")
    return data


def _is_any(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
