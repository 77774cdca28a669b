"""A server in front of replicas, which are engines on threads of this process."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from headwise.runtime.aio import AsyncLLM
from headwise.runtime.client import Client, Completion, ServerError
from headwise.runtime.config import EngineConfig
from headwise.runtime.deployment import model as model_module
from headwise.runtime.deployment.options import MAX_REPLICAS, ReplicaOptions
from headwise.runtime.sampling_params import SamplingParams
from headwise.runtime.server import serve as serve_module
from headwise.runtime.server.serve import ServeOptions, Server
from headwise.workers.errors import InvalidValueError
from tests.local_replicas import LocalReplicas
from tests.runtime.deployment.deployed import Deployed, ask_all, greedy, settled, wait_until
from tests.runtime.server.conftest import Running

LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
PROMPT = list(range(3, 40))


@pytest.fixture
def serve(deployed: Deployed) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(replicas: int, **options: Any) -> Running:
        llm = deployed(replicas, **options)
        served = ServeOptions(name="tiny", port=0, metrics_port=0, replicas=ReplicaOptions(replicas))
        started.append(Running(llm, served, control=llm))
        return started[-1]

    yield start
    for running in started:
        running.end()


def test_16_streams_survive_the_death_of_a_replica(
    serve: Callable[..., Running], deployed: Deployed, one: AsyncLLM
) -> None:
    expected = {name: samples[0].tokens for name, samples in zip(
        [name for name, *_ in greedy(16, 60)], ask_all(one, greedy(16, 60)), strict=True
    )}  # fmt: skip
    running, got, begun = serve(2), dict[str, list[int]](), threading.Barrier(17)

    def stream(name: str, prompt: list[int], params: SamplingParams) -> None:
        with running.client() as client:
            for number, item in enumerate(client.stream(prompt, params, request_id=name)):
                if isinstance(item, Completion):
                    got[name] = list(item.samples[0].token_ids)
                elif number == 3:
                    begun.wait(30)

    threads = [threading.Thread(target=stream, args=asked) for asked in greedy(16, 60)]
    for thread in threads:
        thread.start()
    begun.wait(30)
    deployed.kill("replica-1")
    for thread in threads:
        thread.join(60)
    assert got == expected
    settled(deployed.llm)
    wait_until(lambda: deployed.states() == {"replica-2": "serving", "replica-3": "serving"})
    with running.client() as client:
        assert {r.name for r in client.status().replicas} == {"replica-2", "replica-3"}


def test_stats_and_metrics_are_of_all_replicas(serve: Callable[..., Running], deployed: Deployed) -> None:
    running = serve(2)
    with running.client() as client:
        for _ in range(4):
            client.generate(PROMPT, LONG)
        tokens = 4 * LONG.max_tokens
        wait_until(lambda: client.stats().num_generated_tokens == tokens)
        stats = json.loads(client.stats().json)
        assert stats["num_blocks"] == running.llm.num_blocks
        assert len(stats["replicas"]) == 2 and stats["routing"]["replicas"] == 2
        model = client.model()
        assert model.kv_tokens == running.llm.num_blocks * running.llm.config.block_size
        text = running.metrics()
        for line in (
            'headwise_replicas{state="serving"} 2.0',
            'headwise_replica_requests_running{replica="replica-1"} 0.0',
            'headwise_replica_requests_waiting{replica="replica-2"} 0.0',
            "headwise_router_requests 0.0",
            f"headwise_generated_tokens_total {float(tokens)}",
            "headwise_engine_up 1.0",
        ):
            assert line in text
        deployed.kill("replica-1")
        wait_until(lambda: "replica-3" in deployed.states())
        assert client.stats().num_generated_tokens == tokens, "what a dead replica has done was done"


def test_kv_events_are_those_of_one_engine(serve: Callable[..., Running]) -> None:
    from headwise.v1 import inference_pb2 as pb
    from headwise.v1.inference_pb2_grpc import InferenceServiceStub

    with grpc.insecure_channel(serve(2).address) as channel, pytest.raises(grpc.RpcError) as refused:
        next(InferenceServiceStub(channel).SubscribeKvEvents(pb.SubscribeKvEventsRequest(), timeout=30))
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert "KV events are those of one engine" in refused.value.details()


def test_as_many_calls_run_as_all_replicas_may_compute(serve: Callable[..., Running], config: EngineConfig) -> None:
    running = serve(2, most=3)
    assert running.server.sessions.max_calls == 1024 + 3 * config.max_num_seqs + 256


def test_the_server_is_not_serving_while_no_replica_is(
    serve: Callable[..., Running], deployed: Deployed, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, go_on = serve(1), threading.Event()
    start = LocalReplicas.start

    def late(self: LocalReplicas, *arguments: Any) -> Any:
        go_on.wait(60)
        return start(self, *arguments)

    monkeypatch.setattr(LocalReplicas, "start", late)
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(running.address) as channel, running.client() as client:
        stub = health_pb2_grpc.HealthStub(channel)

        def serving() -> bool:
            return bool(stub.Check(health_pb2.HealthCheckRequest(), timeout=30).status == 1)

        assert serving()
        deployed.kill("replica-1")
        wait_until(lambda: not serving())
        waits = threading.Thread(target=client.generate, args=(PROMPT, LONG))
        waits.start()
        wait_until(lambda: client.status().waiting == 1)
        go_on.set()
        wait_until(serving)
        waits.join(60)
        assert not waits.is_alive(), "what waited is computed by the next"


def test_the_server_ends_when_no_replica_can_be_had(
    serve: Callable[..., Running], deployed: Deployed, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headwise.runtime.deployment import fleet

    monkeypatch.setattr(fleet, "MAX_FAILURES", 2)
    monkeypatch.setattr(fleet, "BACKOFF_S", 0.01)

    def fails(*_: Any) -> Any:
        raise InvalidValueError("model", "gone", "is not there")

    running = serve(2)
    monkeypatch.setattr(LocalReplicas, "start", fails)
    deployed.kill("replica-1")
    wait_until(lambda: [r["state"] for r in deployed.llm.status()["replicas"]].count("ended") == 1)
    wait_until(lambda: deployed.llm._front.run(lambda d: [p.due for p in d._fleet.places]) == [None, None])
    with running.client() as client:
        assert client.generate(PROMPT, LONG).samples[0].token_ids, "the other goes on"
        status = deployed.llm.status()["replicas"]
        assert [r["problem"] for r in status if r["state"] == "ended"] == ["model='gone': is not there"]
        errors: list[ServerError] = []

        def ask() -> None:
            with Client(running.address, timeout=60) as other:
                try:
                    other.generate(PROMPT, LONG)
                    other.generate(PROMPT, SamplingParams(max_tokens=400, ignore_eos=True))
                    raise AssertionError("computed by nobody")
                except ServerError as error:
                    errors.append(error)

        deployed.kill("replica-2")
        asks = threading.Thread(target=ask)
        asks.start()
        assert running.exit_code.result(60) == 3
        asks.join(60)
        assert len(errors) == 1


def test_replicas_need_ray(config: EngineConfig) -> None:
    with pytest.raises(InvalidValueError, match="--executor='local'"):
        model_module.make_replicas(config.model_copy(update={"executor": "local"}), ReplicaOptions(2))


def test_serve_starts_replicas_where_they_are_asked_for(
    config: EngineConfig, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Server] = []

    class Serves(Server):
        async def run(self, ready: Callable[[dict[str, Any]], None]) -> int:
            seen.append(self)
            return await super().run(lambda about: (ready(about), self.stop())[0])  # type: ignore[func-returns-value]

    monkeypatch.setattr(serve_module, "make_replicas", lambda config, options: LocalReplicas())
    monkeypatch.setattr(serve_module, "Server", Serves)
    monkeypatch.setattr(serve_module, "_configure_logging", lambda: None)
    assert serve_module.serve(config, ServeOptions("tiny", port=0, replicas=ReplicaOptions(2))) == 0
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, None, None), None),
        ((2, None, None), ReplicaOptions(2)),
        ((None, 2, 4), ReplicaOptions(2, 2, 4, True)),
        ((3, 2, 4), ReplicaOptions(3, 2, 4, True)),
        ((None, None, 4), ReplicaOptions(1, 1, 4, True)),
        ((0, None, None), "--replicas=0: must be from 1"),
        ((MAX_REPLICAS + 1, None, None), "--replicas=65"),
        ((None, 2, None), "--min-replicas=2"),
        ((None, 5, 4), "--min-replicas=5"),
        ((5, 2, 4), "--replicas=5"),
        ((None, None, None, 30.0, 2, 3), ReplicaOptions(3, prefill=2)),
        ((None, 1, 4, 30.0, 2, 3), ReplicaOptions(3, 1, 4, True, prefill=2)),
        ((3, None, None, 30.0, 2, 3), "--replicas=3: --prefill and --decode say"),
        ((None, 1, 4, 30.0, 2, 5), "--replicas=5"),
    ],
)
def test_the_flags_fit_each_other(given: tuple[int | None, ...], expected: ReplicaOptions | str | None) -> None:
    from headwise.runtime.deployment.options import replica_options

    if isinstance(expected, str):
        with pytest.raises(InvalidValueError, match=expected):
            replica_options(*given)
    else:
        assert replica_options(*given) == expected
