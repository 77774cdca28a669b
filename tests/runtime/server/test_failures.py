"""What a client and an operator see when something goes wrong in the server itself."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from headwise.cluster.group import ShardGroupDied
from headwise.runtime import SamplingParams, start
from headwise.runtime.aio import AsyncLLM
from headwise.runtime.client import ServerError
from headwise.runtime.config import engine_config
from headwise.runtime.inputs.processor import InputProcessor
from headwise.runtime.server import convert
from headwise.runtime.server import serve as module
from headwise.runtime.server.serve import ServeOptions, Server
from headwise.runtime.server.sessions import MAX_CHECKING
from headwise.v1 import inference_pb2 as pb
from headwise.v1.inference_pb2_grpc import InferenceServiceStub
from headwise.workers.plan import StepPlan
from headwise.workers.runner import Launched
from headwise.workers.shard import Shard
from tests.runtime.server.conftest import DEADLINE_S, Running, steps_held
from tests.runtime.server.test_service import PROMPT, TO_THE_END, no_blocks_are_held, wait_until
from tests.thread_group import ThreadShardGroup, thread_groups

Serve = Callable[..., Running]
SHORT = SamplingParams(max_tokens=2, ignore_eos=True)


def die_with(error: BaseException) -> Callable[[object], object]:
    def die(group_or_engine: object) -> object:
        raise error

    return die


@pytest.mark.parametrize("error", [RuntimeError("for the test"), ShardGroupDied(0, "here", "x" * 8000)])
def test_whatever_ends_the_engine_the_client_may_ask_another(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    running = serve(on_shard_death="fail")
    with running.client(retries=0) as client:
        stream = client.stream(PROMPT, TO_THE_END)
        next(stream)
        monkeypatch.setattr(ThreadShardGroup, "collect", die_with(error))
        with pytest.raises(ServerError) as caught:
            list(stream)
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert running.exit_code.result(DEADLINE_S) == 3


def test_a_server_whose_engine_ended_before_anybody_asked_it_ends(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "make_factory", thread_groups())
    llm = AsyncLLM(engine_config(model=str(checkpoint("gqa")), kv_memory="16MiB", on_shard_death="fail"), quiet=True)

    async def run() -> int:
        await asyncio.wait_for(llm.ended.wait(), DEADLINE_S)
        return await asyncio.wait_for(Server(llm, ServeOptions("tiny", port=0)).run(print), DEADLINE_S)

    try:
        with pytest.raises(ShardGroupDied):
            llm.submit(die_with(ShardGroupDied(0, "here", "killed"))).result(DEADLINE_S)
        assert asyncio.run(run()) == 3
    finally:
        llm.shutdown()


def test_an_error_of_the_server_itself_is_logged_without_what_it_says(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said = "part of a prompt"

    def stumble(*_: Any) -> None:
        raise KeyError(said)

    running = serve()
    with running.client() as client, caplog.at_level(logging.INFO, "headwise"):
        monkeypatch.setattr(convert, "increments", stumble)
        with pytest.raises(ServerError) as error:
            client.generate(PROMPT, SHORT, request_id="mine")
    assert error.value.code is grpc.StatusCode.INTERNAL and said not in str(error.value)
    assert "in stumble" in caplog.text and said not in caplog.text
    assert '"request": "mine", "tenant": "", "code": "INTERNAL"' in caplog.text
    wait_until(lambda: no_blocks_are_held(running))


def test_stopping_twice_ends_at_once_while_a_step_hangs(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve()
    with running.client(retries=0) as client:
        stream = client.stream(PROMPT, TO_THE_END)
        next(stream)
        with steps_held(monkeypatch):
            running.stop()
            running.stop()
            assert running.exit_code.result(DEADLINE_S / 3) == 1
        with pytest.raises(ServerError):
            list(stream)


def test_stopping_twice_ends_soon_while_a_rank_hangs(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve()
    reached, go_on, launch = threading.Event(), threading.Event(), Shard.launch

    def held(shard: Shard, plan: StepPlan) -> Launched:
        reached.set()
        assert go_on.wait(DEADLINE_S)
        return launch(shard, plan)

    with running.client(retries=0) as client:
        stream = client.stream(PROMPT, TO_THE_END)
        next(stream)
        monkeypatch.setattr(Shard, "launch", held)
        try:
            assert reached.wait(DEADLINE_S)
            running.stop()
            running.stop()
            assert running.exit_code.result(DEADLINE_S / 3) == 1
        finally:
            go_on.set()
        with pytest.raises(ServerError):
            list(stream)


def held_checks(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """No prompt is checked before the event is set."""
    go_on, token_ids = threading.Event(), InputProcessor.token_ids

    def held(inputs: InputProcessor, prompt: Any) -> list[int]:
        assert go_on.wait(DEADLINE_S)
        return token_ids(inputs, prompt)

    monkeypatch.setattr(InputProcessor, "token_ids", held)
    return go_on


def test_a_request_can_be_ended_while_it_is_checked(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve(options={"metrics_port": 0})
    go_on = held_checks(monkeypatch)
    with grpc.insecure_channel(running.address) as channel, running.client() as client:
        stub = InferenceServiceStub(channel)
        request = pb.GenerateRequest(request_id="one", token_ids=pb.TokenIds(ids=PROMPT))
        aborted = stub.Generate(request, timeout=DEADLINE_S)
        wait_until(lambda: running.server.sessions.num_calls == 1)
        with pytest.raises(ServerError, match="still runs"):
            client.generate(PROMPT, SHORT, request_id="one")
        client.abort("one")
        with pytest.raises(ServerError) as late:
            client.generate(PROMPT, SHORT, timeout=0.3)
        assert late.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        wait_until(lambda: running.server.sessions.num_calls == 1)
        go_on.set()
        [result] = [response.result for response in aborted if response.HasField("result")]
        assert result.samples[0].finish_reason == pb.FINISH_REASON_ABORT and result.usage.completion_tokens == 0
        assert result.timings.total >= 0.3  # from its arrival
    assert running.stats()["num_generated_tokens"] == 0
    text = running.metrics()
    for line in (
        'headwise_requests_total{code="OK"} 1.0',
        'headwise_requests_total{code="INVALID_ARGUMENT"} 1.0',
        'headwise_requests_total{code="DEADLINE_EXCEEDED"} 1.0',
    ):
        assert line in text, line


def test_a_drain_that_ends_a_request_while_it_is_checked_says_so(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve(options={"drain_timeout_s": 0.1})
    go_on = held_checks(monkeypatch)
    with grpc.insecure_channel(running.address) as channel:
        call = InferenceServiceStub(channel).Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT)))
        wait_until(lambda: running.server.sessions.num_calls == 1)
        running.stop()
        assert call.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
        go_on.set()
    assert running.exit_code.result(DEADLINE_S) == 1


def test_only_so_many_of_a_tenant_wait_to_be_checked(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve()
    go_on = held_checks(monkeypatch)
    long = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[255] * (20 << 10)))
    with grpc.insecure_channel(running.address) as channel, running.client(retries=0) as client:
        calls = [InferenceServiceStub(channel).Generate(long, timeout=DEADLINE_S) for _ in range(MAX_CHECKING)]
        wait_until(lambda: running.server.sessions.num_calls == MAX_CHECKING)
        with pytest.raises(ServerError) as error:
            client.generate(list(long.token_ids.ids), SHORT)
        assert error.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED and error.value.retry_after_s == 1.0
        go_on.set()
        for call in calls:
            assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert client.generate(PROMPT, SHORT).completion_tokens == 2


def test_a_cancelled_request_is_measured(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    running = serve(options={"metrics_port": 0})
    with running.client() as client, caplog.at_level(logging.INFO, "headwise.requests"):
        stream = client.stream(PROMPT, TO_THE_END)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        wait_until(lambda: no_blocks_are_held(running) and running.server.sessions.num_calls == 0)
    text = running.metrics()
    assert "headwise_request_duration_seconds_count 1.0" in text
    assert f"headwise_generated_tokens_total {running.stats()['num_generated_tokens']}.0" in text
    [line] = [json.loads(record.message) for record in caplog.records if record.name == "headwise.requests"]
    assert line["code"] == "CANCELLED" and line["total_s"] > 0


def test_many_samples_that_are_read_are_not_paused(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve(max_num_seqs=64, kv_memory="64MiB")
    paused: list[bool] = []
    monkeypatch.setattr(type(running.llm.engine), "pause", lambda engine, request_id, paused_: paused.append(paused_))
    with running.client() as client:
        completion = client.generate(PROMPT, SamplingParams(n=64, max_tokens=30, ignore_eos=True))
    assert completion.completion_tokens == 64 * 30 and not paused


def test_until_the_context_is_full(serve: Serve) -> None:
    with serve().client() as client:
        assert client.generate(PROMPT, TO_THE_END).completion_tokens == 512 - len(PROMPT)


def test_a_subscriber_that_fell_behind_gets_a_snapshot(serve: Serve) -> None:
    running = serve()
    with grpc.insecure_channel(running.address) as channel:
        request = pb.SubscribeKvEventsRequest(capacity=1)
        events = InferenceServiceStub(channel).SubscribeKvEvents(request, timeout=DEADLINE_S)
        assert next(events).HasField("snapshot")

        def happen(engine: Any) -> None:
            for number in range(3):
                engine.events.stored([bytes([number]) * 32], bytes(32), "device")
                engine.events.flush()

        running.llm.submit(happen).result(DEADLINE_S)
        assert next(events).HasField("snapshot")
        events.cancel()


class FakeLLM:
    """Stands for a model that has been loaded."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.was_shut_down = False
        FakeLLM.last = self

    def handoff_service(self) -> None:
        return None

    def shutdown(self) -> None:
        self.was_shut_down = True

    last: FakeLLM


@pytest.mark.parametrize("ending", [lambda: os.kill(os.getpid(), signal.SIGTERM), lambda: os.stat("/nonexistent")])
def test_what_ends_it_between_loading_and_serving_closes_the_model(
    monkeypatch: pytest.MonkeyPatch, ending: Callable[[], Any]
) -> None:
    def server(*_: Any) -> None:
        ending()
        threading.Event().wait(DEADLINE_S)  # where the signal arrives

    monkeypatch.setattr(module, "AsyncLLM", FakeLLM)
    monkeypatch.setattr(module, "Server", server)
    monkeypatch.setattr(module, "_configure_logging", lambda: None)
    with pytest.raises((KeyboardInterrupt, OSError)):
        module.serve(engine_config(model="nothing"), ServeOptions("nothing"))
    assert FakeLLM.last.was_shut_down
