"""What a trace of a request tells: who asked, and the phases of its life, from the times that it has taken down."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

import grpc

from headwise.runtime.engine.request import Request
from headwise.runtime.output import RequestMetrics
from headwise.workers.errors import InvalidValueError

_W3C = ("traceparent", "tracestate")
MAX_HEADER = 512
"""Characters that a trace's header may have, as many as W3C asks for: to read 8,000 takes more than a millisecond."""


class Ended(NamedTuple):
    """A request that has ended, however it did.

    Attributes:
        method: the RPC's name.
        request_id: as its client knows it.
        tenant: who asked for it; empty where tenants are not told apart.
        arrival: on the monotonic clock, as all times of its samples.
        requests: its samples; none where it was refused.
        carrier: what its call's metadata say of a trace that it is a part of.
    """

    method: str
    request_id: str
    tenant: str
    arrival: float
    code: grpc.StatusCode
    requests: Sequence[Request]
    carrier: Mapping[str, str]


class Phase(NamedTuple):
    """Part of a request's life: its name, and when it began and ended on the monotonic clock."""

    name: str
    start: float
    end: float


def phases(metrics: RequestMetrics, now: float) -> Iterator[Phase]:
    """What a sample went through until it ended, or until now. Recoveries lie within the others."""
    end = metrics.finished or now
    scheduled, first = metrics.first_scheduled, metrics.first_token
    handed = metrics.handoff_started
    yield Phase("queue", metrics.arrival, handed or scheduled or end)
    if handed:
        yield Phase("handoff", handed, metrics.handoff_ended or scheduled or end)
    if scheduled:
        yield Phase("prefill", scheduled, first or end)
    if first:
        yield Phase("decode", first, end)
    for lost, again in metrics.recoveries:
        yield Phase("recovery", lost, again)
    if metrics.lost:
        yield Phase("recovery", metrics.lost, end)


def carrier_of(metadata: Iterable[tuple[str, str | bytes]]) -> dict[str, str]:
    """What a call's metadata say of a trace: W3C's headers, but for those of more than MAX_HEADER characters."""
    headers = ((key, value) for key, value in metadata if key in _W3C and isinstance(value, str))
    return {key: value for key, value in headers if len(value) <= MAX_HEADER}


def traces_are_off(environment: Mapping[str, str]) -> bool:
    """Whether OpenTelemetry's own variables turn traces off, whatever endpoint there is."""
    disabled = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    return disabled or environment.get("OTEL_TRACES_EXPORTER", "").lower() == "none"


def check_tracing(endpoint: str) -> None:
    """
    Raises:
        InvalidValueError: the endpoint is no URL, another protocol is asked for, or a package is not installed.
    """
    url = urlsplit(endpoint)
    try:
        is_url = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # of the port
        is_url = False
    if not is_url:
        limit = "must be the URL of a collector's port for OTLP over gRPC"
        raise InvalidValueError("--otlp-endpoint", endpoint, limit, "such as http://127.0.0.1:4317")
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if (protocol := os.environ.get(name, "grpc")) != "grpc":
            limit = "traces are sent by grpc alone"
            raise InvalidValueError(name, protocol, limit, "set it to grpc, and the endpoint to that port")
    try:
        import opentelemetry.exporter.otlp.proto.grpc.trace_exporter
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError as error:
        limit = f"needs packages that are not installed ({error.name})"
        raise InvalidValueError("--otlp-endpoint", endpoint, limit, "run: pip install 'headwise[otel]'") from None
