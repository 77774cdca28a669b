"""Traces: what is in them, whose part they are, and that nobody waits for a collector."""

from __future__ import annotations

import itertools
import logging
import socket
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from queue import SimpleQueue
from typing import Any

import grpc
import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="needs the extra otel")

from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from headwise.runtime import SamplingParams
from headwise.runtime.client import ServerError
from headwise.runtime.config import handoff_config
from headwise.runtime.engine.request import Request
from headwise.runtime.output import RequestMetrics
from headwise.runtime.server.convert import sampling_message
from headwise.runtime.server.otlp import Tracing
from headwise.runtime.server.tracing import Ended, carrier_of, check_tracing, phases, traces_are_off
from headwise.v1 import inference_pb2 as pb
from headwise.v1.inference_pb2_grpc import InferenceServiceStub
from headwise.workers.errors import InvalidValueError
from headwise.workers.plan import RowSampling
from tests.runtime.server.conftest import DEADLINE_S, Running
from tests.thread_group import ThreadShardGroup

Serve = Callable[..., Running]
PROMPT = list(range(3, 40))
PARAMS = SamplingParams(max_tokens=5, ignore_eos=True, temperature=0)
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans by OTLP.

    Attributes:
        url: where it listens.
        resource: what they are of.
    """

    def __init__(self) -> None:
        self.url = ""
        self._batches: SimpleQueue[Any] = SimpleQueue()
        self.spans: list[Span] = []
        self.resource: dict[str, str] = {}

    def Export(self, request: Any, context: object) -> trace_service_pb2.ExportTraceServiceResponse:
        self._batches.put(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    def trace(self) -> dict[str, Span]:
        """The spans of the next trace whose root has come, by their last name."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            for root in self.spans:
                if root.kind == Span.SPAN_KIND_SERVER:
                    found = [span for span in self.spans if span.trace_id == root.trace_id]
                    self.spans = [span for span in self.spans if span.trace_id != root.trace_id]
                    assert all(span is root or span.parent_span_id == root.span_id for span in found)
                    return {span.name.rpartition("/")[2]: span for span in found}
            for resource in self._batches.get(timeout=max(0.1, deadline - time.monotonic())).resource_spans:
                self.resource = {one.key: one.value.string_value for one in resource.resource.attributes}
                for scope in resource.scope_spans:
                    self.spans += scope.spans


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    made = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(made, server)
    made.url = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield made
    assert server.stop(0).wait(DEADLINE_S)


@pytest.fixture
def traced(serve: Serve, collector: Collector) -> Callable[..., Running]:
    return lambda **settings: serve(options={"otlp_endpoint": collector.url}, **settings)


def attributes(span: Span) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def check_inside(spans: dict[str, Span]) -> None:
    """Every span is inside its root, but for the rounding of clocks."""
    root = spans["Generate"]
    for span in spans.values():
        assert root.start_time_unix_nano - 1000 <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= root.end_time_unix_nano + 1000


