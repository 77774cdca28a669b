"""What a client does, on purpose or not, costs no other client anything."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headwise.cluster.group import ShardGroupDied
from headwise.runtime import SamplingParams
from headwise.runtime.client import ServerError
from headwise.runtime.inputs.processor import MAX_MESSAGES, InputProcessor
from headwise.runtime.server.options import ServeOptions, checked
from headwise.runtime.server.serve import Server
from headwise.runtime.server.sessions import MAX_ABORTED, MAX_SUBSCRIBERS
from headwise.v1 import inference_pb2 as pb
from headwise.v1.inference_pb2_grpc import InferenceServiceStub
from tests.byte_tokenizer import VOCAB, write_byte_tokenizer
from tests.checkpoints import write_checkpoint
from tests.runtime.server.conftest import DEADLINE_S, Running, steps_held
from tests.runtime.server.test_service import PROMPT, no_blocks_are_held, wait_until
from tests.thread_group import ThreadShardGroup

Serve = Callable[..., Running]
TOKEN = "alice-0123456789abcdef"
LONG = SamplingParams(max_tokens=400, ignore_eos=True)
SHORT = SamplingParams(max_tokens=2, ignore_eos=True)


def code_of(error: BaseException) -> grpc.StatusCode:
    assert isinstance(error, (grpc.Call, ServerError))
    return error.code() if isinstance(error, grpc.Call) else error.code


def spoken(tmp_path: Path) -> Path:
    """A model with a tokenizer."""
    write_byte_tokenizer(write_checkpoint(tmp_path, 8, 4, vocab_size=VOCAB))
    return tmp_path


def test_a_call_that_leaves_while_the_engine_is_in_a_step(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve()
    with running.client() as client, grpc.insecure_channel(running.address) as channel:
        stream, stub = client.stream(PROMPT, LONG), InferenceServiceStub(channel)
        next(stream)
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT))
        with steps_held(monkeypatch) as go_on:
            calls: list[Callable[[], Any]] = [
                lambda: list(stub.Generate(request, timeout=0.3)),
                lambda: stub.GetStats(pb.GetStatsRequest(), timeout=0.3),
                lambda: list(stub.SubscribeKvEvents(pb.SubscribeKvEventsRequest(), timeout=0.3)),
            ]
            for call in calls:
                with pytest.raises(grpc.RpcError) as error:
                    call()
                assert code_of(error.value) is grpc.StatusCode.DEADLINE_EXCEEDED
            go_on.set()
            assert list(stream)[-1].completion_tokens == 400  # type: ignore[union-attr]
        assert client.generate(PROMPT, SHORT).completion_tokens == 2
        subscribers = running.llm.engine.events._subscribers
        wait_until(lambda: all(subscriber._closed for subscriber in subscribers))
    assert running.end() == 0


def test_who_has_no_token_is_logged(serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tokens").write_text(f"alice {TOKEN}\n")
    running = serve(options={"token_file": tmp_path / "tokens"})
    with caplog.at_level(logging.INFO, "headwise.requests"), running.client(retries=0) as client:
        with pytest.raises(ServerError) as error:
            client.stats()
        assert error.value.code is grpc.StatusCode.UNAUTHENTICATED
    [line] = [json.loads(record.message) for record in caplog.records if record.name == "headwise.requests"]
    assert line["code"] == "UNAUTHENTICATED" and line["peer"].startswith("ipv4:127.0.0.1:") and line["time"]


def test_who_has_no_token_takes_no_room(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"alice {TOKEN}\n")
    running = serve(options={"token_file": path, "metrics_port": 0}, max_queued_requests=1, max_num_seqs=1)
    limit = 1 + 1 + 256
    with grpc.insecure_channel(running.address) as channel, running.client(token=TOKEN) as alice:
        silent = channel.stream_stream("/headwise.v1.InferenceService/Generate")  # never sends its message
        calls = [silent(iter(threading.Event().wait, True), timeout=DEADLINE_S) for _ in range(limit + 50)]
        for call in calls:
            assert call.code() is grpc.StatusCode.UNAUTHENTICATED
        rss = psutil.Process().memory_info().rss
        big = pb.GenerateRequest(text="x" * (4 << 20)).SerializeToString()
        unread = [channel.unary_unary("/headwise.v1.InferenceService/Generate").future(big) for _ in range(30)]
        assert {call.code() for call in unread} == {grpc.StatusCode.UNAUTHENTICATED}
        assert psutil.Process().memory_info().rss - rss < 200 << 20
        assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
        assert alice.generate(PROMPT, SHORT).completion_tokens == 2
        assert f'headwise_requests_total{{code="UNAUTHENTICATED"}} {limit + 80}.0' in running.metrics()


def many(kind: str) -> pb.GenerateRequest:
    """A request with millions of entries in one of its lists."""
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[3]))
    if kind == "messages":
        return pb.GenerateRequest.FromString(_repeated(pb.GenerateRequest(messages=pb.Messages()), b"\n\0" * (2 << 20)))
    if kind == "prompt":
        request.token_ids.ids.extend([3] * (4 << 20))
    elif kind == "stop":
        request.sampling_params.stop.extend(["a"] * (1 << 20))
    elif kind == "stop_token_ids":
        request.sampling_params.stop_token_ids.extend([3] * (4 << 20))
    elif kind == "logit_bias":
        request.sampling_params.logit_bias.update(dict.fromkeys(range(300_000), 1.0))
    elif kind == "structured_outputs.choice":
        request.sampling_params.structured_outputs.choice.choices.extend(["a"] * (1 << 20))
    return request


def _repeated(request: pb.GenerateRequest, data: bytes) -> bytes:
    """The wire form of ``messages`` (field 4) with this content."""
    size, varint = len(data), b""
    while size:
        varint += bytes([size & 127 | (128 if size > 127 else 0)])
        size >>= 7
    return b"\x22" + varint + data


@pytest.mark.parametrize(
    "kind", ["messages", "prompt", "stop", "stop_token_ids", "logit_bias", "structured_outputs.choice"]
)
def test_millions_of_entries_are_refused_at_once(serve: Serve, tmp_path: Path, kind: str) -> None:
    running = serve(spoken(tmp_path))
    request = many(kind)
    assert kind != "messages" or len(request.messages.messages) > MAX_MESSAGES
    with grpc.insecure_channel(running.address) as channel:
        rss, started = psutil.Process().memory_info().rss, time.monotonic()
        with pytest.raises(grpc.RpcError) as error:
            list(InferenceServiceStub(channel).Generate(request, timeout=DEADLINE_S))
        assert code_of(error.value) is grpc.StatusCode.INVALID_ARGUMENT
        assert str(error.value.details()).startswith(f"{kind}=")  # type: ignore[attr-defined]
        assert len(str(error.value.details())) < 400  # type: ignore[attr-defined]
        # Far more than it takes, far less than copying it all would.
        assert time.monotonic() - started < 5 and psutil.Process().memory_info().rss - rss < 600 << 20


def test_a_call_ends_a_bounded_number_of_requests(serve: Serve) -> None:
    running = serve()
    with running.client(retries=0) as client:
        names = [f"request {number}" for number in range(MAX_ABORTED)]
        stream = client.stream(PROMPT, LONG, request_id=names[-1])
        next(stream)
        with pytest.raises(ServerError, match="at most; make several") as error:
            client.abort(*names, "one more")
        assert error.value.code is grpc.StatusCode.INVALID_ARGUMENT and error.value.field == "request_ids"
        client.abort(*names)
        assert list(stream)[-1].samples[0].finish_reason == "abort"  # type: ignore[union-attr]
        sessions = running.server.sessions
        wait_until(lambda: not sessions._named and not sessions.num_calls)


def test_a_bounded_number_of_clients_is_told_of_kv_events(serve: Serve) -> None:
    running = serve()
    with grpc.insecure_channel(running.address) as channel:
        stub = InferenceServiceStub(channel)
        subscribed = [
            stub.SubscribeKvEvents(pb.SubscribeKvEventsRequest(), timeout=DEADLINE_S) for _ in range(MAX_SUBSCRIBERS)
        ]
        for one in subscribed:
            assert next(one).snapshot
        with pytest.raises(grpc.RpcError, match=f"{MAX_SUBSCRIBERS} clients are told") as error:
            next(stub.SubscribeKvEvents(pb.SubscribeKvEventsRequest(), timeout=DEADLINE_S))
        assert code_of(error.value) is grpc.StatusCode.RESOURCE_EXHAUSTED
        subscribed[0].cancel()
        wait_until(lambda: running.server.sessions._num_subscribers < MAX_SUBSCRIBERS)
        assert next(stub.SubscribeKvEvents(pb.SubscribeKvEventsRequest(), timeout=DEADLINE_S)).snapshot


def test_text_that_cannot_fit_is_not_tokenized(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve(spoken(tmp_path), max_model_len=64)
    tokenizer = running.llm.inputs.tokenizer
    assert tokenizer is not None and tokenizer.max_token_bytes < 20
    monkeypatch.setattr(type(tokenizer), "encode", lambda *_: pytest.fail("tokenized"))
    with running.client() as client:
        calls: list[tuple[Callable[[], Any], str]] = [
            (lambda: client.generate("x" * 100_000), "prompt"),
            (lambda: client.tokenize("x" * 100_000), "prompt"),
            (lambda: client.generate([{"role": "user", "content": "x" * 900}] * 2), "messages"),
            (lambda: client.generate([{"role": "x" * 65, "content": "x"}]), "messages"),
            (lambda: client.detokenize([5] * 65), "token_ids"),
            (lambda: client.detokenize([VOCAB]), "token_ids"),
        ]
        for call, field in calls:
            with pytest.raises(ServerError, match=f"{field}=") as error:
                call()
            assert error.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_tokenizing_has_the_limits_of_other_calls(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    running = serve(spoken(tmp_path), options={"max_request_s": 1.5, "metrics_port": 0})
    go_on, long = threading.Event(), "x" * 40_000
    monkeypatch.setattr(InputProcessor, "encode", lambda *_: go_on.wait(DEADLINE_S) and [3])
    with caplog.at_level(logging.INFO, "headwise.requests"), grpc.insecure_channel(running.address) as channel:
        monkeypatch.setattr("headwise.runtime.server.sessions.MAX_CHECKING", 2)
        stub = InferenceServiceStub(channel)
        calls = [stub.Tokenize.future(pb.TokenizeRequest(text=long), timeout=1.0) for _ in range(3)]
        codes = sorted(call.code().name for call in calls)
        assert codes == ["DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"]
        # Those that have left still stand in the queue.
        with pytest.raises(grpc.RpcError, match="2 requests with a long text"):
            stub.Tokenize(pb.TokenizeRequest(text=long), timeout=1.0)
        monkeypatch.setattr("headwise.runtime.server.sessions.MAX_CHECKING", 3)
        late = stub.Tokenize.future(pb.TokenizeRequest(text=long))  # without a deadline
        assert late.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        go_on.set()
        assert stub.Detokenize(pb.DetokenizeRequest(token_ids=[3]), timeout=1.0).text
        wait_until(lambda: not running.server.sessions._checking)
        gc.collect()
        assert not [record for record in caplog.records if record.name == "asyncio"]
        running.server.sessions.draining = True  # and not drain(), after which the server, where nothing runs, ends
        for call in (
            stub.Tokenize.future(pb.TokenizeRequest(text="x")),
            stub.Detokenize.future(pb.DetokenizeRequest(token_ids=[3])),
        ):
            assert call.code() is grpc.StatusCode.UNAVAILABLE
        text = running.metrics()
    # Of the two whose client's deadline was over, the server may have heard that their client has left.
    for line in (
        '{code="DEADLINE_EXCEEDED"} ',
        '{code="RESOURCE_EXHAUSTED"} 2.0',
        '{code="OK"} 1.0',
        '{code="UNAVAILABLE"} 2.0',
    ):
        assert f"headwise_tokenizations_total{line}" in text, line
    methods = [json.loads(record.message)["method"] for record in caplog.records if record.name == "headwise.requests"]
    assert methods.count("Tokenize") == 6 and methods.count("Detokenize") == 2


def test_a_deadline_has_a_limit_and_none_is_the_limit(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve(options={"max_request_s": 1.0, "metrics_port": 0})
    with running.client(retries=0) as client:
        assert client.model().limits.max_request_seconds == 1.0
        with pytest.raises(ServerError, match="deadline=") as error:
            client.generate(PROMPT, SHORT, timeout=60)
        assert error.value.code is grpc.StatusCode.INVALID_ARGUMENT
    with grpc.insecure_channel(running.address) as channel, steps_held(monkeypatch):
        stream = InferenceServiceStub(channel).Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT)))
        with pytest.raises(grpc.RpcError) as late:
            list(stream)  # while the step still hangs
    assert code_of(late.value) is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until(lambda: no_blocks_are_held(running))
    assert 'headwise_requests_total{code="DEADLINE_EXCEEDED"} 1.0' in running.metrics()


def test_what_a_call_ended_with_is_counted(serve: Serve) -> None:
    running = serve(options={"metrics_port": 0})
    with running.client(retries=0) as client:
        stream = client.stream(PROMPT, LONG, request_id="one")
        next(stream)
        with pytest.raises(ServerError, match="still runs"):
            client.generate(PROMPT, SHORT, request_id="one")
        list(stream)
        text = running.metrics()
    for line in ('code="INVALID_ARGUMENT"} 1.0', 'code="OK"} 1.0', f"headwise_prompt_tokens_total {len(PROMPT)}.0"):
        assert line in text, line


def test_shards_that_die_while_nothing_runs_end_the_server(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    make_server, seen = Server._make_server, threading.Event()

    def patient(*about: Any) -> grpc.aio.Server:
        """One that cuts no connection before its end was seen: what it has sent could be lost."""
        server = make_server(*about)
        stop = server.stop

        async def stop_when_seen(grace: float | None) -> None:
            assert await asyncio.to_thread(seen.wait, DEADLINE_S)
            await stop(grace)

        monkeypatch.setattr(server, "stop", stop_when_seen)
        return server

    monkeypatch.setattr(Server, "_make_server", patient)
    running = serve(on_shard_death="fail")
    with grpc.insecure_channel(running.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        monkeypatch.setattr(ThreadShardGroup, "death", ShardGroupDied(0, "here", "for the test"))
        try:
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        finally:
            seen.set()
    assert running.exit_code.result(DEADLINE_S) == 3


def test_metrics_stay_on_loopback_wherever_the_server_is() -> None:
    options = ServeOptions("tiny", host="0.0.0.0", insecure=True, metrics_port=0)
    checked(options)
    assert options.metrics_host == "127.0.0.1"
