"""The service as clients see it: tokens, errors, cancelling, draining."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from headwise.runtime import LLM, SamplingParams
from headwise.runtime.client import Completion, Increment, ServerError
from headwise.runtime.server.convert import sampling_message
from headwise.v1 import inference_pb2 as pb
from headwise.v1.inference_pb2_grpc import InferenceServiceStub
from headwise.workers.errors import InvalidValueError
from tests.byte_tokenizer import VOCAB, write_byte_tokenizer
from tests.checkpoints import write_checkpoint
from tests.conftest import MakeLLM
from tests.runtime.server.conftest import DEADLINE_S, Running, steps_held

Serve = Callable[..., Running]
PROMPT = list(range(3, 40))
TO_THE_END = SamplingParams(max_tokens=None, ignore_eos=True)
ROOM = 512 - len(PROMPT)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        threading.Event().wait(0.005)


def no_blocks_are_held(running: Running) -> bool:
    stats = running.stats()
    blocks = stats["prefix_cache"]["blocks"]
    return stats["num_running"] == stats["num_waiting"] == blocks["active"] == blocks["reserved"] == 0


def test_a_client_gets_the_tokens_of_the_driver(
    serve: Serve, thread_llm: MakeLLM, checkpoint: Callable[..., object]
) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=3, n=2)
    llm: LLM = thread_llm(checkpoint("gqa"))
    [expected] = llm.generate([PROMPT], params, use_tqdm=False)
    running = serve()
    with running.client() as client:
        items = list(client.stream(PROMPT, params))
        completion = items[-1]
        assert isinstance(completion, Completion) and all(isinstance(item, Increment) for item in items[:-1])
        for sample, output in zip(completion.samples, expected.outputs, strict=True):
            assert sample.token_ids == output.token_ids and sample.finish_reason == "length"
            assert output.logprobs is not None
            for (logprob, rank, top), token, table in zip(
                sample.logprobs, sample.token_ids, output.logprobs, strict=True
            ):
                assert logprob == pytest.approx(table[token].logprob) and rank == table[token].rank
                assert len(top) == 3 and {i for i, _ in top} <= table.keys()
        assert completion.prompt_tokens == len(PROMPT) and completion.completion_tokens == 40
        assert 0 < completion.time_to_first_token_s <= completion.total_s
        whole = list(client.stream(PROMPT, params, whole=True))
        assert sorted(len(item.token_ids) for item in whole[:-1]) == [20, 20]  # type: ignore[union-attr]
        assert whole[-1].samples == completion.samples  # type: ignore[union-attr]
        again = client.generate(PROMPT, params)
        assert [s.token_ids for s in again.samples] == [s.token_ids for s in completion.samples]
        assert again.cached_tokens == 32
    assert no_blocks_are_held(running)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.GenerateRequest(), "prompt"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), "prompt"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[256])), "prompt"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 512)), "prompt"),
        (pb.GenerateRequest(text="no tokenizer here"), "prompt"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), cache_salt="x" * 257), "cache_salt"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), request_id="x" * 129), "request_id"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), request_id="a\nb"), "request_id"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), sampling_params=pb.SamplingParams(n=0)), "n"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), sampling_params=pb.SamplingParams(top_p=0)), "top_p"),
        (
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), sampling_params=pb.SamplingParams(logprobs=21)),
            "logprobs",
        ),
        (
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), sampling_params=pb.SamplingParams(stop=["x"] * 17)),
            "stop",
        ),
        (
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), sampling_params=pb.SamplingParams(max_tokens=1 << 20)),
            "max_tokens",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_names_the_field(tiny: Running, request_: pb.GenerateRequest, field: str) -> None:
    with grpc.insecure_channel(tiny.address) as channel, pytest.raises(grpc.RpcError) as error:
        list(InferenceServiceStub(channel).Generate(request_, timeout=DEADLINE_S))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
    from headwise.runtime.client import _error

    assert _error(error.value).field == field  # type: ignore[arg-type]
    with tiny.client() as client:
        assert client.generate(PROMPT, SamplingParams(max_tokens=2)).completion_tokens >= 1


@pytest.fixture
def tiny(serve: Serve) -> Running:
    return serve()


def test_cancelling_frees_the_blocks_within_a_step(tiny: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_options = {"token_ids": pb.TokenIds(ids=PROMPT), "sampling_params": sampling_message(TO_THE_END)}
    with grpc.insecure_channel(tiny.address) as channel, steps_held(monkeypatch) as go_on:
        stream = InferenceServiceStub(channel).Generate(pb.GenerateRequest(**stub_options), timeout=DEADLINE_S)
        wait_until(lambda: tiny.llm.num_streams == 1)
        stream.cancel()
        wait_until(lambda: tiny.llm.num_streams == 0)
        go_on.set()
        wait_until(lambda: no_blocks_are_held(tiny))
    assert tiny.stats()["num_generated_tokens"] <= 2  # the steps that were in flight


def test_a_deadline_ends_a_request_that_waits(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve(max_num_seqs=1)
    with running.client() as client:
        first = client.stream(PROMPT, TO_THE_END)
        next(first)
        with steps_held(monkeypatch) as go_on:
            with pytest.raises(ServerError) as error:
                client.generate([5] * 10, TO_THE_END, timeout=0.3)
            assert error.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
            wait_until(lambda: running.llm.num_streams == 1)
            go_on.set()
        assert list(first)[-1].completion_tokens == ROOM  # type: ignore[union-attr]
        wait_until(lambda: no_blocks_are_held(running))
        assert running.stats()["num_generated_tokens"] == ROOM


def test_a_full_queue_says_when_to_come_back(serve: Serve) -> None:
    running = serve(max_num_seqs=1, max_queued_requests=2)
    with running.client(retries=0) as client, grpc.insecure_channel(running.address) as channel:
        first = client.stream(PROMPT, TO_THE_END)
        next(first)
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT), sampling_params=sampling_message(TO_THE_END))
        queued = [InferenceServiceStub(channel).Generate(request, timeout=DEADLINE_S) for _ in range(2)]
        wait_until(lambda: running.stats()["num_waiting"] == 2)
        with pytest.raises(ServerError) as error:
            client.generate(PROMPT, SamplingParams(max_tokens=2))
        assert error.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.value.retry_after_s == 1.0 and "max_queued_requests=2" in str(error.value)
        for call in queued:
            call.cancel()
        first.close()  # type: ignore[attr-defined]
        wait_until(lambda: no_blocks_are_held(running))
        assert client.generate(PROMPT, SamplingParams(n=2, max_tokens=2)).completion_tokens >= 2
        with pytest.raises(ServerError) as never:
            client.generate(PROMPT, SamplingParams(n=3, max_tokens=2))
        assert never.value.code is grpc.StatusCode.INVALID_ARGUMENT and never.value.field == "n"


def test_abort_and_a_taken_id(tiny: Running) -> None:
    with tiny.client() as client, tiny.client() as other:
        stream = client.stream(PROMPT, SamplingParams(max_tokens=None, ignore_eos=True), request_id="one")
        next(stream)
        with pytest.raises(ServerError) as error:
            other.generate(PROMPT, request_id="one")
        assert error.value.field == "request_id"
        other.abort("one", "nobody")
        last = list(stream)[-1]
        assert isinstance(last, Completion) and last.samples[0].finish_reason == "abort"


def test_draining_finishes_what_runs_and_takes_no_more(serve: Serve) -> None:
    running = serve()
    with running.client(retries=0) as client:
        stream = client.stream(PROMPT, SamplingParams(max_tokens=200, ignore_eos=True))
        next(stream)
        running.stop()
        with pytest.raises(ServerError) as error:
            while True:  # until the server has seen that it is to stop
                client.generate([4], SamplingParams(max_tokens=1))
        assert error.value.code is grpc.StatusCode.UNAVAILABLE
        last = list(stream)[-1]
        assert isinstance(last, Completion) and last.completion_tokens == 200
    # Not end(): a second stop() before the first is done would end it at once, with another code.
    assert running.exit_code.result(DEADLINE_S) == 0


def test_a_drain_goes_on_when_whoever_asked_for_it_is_gone(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve()
    with running.client() as client, running.client(retries=0) as operator:
        stream = client.stream(PROMPT, SamplingParams(max_tokens=20, ignore_eos=True))
        next(stream)
        with steps_held(monkeypatch), pytest.raises(ServerError) as error:
            operator.drain(timeout=0.3)
        assert error.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        last = list(stream)[-1]
        assert isinstance(last, Completion) and last.completion_tokens == 20
        assert running.exit_code.result(DEADLINE_S) == 0


def test_stopping_twice_ends_at_once(serve: Serve) -> None:
    running = serve(options={"drain_timeout_s": DEADLINE_S})
    with running.client(retries=0) as client:
        stream = client.stream([7], SamplingParams(max_tokens=None, ignore_eos=True))
        next(stream)
        running.stop()
        running.stop()
        assert running.exit_code.result(DEADLINE_S) == 1
        with pytest.raises(ServerError):
            list(stream)


def test_what_is_served_and_done(tiny: Running) -> None:
    with tiny.client() as client:
        model = client.model()
        assert (model.name, model.vocab_size, model.limits.max_model_len) == ("tiny", 256, 512)
        assert not model.has_tokenizer and model.kv_tokens > 512
        assert (model.dtype, model.kv_policy, model.kv_dtype) == ("float32", "dense", "float32")
        client.generate(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True))
        stats = client.stats()
        assert stats.num_generated_tokens == 3 and stats.num_running == 0 and "prefix_cache" in stats.json


def test_an_output_goes_on_past_the_models_length_where_keys_leave_a_window(serve: Serve) -> None:
    running = serve(kv_policy="sinks:4,28@0-1", kv_dtype="int8/int4", max_model_len=48)
    with running.client() as client:
        model = client.model()
        assert (model.dtype, model.kv_policy, model.kv_dtype) == ("float32", "sinks:4,28", "int8/int4")
        assert model.limits.max_model_len == 48
        [sample] = client.generate(PROMPT, SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)).samples
        assert len(sample.token_ids) == 300 and sample.finish_reason == "length"
        with pytest.raises(ServerError, match="max_tokens=1000001: must be at most 1000000"):
            client.generate(PROMPT, SamplingParams(max_tokens=1_000_001))
        with pytest.raises(ServerError, match="prompt='48 tokens'"):
            client.generate([5] * 48, SamplingParams(max_tokens=1))


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ([-1], "prompt"),
        ([1 << 33], "prompt"),
        ([1.5], "prompt"),
        (7, "prompt"),
        (b"text", "prompt"),
        ("half of a pair: \ud800", "prompt"),
        ([{"role": "user", "content": "\ud800"}], "messages"),
        ([{"role": "user"}], "messages"),
        ([{"role": "user", "content": 3}], "messages"),
        ([{"role": "user", "content": "x"}, "y"], "messages"),
    ],
)
def test_what_no_message_can_hold_is_refused_as_by_the_driver(tiny: Running, prompt: Any, field: str) -> None:
    with tiny.client() as client, pytest.raises(InvalidValueError) as error:
        client.generate(prompt)
    assert error.value.field == field


def test_a_conversation_is_answered(serve: Serve, tmp_path: Path) -> None:
    write_byte_tokenizer(write_checkpoint(tmp_path, 8, 4, vocab_size=VOCAB))
    template = {"chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(template))
    params = SamplingParams(temperature=0, max_tokens=5)
    with serve(tmp_path).client() as client:
        answer = client.chat([{"role": "user", "content": "hello"}], params)
        assert answer.samples == client.generate("hello", params).samples
