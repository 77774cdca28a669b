"""OpenTelemetry: a trace of each request, made and left to be sent once the request has ended.

The only file that needs the extra ``otel``; see :func:`~headwise.runtime.server.tracing.check_tracing`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import grpc
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from headwise.runtime.server.tracing import Ended, phases
from headwise.workers.errors import InvalidValueError

MAX_QUEUED_SPANS = 4096
"""That wait to be sent; with more, the oldest are dropped. OTEL_BSP_MAX_QUEUE_SIZE says otherwise."""
END_S = 2.0
"""For the last spans to be sent once the server ends."""

_PROPAGATOR = TraceContextTextMapPropagator()
# It would log what clients send, as often as they send it.
logging.getLogger("opentelemetry.trace.span").setLevel(logging.ERROR)

_logger = logging.getLogger(__name__)


class Tracing:
    """Sends traces by OTLP over gRPC. What it costs a request is counted once, when the request ends."""

    def __init__(self, endpoint: str, model: str, exporter: SpanExporter | None = None) -> None:
        """
        Args:
            endpoint: the URL of a collector.
            model: the model's name for clients.
            exporter: takes the spans in place of the collector, in tests.

        Raises:
            InvalidValueError: one of OpenTelemetry's environment variables has a value that it cannot have.
        """
        try:
            self._exporter = _SaidOnce(exporter or _otlp(endpoint), endpoint)
            given = None if "OTEL_BSP_MAX_QUEUE_SIZE" in os.environ else MAX_QUEUED_SPANS
            self._processor = BatchSpanProcessor(self._exporter, max_queue_size=given)
            # Its sampler, ids and resource, as the environment says; spans are made without its locks and limits.
            self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        except (ValueError, RuntimeError) as error:
            raise InvalidValueError("OTEL_*", endpoint, f"OpenTelemetry refuses its variables: {error}") from None
        self._scope = InstrumentationScope("headwise", metadata.version("headwise"))
        self._model = model

    def record(self, ended: Ended) -> None:
        """Makes the spans of a request, and leaves them to a thread to send."""
        now, wall = time.monotonic(), time.time_ns()
        ids, name = self._provider.id_generator, f"headwise.v1.InferenceService/{ended.method}"
        around = _PROPAGATOR.extract(ended.carrier) if ended.carrier else None
        parent = get_current_span(around).get_span_context() if around is not None else None
        if parent is not None and not parent.is_valid:
            parent = None
        trace_id = parent.trace_id if parent is not None else ids.generate_trace_id()
        sampled = self._provider.sampler.should_sample(around, trace_id, name, SpanKind.SERVER)
        if sampled.decision is not Decision.RECORD_AND_SAMPLE:
            return
        flags, state = TraceFlags(TraceFlags.SAMPLED), sampled.trace_state or TraceState()

        def at(moment: float) -> int:
            return wall - int((now - moment) * 1e9)

        def span(name: str, under: SpanContext | None, start: float, end: float, **more: Any) -> ReadableSpan:
            return ReadableSpan(
                name,
                SpanContext(trace_id, ids.generate_span_id(), False, flags, state),
                under,
                self._provider.resource,
                start_time=at(start),
                end_time=at(end),
                instrumentation_scope=self._scope,
                **more,
            )

        root = span(
            name,
            parent,
            ended.arrival,
            now,
            kind=SpanKind.SERVER,
            attributes=self._attributes(ended) | dict(sampled.attributes or {}),
            status=_status(ended.code),
        )
        for phase in phases(ended.requests[0].metrics, now) if ended.requests else ():
            self._processor.on_end(span(phase.name, root.context, phase.start, phase.end, attributes={}))
        self._processor.on_end(root)

    def close(self) -> None:
        """Sends what waits, within END_S. Blocks so long."""
        hurry = threading.Timer(END_S, self._exporter.shutdown)
        hurry.start()
        try:
            self._processor.shutdown()  # type: ignore[no-untyped-call]
        finally:
            hurry.cancel()
            hurry.join()

    def _attributes(self, ended: Ended) -> dict[str, Any]:
        """Of a request's root span: nothing of its prompt or its output."""
        found: dict[str, Any] = {
            "rpc.system": "grpc",
            "rpc.grpc.status_code": ended.code.value[0],
            "gen_ai.request.model": self._model,
            "headwise.request_id": ended.request_id,
        }
        if ended.tenant:
            found["headwise.tenant"] = ended.tenant
        if not ended.requests:
            return found
        first = ended.requests[0].metrics
        found |= {
            "gen_ai.usage.input_tokens": len(ended.requests[0].prompt_token_ids),
            "gen_ai.usage.output_tokens": sum(len(request.generated) for request in ended.requests),
            "gen_ai.response.finish_reasons": [
                request.finish_reason.value for request in ended.requests if request.finish_reason is not None
            ],
            "headwise.cached_tokens": first.num_cached_tokens,
            "headwise.preemptions": first.num_preemptions,
            "headwise.recoveries": first.num_recoveries,
        }
        if first.prefilled_by is not None:
            found |= {"headwise.prefilled_by": first.prefilled_by, "headwise.handoff_tokens": first.num_handoff_tokens}
        if first.replica:
            found["headwise.replica"] = first.replica
        return found


def _otlp(endpoint: str) -> SpanExporter:
    # A collector that is down is said once, by us.
    for name in ("opentelemetry.exporter.otlp.proto.grpc.exporter", "opentelemetry.sdk._shared_internal"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return OTLPSpanExporter(endpoint)


class _Hashed(Resource):
    """A resource that the exporter need not hash anew, as JSON, for each span: a fourth of what a span costs."""

    def __init__(self, resource: Resource) -> None:
        super().__init__(resource.attributes, resource.schema_url)
        self._hash = hash(resource)

    def __hash__(self) -> int:
        return self._hash


def _resource() -> Resource:
    """What all spans are of, as the environment says."""
    who = f"{os.uname().nodename}:{os.getpid()}"
    made = Resource.create({"service.version": metadata.version("headwise"), "service.instance.id": who})
    if str(made.attributes["service.name"]).startswith("unknown_service"):
        made = made.merge(Resource({"service.name": "headwise"}))
    return _Hashed(made)


def _status(code: grpc.StatusCode) -> Status:
    return Status(StatusCode.UNSET) if code is grpc.StatusCode.OK else Status(StatusCode.ERROR, code.name)


class _SaidOnce(SpanExporter):
    """An exporter that says when it begins to fail, and when it sends again."""

    def __init__(self, exporter: SpanExporter, endpoint: str) -> None:
        self._exporter, self._endpoint, self._fails = exporter, endpoint, False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            result = self._exporter.export(spans)
        except Exception as error:
            _logger.debug("spans could not be sent: %s", error)
            result = SpanExportResult.FAILURE
        fails = result is not SpanExportResult.SUCCESS
        if fails and not self._fails:
            _logger.warning("traces cannot be sent to %s; they are dropped until they can", self._endpoint)
        elif self._fails and not fails:
            _logger.info("traces are sent to %s again", self._endpoint)
        self._fails = fails
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)
