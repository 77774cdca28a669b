"""What operators rely on: health, reflection, metrics, logs, pings, large messages, a dead engine."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from headwise.runtime import SamplingParams
from headwise.runtime.client import ServerError
from headwise.runtime.config import handoff_config
from headwise.runtime.engine.loop import is_hung
from headwise.runtime.server import serve as serve_module
from headwise.v1 import inference_pb2 as pb
from headwise.v1.inference_pb2_grpc import InferenceServiceStub
from headwise.workers.plan import StepOutput
from tests.plain_group import Bench, make_request
from tests.runtime.conftest import Run
from tests.runtime.server.conftest import DEADLINE_S, Running
from tests.runtime.server.test_service import wait_until
from tests.thread_group import ThreadShardGroup

Serve = Callable[..., Running]
SERVICE = "headwise.v1.InferenceService"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
PROMPT = list(range(3, 40))


def test_reflection_lists_the_services(serve: Serve) -> None:
    with grpc.insecure_channel(serve().address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {SERVICE, "grpc.health.v1.Health"} <= set(database.get_services())
        assert database.FindFileContainingSymbol(SERVICE).package == "headwise.v1"


def test_check_and_watch_follow_a_drain(serve: Serve) -> None:
    running = serve()
    with grpc.insecure_channel(running.address) as channel, running.client() as client:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            assert stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=DEADLINE_S).status == SERVING
        with pytest.raises(grpc.RpcError) as error:
            stub.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=DEADLINE_S)
        assert error.value.code() is grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=DEADLINE_S)
        assert next(watch).status == SERVING
        stream = client.stream(PROMPT, SamplingParams(max_tokens=450, ignore_eos=True))
        next(stream)
        running.stop()
        assert next(watch).status == NOT_SERVING
        assert list(stream)[-1].completion_tokens == 450  # type: ignore[union-attr]


def test_a_hung_step_turns_it_not_serving_and_back(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    hang, go_on = threading.Event(), threading.Event()
    collect = ThreadShardGroup.collect

    def slow(group: ThreadShardGroup) -> object:
        if hang.is_set():
            assert go_on.wait(DEADLINE_S)
        return collect(group)

    monkeypatch.setattr(ThreadShardGroup, "collect", slow)
    running = serve(step_timeout=0.3, on_shard_death="fail")
    with grpc.insecure_channel(running.address) as channel, running.client() as client:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
        assert next(watch).status == SERVING
        stream = client.stream(PROMPT, SamplingParams(max_tokens=20, ignore_eos=True))
        hang.set()
        threading.Thread(target=lambda: list(stream), daemon=True).start()
        assert next(watch).status == NOT_SERVING
        hang.clear()
        go_on.set()
        assert next(watch).status == SERVING


def test_a_step_of_a_slow_model_is_not_hung(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    bench = Bench()
    step = bench.group.collect

    def slow() -> StepOutput:
        nonlocal now
        now += 30.0
        return step()

    monkeypatch.setattr(bench.group, "collect", slow)
    bench.engine.busy_since = now
    now += 599.0
    assert not is_hung(bench.engine), "no step was measured"
    now += 2.0
    assert is_hung(bench.engine)
    bench.add(make_request("a", [1, 2, 3], 1))
    bench.engine.step()
    bench.engine.busy_since = now
    now += 100.0
    assert not is_hung(bench.engine), "steps take 30 s here"
    now += 21.0
    assert is_hung(bench.engine)
    now += 3600.0
    bench.engine.busy_since = now
    now += 100.0
    assert is_hung(bench.engine), "that was long ago"


def test_a_dead_engine_ends_the_server(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve(on_shard_death="fail")

    def die(group: ThreadShardGroup) -> object:
        from headwise.cluster.group import ShardGroupDied

        raise ShardGroupDied(0, "here", "for the test")

    with running.client(retries=0) as client:
        stream = client.stream(PROMPT, SamplingParams(max_tokens=400, ignore_eos=True))
        next(stream)
        monkeypatch.setattr(ThreadShardGroup, "collect", die)
        with pytest.raises(ServerError) as error:
            list(stream)
        assert error.value.code is grpc.StatusCode.UNAVAILABLE
    assert running.exit_code.result(DEADLINE_S) == 3


def test_metrics_are_scraped(serve: Serve) -> None:
    running = serve(options={"metrics_port": 0})
    with running.client() as client:
        client.generate(PROMPT, SamplingParams(max_tokens=5, ignore_eos=True))
        with pytest.raises(ServerError):
            client.generate([1000])
    text = running.metrics()
    for line in (
        'headwise_requests_total{code="OK"} 1.0',
        'headwise_requests_total{code="INVALID_ARGUMENT"} 1.0',
        "headwise_generated_tokens_total 5.0",
        f"headwise_prompt_tokens_total {len(PROMPT)}.0",
        "headwise_time_to_first_token_seconds_count 1.0",
        "headwise_inter_token_latency_seconds_count 1.0",
        'headwise_request_duration_seconds_bucket{le="3600.0"} 1.0',
        "headwise_engine_up 1.0",
        "headwise_requests_running 0.0",
        f'headwise_prefix_cache_queried_tokens_total{{tier="device"}} {len(PROMPT)}.0',
    ):
        assert line in text, line


def test_handoffs_are_scraped_and_a_result_says_who_computed_its_prompt(serve: Serve) -> None:
    settings = {"prefill": {}, "handoff": handoff_config(role="decode", min_tokens=32)}
    running = serve(options={"metrics_port": 0}, **settings)
    with running.client() as client:
        handed = client.generate(PROMPT, SamplingParams(max_tokens=2, ignore_eos=True))
        short = client.generate(PROMPT[5:15], SamplingParams(max_tokens=2, ignore_eos=True))
        stats = json.loads(client.stats().json)
    assert (handed.prefilled_by, handed.handoff_tokens, handed.cached_tokens) == ("prefill", 32, 32)
    assert (short.prefilled_by, short.handoff_tokens) == (None, 0)
    num_bytes = stats["handoff"]["bytes"]
    text = running.metrics()
    for line in (
        'headwise_handoffs_total{cause="",outcome="committed",role="decode"} 1.0',
        'headwise_handoffs_total{cause="",outcome="cancelled",role="decode"} 0.0',
        'headwise_handoffs_total{cause="lease",outcome="fallback",role="decode"} 0.0',
        'headwise_handoffs_total{cause="transport",outcome="fallback",role="decode"} 0.0',
        'headwise_handoffs_total{cause="",outcome="committed",role="prefill"} 1.0',
        f'headwise_handoff_bytes_total{{role="decode"}} {float(num_bytes)}',
        f'headwise_handoff_bytes_total{{role="prefill"}} {float(num_bytes)}',
        'headwise_handoff_prompt_tokens_total{role="decode"} 32.0',
        'headwise_handoff_seconds_total{role="decode"} ',
        'headwise_handoff_push_seconds_total{role="prefill"} ',
        'headwise_handoff_hidden_push_seconds_total{role="prefill"} ',
        'headwise_handoff_push_failures_total{role="prefill"} 0.0',
        'headwise_handoffs_in_flight{role="decode"} 0.0',
        'headwise_handoff_reserved_blocks{role="decode"} 0.0',
        'headwise_handoff_oldest_seconds{role="decode"} 0.0',
        'headwise_handoff_peer_connected{peer="prefill"} 1.0',
    ):
        assert line in text, line
    assert num_bytes > 0 and 'headwise_handoff_pushes_total{role="decode"}' not in text


def test_a_server_without_handoffs_has_no_metrics_of_them(serve: Serve) -> None:
    assert "handoff" not in serve(options={"metrics_port": 0}).metrics()


def test_the_line_of_a_call_whose_client_has_left_says_who_it_was(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    running = serve()
    with caplog.at_level(logging.INFO, "headwise.requests"), grpc.insecure_channel(running.address) as channel:
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=PROMPT), sampling_params=pb.SamplingParams(ignore_eos=True, max_tokens=450)
        )
        call = InferenceServiceStub(channel).Generate(request, timeout=DEADLINE_S)
        next(call)
        call.cancel()
        wait_until(lambda: any(record.name == "headwise.requests" for record in caplog.records))
    [line] = [json.loads(record.message) for record in caplog.records if record.name == "headwise.requests"]
    assert line["code"] == "CANCELLED" and line["peer"].startswith("ipv4:127.0.0.1:")


def test_a_request_is_one_line_without_its_prompt(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "headwise.requests"), serve().client() as client:
        client.generate(PROMPT, SamplingParams(max_tokens=5, ignore_eos=True), request_id="mine")
    [line] = [json.loads(record.message) for record in caplog.records if record.name == "headwise.requests"]
    assert line["request"] == "mine" and line["code"] == "OK" and line["tokens"] == [5]
    assert datetime.now(UTC) - datetime.fromisoformat(line["time"]) < timedelta(seconds=DEADLINE_S)
    assert line["peer"].startswith("ipv4:127.0.0.1:")
    assert line["prompt_tokens"] == len(PROMPT) and str(PROMPT)[1:-1] not in str(line)


@pytest.mark.thorough
def test_a_client_may_ping_every_second_and_a_large_message_is_refused(serve: Serve) -> None:
    running = serve()
    options = [
        ("grpc.keepalive_time_ms", 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    with grpc.insecure_channel(running.address, options) as channel:
        stub = InferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as error:
            list(stub.Generate(pb.GenerateRequest(text="x" * (100 << 20)), timeout=DEADLINE_S))
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
        # A few pings' time: a server that minds them has closed the connection by then.
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=4.5)
        with pytest.raises(grpc.RpcError) as over:
            list(watch)
        assert over.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT), sampling_params=pb.SamplingParams(max_tokens=2))
        assert list(stub.Generate(request, timeout=DEADLINE_S))[-1].HasField("result")


def test_kv_events_start_with_a_snapshot(serve: Serve) -> None:
    from headwise.runtime.kv.events import Stored, decode_events, decode_snapshot

    running = serve()
    with grpc.insecure_channel(running.address) as channel, running.client() as client:
        events = InferenceServiceStub(channel).SubscribeKvEvents(pb.SubscribeKvEventsRequest(), timeout=DEADLINE_S)
        assert decode_snapshot(next(events).snapshot).blocks["device"] == {}
        client.generate(PROMPT, SamplingParams(max_tokens=2, ignore_eos=True))
        message = decode_events(next(events).events)
        assert [type(event) for event in message.events] == [Stored] and len(message.events[0].digests) == 2
        events.cancel()


@pytest.mark.parametrize(
    ("options", "name"), [([], "my-model"), (["--name", "a/b"], "a/b"), (["--model", "smollm2"], "smollm2")]
)
def test_a_models_name_is_not_its_path(
    headwise: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: list[str], name: str
) -> None:
    served: list[str] = []
    monkeypatch.setattr(serve_module, "serve", lambda _, about: served.append(about.name))
    assert headwise("serve", "--model", str(tmp_path / "my-model"), *options)[0] == 0
    assert served == [name]


def test_addresses_of_ipv6_are_in_brackets(serve: Serve) -> None:
    running = serve(options={"host": "::1", "metrics_host": "::1", "metrics_port": 0})
    assert running.address.startswith("[::1]:") and running.about["metrics"].startswith("[::1]:")
    with running.client(token="a-token-for-nobody") as client:
        assert client.generate(PROMPT, SamplingParams(max_tokens=2)).completion_tokens
    assert "headwise_engine_up 1.0" in running.metrics()