def test_a_request_is_one_trace(traced: Callable[..., Running], collector: Collector) -> None:
    before = time.time_ns()
    with traced().client() as client:
        client.generate(PROMPT, PARAMS, request_id="of-mine")
        spans = collector.trace()
        assert set(spans) == {"Generate", "queue", "prefill", "decode"}
        root, queue, prefill, decode = spans["Generate"], spans["queue"], spans["prefill"], spans["decode"]
        assert root.name == "headwise.v1.InferenceService/Generate" and not root.parent_span_id
        assert before <= root.start_time_unix_nano == queue.start_time_unix_nano and root.status == Status()
        assert queue.end_time_unix_nano == prefill.start_time_unix_nano
        assert prefill.end_time_unix_nano == decode.start_time_unix_nano < decode.end_time_unix_nano
        check_inside(spans)
        found = attributes(root)
        assert (found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"]) == (len(PROMPT), 5)
        assert (found["headwise.request_id"], found["gen_ai.request.model"]) == ("of-mine", "tiny")
        assert [one.string_value for one in found["gen_ai.response.finish_reasons"].values] == ["length"]
        assert found["headwise.cached_tokens"] == 0 and found["rpc.grpc.status_code"] == 0
        assert collector.resource["service.name"] == "headwise" and collector.resource["service.version"]
        client.generate(PROMPT, PARAMS)
        assert attributes(collector.trace()["Generate"])["headwise.cached_tokens"] == 32


def test_a_request_that_is_refused(traced: Callable[..., Running], collector: Collector) -> None:
    with traced().client() as client, pytest.raises(ServerError):
        client.generate([1000])
    spans = collector.trace()
    assert set(spans) == {"Generate"}
    assert spans["Generate"].status == Status(code=Status.STATUS_CODE_ERROR, message="INVALID_ARGUMENT")


def test_a_trace_of_the_client_goes_on(traced: Callable[..., Running], collector: Collector) -> None:
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT), sampling_params=sampling_message(PARAMS))
    with grpc.insecure_channel(traced().address) as channel:
        stub = InferenceServiceStub(channel)
        for parent, state in ((f"00-{TRACE}-{PARENT}-01", "vendor=1"), ("nonsense", "")):
            list(stub.Generate(request, metadata=[("traceparent", parent), ("tracestate", state)], timeout=DEADLINE_S))
            root = collector.trace()["Generate"]
            assert (root.trace_id.hex() == TRACE) == (root.parent_span_id.hex() == PARENT) == (parent != "nonsense")
            assert root.trace_state == state
        # The client takes no samples, and so does its server.
        list(stub.Generate(request, metadata=[("traceparent", f"00-{TRACE}-{PARENT}-00")], timeout=DEADLINE_S))
        list(stub.Generate(request, timeout=DEADLINE_S))
        assert collector.trace()["Generate"].trace_id.hex() != TRACE


def test_a_recovery_is_a_span(
    traced: Callable[..., Running], collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, collect = traced(), ThreadShardGroup.collect
    steps = iter(range(100))

    def dies_once(group: ThreadShardGroup) -> object:
        from headwise.cluster.group import ShardGroupDied

        if next(steps) == 3:
            raise ShardGroupDied(0, "here", "for the test")
        return collect(group)

    with running.client() as client:
        monkeypatch.setattr(ThreadShardGroup, "collect", dies_once)
        assert client.generate(PROMPT, PARAMS).completion_tokens == 5
    spans = collector.trace()
    recovery, decode = spans["recovery"], spans["decode"]
    assert attributes(spans["Generate"])["headwise.recoveries"] == 1
    assert decode.start_time_unix_nano < recovery.start_time_unix_nano < recovery.end_time_unix_nano
    assert recovery.end_time_unix_nano < decode.end_time_unix_nano
    check_inside(spans)


def test_a_handoff_is_a_span(traced: Callable[..., Running], collector: Collector) -> None:
    running = traced(prefill={}, handoff=handoff_config(role="decode", min_tokens=32))
    with running.client() as client:
        assert client.generate(PROMPT, PARAMS).handoff_tokens == 32
    spans = collector.trace()
    assert set(spans) == {"Generate", "queue", "handoff", "prefill", "decode"}
    assert spans["queue"].end_time_unix_nano == spans["handoff"].start_time_unix_nano
    assert spans["handoff"].start_time_unix_nano < spans["handoff"].end_time_unix_nano
    assert spans["handoff"].end_time_unix_nano <= spans["prefill"].start_time_unix_nano
    found = attributes(spans["Generate"])
    assert (found["headwise.prefilled_by"], found["headwise.handoff_tokens"]) == ("prefill", 32)
    check_inside(spans)


def test_a_collector_that_is_down_is_said_once_and_holds_nobody_up(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "5")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "8")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.2")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with caplog.at_level(logging.INFO):
            running = serve(options={"otlp_endpoint": url})
            with running.client() as client:
                said: list[str] = []
                deadline = time.monotonic() + DEADLINE_S
                while not said and time.monotonic() < deadline:
                    client.generate(PROMPT, PARAMS)
                    said = [one.message for one in caplog.records if "traces cannot be sent" in one.message]
                for _ in range(20):
                    client.generate(PROMPT, PARAMS)
            started = time.monotonic()
            assert running.end() == 0 and time.monotonic() - started < 10.0
    messages = [one.getMessage() for one in caplog.records]
    assert [one for one in messages if "traces" in one] == [
        f"traces cannot be sent to {url}; they are dropped until they can"
    ]
    assert not [one for one in caplog.records if one.name.startswith("opentelemetry")]


