"""A server whose shards die: its clients see a pause, and the health service and the metrics say so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headwise.cluster.group import ShardGroup
from headwise.runtime import SamplingParams
from headwise.runtime.client import ServerError
from headwise.runtime.engine.generation import GenerationFactory
from headwise.runtime.kv.events import Cleared, decode_events, decode_snapshot
from headwise.runtime.server.health import HealthMonitor
from headwise.v1 import inference_pb2 as pb
from headwise.v1.inference_pb2_grpc import InferenceServiceStub
from tests.runtime.server.conftest import DEADLINE_S, Running
from tests.runtime.server.test_service import PROMPT, no_blocks_are_held, wait_until

Serve = Callable[..., Running]
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
PARAMS = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


@pytest.fixture
def others_held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No group takes the place of one that died before the event is set."""
    go_on, new_group, first = threading.Event(), GenerationFactory.new_group, [True]

    def held(factory: GenerationFactory) -> ShardGroup:
        assert first.pop() if first else go_on.wait(DEADLINE_S)
        return new_group(factory)

    monkeypatch.setattr(GenerationFactory, "new_group", held)
    yield go_on
    go_on.set()


def kill_a_rank(running: Running, cause: str = "killed for the test") -> None:
    group: Any = running.llm.engine.generation.group
    group._mailbox.declare_dead(1, cause)


def tokens(items: Any) -> list[int]:
    return [token for item in items for token in getattr(item, "token_ids", ())]


def test_a_stream_pauses_and_who_comes_meanwhile_waits(serve: Serve, others_held: threading.Event) -> None:
    running = serve(options={"metrics_port": 0}, tensor_parallel_size=2, max_queued_requests=3)
    with (
        running.client(retries=0) as client,
        grpc.insecure_channel(running.address) as channel,
        ThreadPoolExecutor() as threads,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
        assert next(watch).status == SERVING
        [undisturbed] = client.generate(PROMPT, PARAMS).samples
        stream = client.stream(PROMPT, PARAMS, cache_salt="another")
        begun = [next(stream)]
        kill_a_rank(running)
        assert next(watch).status == NOT_SERVING
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S).status == NOT_SERVING
        stats = running.stats()
        assert stats["recoveries"]["rebuilding"] and stats["recoveries"]["deaths"][-1]["cause"] == "killed for the test"
        for line in ("headwise_rebuilding 1.0", 'headwise_shard_deaths_total{rank="1"} 1.0', "headwise_engine_up 1.0"):
            assert line in running.metrics(), line
        later = [threads.submit(client.generate, PROMPT, PARAMS) for _ in range(2)]
        wait_until(lambda: running.stats()["num_waiting"] == 3)
        with pytest.raises(ServerError) as refused:
            client.generate(PROMPT, PARAMS)
        assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED and refused.value.retry_after_s
        others_held.set()
        assert next(watch).status == SERVING
        *increments, completion = begun + list(stream)
        assert completion.samples[0].token_ids == tokens(increments) == undisturbed.token_ids
        for one in later:
            assert one.result(DEADLINE_S).samples[0].token_ids == undisturbed.token_ids
        wait_until(lambda: no_blocks_are_held(running))
        text, after = running.metrics(), running.stats()
        assert after["epoch"] > stats["epoch"]
        assert {
            "headwise_rebuilding 0.0",
            "headwise_recoveries_total 1.0",
            'headwise_warm_spare{state="none"} 1.0',
        } <= set(text.splitlines())
        assert "headwise_last_recovery_seconds" in text


def test_a_subscriber_hears_of_the_next_epoch(serve: Serve) -> None:
    running = serve(tensor_parallel_size=2)
    with running.client() as client, grpc.insecure_channel(running.address) as channel:
        client.generate(PROMPT, PARAMS)
        events = InferenceServiceStub(channel).SubscribeKvEvents(pb.SubscribeKvEventsRequest(), timeout=DEADLINE_S)
        before = decode_snapshot(next(events).snapshot)
        assert before.blocks["device"]
        kill_a_rank(running)
        message = decode_events(next(events).events)
        while message.epoch == before.epoch:
            message = decode_events(next(events).events)
        assert message.epoch > before.epoch and message.sequence == 0
        assert message.events == (Cleared(None),)
        events.cancel()


def test_the_gateway_is_told_to_go_on(serve: Serve, others_held: threading.Event) -> None:
    """It would refuse requests, which wait here as well."""
    running = serve(tensor_parallel_size=2)
    health = HealthMonitor(running.server.sessions, [])
    kill_a_rank(running)
    wait_until(lambda: health.problem() is not None)
    assert health.lasting_problem() is None
    others_held.set()
    wait_until(lambda: health.problem() is None)


def test_a_server_that_is_stopped_meanwhile_ends(serve: Serve, others_held: threading.Event) -> None:
    running = serve(tensor_parallel_size=2, options={"drain_timeout_s": 0.2})
    with running.client(retries=0) as client, ThreadPoolExecutor() as threads:
        kill_a_rank(running)
        wait_until(lambda: running.llm.engine.rebuilding)
        waiting = threads.submit(client.generate, PROMPT, PARAMS)
        wait_until(lambda: running.stats()["num_waiting"] == 1)
        running.stop()
        with pytest.raises(ServerError):
            waiting.result(DEADLINE_S)
        others_held.set()
        assert running.exit_code.result(DEADLINE_S) == 1
