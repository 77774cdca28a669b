"""Where a server listens and who may use it, and the check of what is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from headwise.runtime.addresses import check_port
from headwise.runtime.deployment.options import ReplicaOptions
from headwise.runtime.server.auth import Tokens, read_tokens
from headwise.runtime.server.gateway import check_gateway
from headwise.runtime.server.tracing import check_tracing
from headwise.runtime.tls import server_credentials
from headwise.workers.addresses import is_loopback
from headwise.workers.errors import InvalidValueError


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


def checked(options: ServeOptions) -> tuple[Tokens, grpc.ServerCredentials | None]:
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


def check_ports(options: ServeOptions) -> None:
    """Tries each address, and gives it back: it is bound for good only once the model is loaded."""
    for flag, host, port in (
        ("--port", options.host, options.port),
        ("--metrics-port", options.metrics_host, options.metrics_port),
        ("--openai-port", options.host, options.openai_port),
    ):
        if port is not None:
            check_port(flag, host, port)