def test_what_is_wrong_is_refused_before_the_model_is_loaded(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    for url in (
        "127.0.0.1:4317",
        "ftp://x",
        "http://",
        "",
        "http://x:port",
        "http://x:99999",
        "http://x:0",
        "http://:1",
    ):
        with pytest.raises(InvalidValueError, match="--otlp-endpoint"):
            check_tracing(url)
    check_tracing("https://collector:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    with pytest.raises(InvalidValueError, match="OTEL_EXPORTER_OTLP_PROTOCOL"):
        check_tracing("http://127.0.0.1:4318")


def test_variables_that_turn_traces_off() -> None:
    assert traces_are_off({"OTEL_SDK_DISABLED": "TRUE"}) and traces_are_off({"OTEL_TRACES_EXPORTER": "none"})
    assert not traces_are_off({}) and not traces_are_off({"OTEL_TRACES_EXPORTER": "otlp"})


def test_only_the_headers_of_traces_are_kept() -> None:
    metadata = [("authorization", "Bearer secret"), ("traceparent", "a"), ("tracestate", "b"), ("traceparent", b"x")]
    assert carrier_of(metadata) == {"traceparent": "a", "tracestate": "b"}
    assert carrier_of([("traceparent", "a"), ("tracestate", "b" * 513)]) == {"traceparent": "a"}, "it costs too much"


HEADER = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=80)
PARENTS = HEADER | st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", fullmatch=True)


@pytest.fixture(scope="module")
def quiet() -> Iterator[Tracing]:
    """Sends nothing."""
    tracing = Tracing("http://127.0.0.1:1", "tiny", InMemorySpanExporter())
    yield tracing
    tracing.close()


@given(PARENTS, HEADER)
def test_whatever_a_client_sends_as_its_trace(quiet: Tracing, parent: str, state: str) -> None:
    carrier = {"traceparent": parent, "tracestate": state}
    quiet.record(Ended("Generate", "a", "", time.monotonic(), grpc.StatusCode.OK, [], carrier))


@pytest.mark.parametrize("state", ["no state", "a=b," * 40, "a=1,a=2", "=" * 600])
def test_what_a_client_sends_as_its_trace_is_not_logged(
    quiet: Tracing, caplog: pytest.LogCaptureFixture, state: str
) -> None:
    carrier = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "tracestate": state}
    quiet.record(Ended("Generate", "a", "", time.monotonic(), grpc.StatusCode.OK, [], carrier))
    assert caplog.records == []


TIMES = st.floats(0.001, 1000.0)


@given(st.lists(TIMES, min_size=9, max_size=9).map(sorted), st.sets(st.integers(1, 8)))
def test_phases_follow_each_other(times: list[float], missing: set[int]) -> None:
    arrival, asked, handed, scheduled, first, lost, again, lost_again, finished = times
    given_ = {
        name: 0.0 if number in missing else value
        for number, (name, value) in enumerate(
            [
                ("handoff_started", asked),
                ("handoff_ended", handed),
                ("first_scheduled", scheduled),
                ("first_token", first),
                ("lost", lost_again),
                ("finished", finished),
            ],
            start=1,
        )
    }
    if not given_["first_scheduled"]:
        given_["first_token"] = 0.0
    metrics = RequestMetrics(arrival=arrival, recoveries=((lost, again),), **given_)
    found = list(phases(metrics, now=finished))
    assert found[0].name == "queue" and found[0].start == arrival
    assert all(arrival <= phase.start <= phase.end <= finished for phase in found)
    main = [phase for phase in found if phase.name != "recovery"]
    assert all(before.end <= after.start for before, after in itertools.pairwise(main))
    assert ("handoff" in {one.name for one in found}) == bool(given_["handoff_started"])


def test_a_replica_and_a_tenant_are_named(collector: Collector) -> None:
    tracing = Tracing(collector.url, "tiny")
    request = Request("a", PROMPT, PARAMS, RowSampling(), 5)
    now = time.monotonic()
    request.metrics = RequestMetrics(now, now + 0.1, now + 0.2, now + 0.3, replica="replica-2")
    tracing.record(Ended("Generate", "a", "alice", now, grpc.StatusCode.CANCELLED, [request], {}))
    tracing.close()
    root = collector.trace()["Generate"]
    found = attributes(root)
    assert (found["headwise.replica"], found["headwise.tenant"]) == ("replica-2", "alice")
    assert root.status.message == "CANCELLED"
