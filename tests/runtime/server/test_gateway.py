"""The official OpenAI client against a server with its gateway, and the demo model behind them."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from headwise.runtime import LLM, SamplingParams, StructuredOutputsParams
from headwise.runtime.client import Client

pytest.importorskip("smg")
openai = pytest.importorskip("openai")
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2, vllm_engine_pb2_grpc  # noqa: E402

DEADLINE_S = 120.0
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]


@contextmanager
def serving(model: Path, *options: str, folder: Path | None = None) -> Iterator[dict[str, Any]]:
    """``headwise serve --openai-port`` as a process of its own, as users start it."""
    command = [
        *(sys.executable, "-m", "headwise.runtime.cli", "serve", "--model", str(model), "--name", "smollm2"),
        *("--executor", "local", "--port", "0", "--openai-port", "0", "--max-model-len", "2048", "--json"),
        *("--kv-memory", "512MiB"),
        *options,
    ]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE_S) == 0


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """In a folder where somebody has put another gateway."""
    folder = tmp_path_factory.mktemp("working-directory")
    (folder / "smg.py").write_text("raise SystemExit('this is not the gateway')")
    with serving(smollm2, folder=folder) as about:
        yield about


@pytest.fixture(scope="module")
def driver(smollm2: Path) -> Iterator[LLM]:
    with LLM(smollm2, executor="local", max_model_len=2048, quiet=True, kv_memory="512MiB") as llm:
        yield llm


@pytest.fixture(scope="module")
def client(server: dict[str, Any]) -> Iterator[Any]:
    with openai.OpenAI(base_url=server["openai"], api_key="none", timeout=DEADLINE_S, max_retries=0) as made:
        yield made


def ask(client: Any, **options: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "smollm2", "messages": QUESTION, "temperature": 0, "max_tokens": 16} | options
    )


def test_a_chat_has_the_text_of_the_driver(client: Any, driver: LLM) -> None:
    [expected] = driver.chat(QUESTION, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
    answer = ask(client)
    assert answer.choices[0].message.content == expected.outputs[0].text
    assert answer.choices[0].finish_reason == str(expected.outputs[0].finish_reason)
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == len(expected.outputs[0].token_ids)
    streamed = list(ask(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
    assert text == expected.outputs[0].text
    assert streamed[-1].usage.completion_tokens == answer.usage.completion_tokens


def test_the_usual_options(client: Any) -> None:
    two = ask(client, n=2, temperature=1.0, seed=7)
    assert len(two.choices) == 2 and two.choices[0].message.content != two.choices[1].message.content
    again = ask(client, n=2, temperature=1.0, seed=7)
    assert [c.message.content for c in two.choices] == [c.message.content for c in again.choices]
    cut = ask(client, max_tokens=2)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 2
    whole = ask(client).choices[0].message.content
    stopped = ask(client, stop=[whole[3:6]])
    assert stopped.choices[0].message.content == whole[: whole.index(whole[3:6])]
    likely = ask(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 3 for entry in likely)


def test_json_of_a_schema(client: Any, driver: LLM) -> None:
    fields = {"name": {"type": "string", "maxLength": 20}, "legs": {"type": "integer", "minimum": 0, "maximum": 8}}
    schema = {"type": "object", "properties": fields, "required": ["name", "legs"], "additionalProperties": False}
    question = [{"role": "user", "content": "Describe a dog as JSON with name and legs."}]
    shape = {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema, "strict": True}}
    answer = ask(client, messages=question, response_format=shape, max_tokens=64)
    text, found = answer.choices[0].message.content, json.loads(answer.choices[0].message.content)
    assert answer.choices[0].finish_reason == "stop"
    assert found.keys() == {"name", "legs"} and len(found["name"]) <= 20 and 0 <= found["legs"] <= 8
    streamed = ask(client, messages=question, response_format=shape, max_tokens=64, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices) == text
    params = SamplingParams(
        temperature=0, max_tokens=64, structured_outputs=StructuredOutputsParams(json=json.dumps(schema))
    )
    assert driver.chat(question, params, use_tqdm=False)[0].outputs[0].text == text


def test_any_json_and_a_schema_that_is_none(client: Any) -> None:
    answer = ask(client, response_format={"type": "json_object"}, max_tokens=200)
    text = answer.choices[0].message.content
    assert text.startswith("{") and (answer.choices[0].finish_reason == "length" or isinstance(json.loads(text), dict))
    wrong = {"type": "json_schema", "json_schema": {"name": "wrong", "schema": {"type": "strin"}, "strict": True}}
    with pytest.raises(openai.APIStatusError) as error:
        ask(client, response_format=wrong)
    assert 400 <= error.value.status_code < 500
    assert ask(client).choices[0].message.content


def test_an_aborted_stream_frees_its_blocks(client: Any, server: dict[str, Any]) -> None:
    with Client(server["address"], timeout=DEADLINE_S) as direct:
        before = direct.stats().num_generated_tokens
        stream = ask(client, stream=True, max_tokens=1500, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()
        for count in range(600):
            stats = direct.stats()
            if stats.num_running == 0 and stats.num_free_blocks == stats.num_blocks:
                assert stats.num_generated_tokens - before - count < 1500
                return
            assert direct.generate([5], SamplingParams(max_tokens=1)).completion_tokens == 1
    raise AssertionError("the blocks were not freed")


def test_32_streams_at_once(client: Any) -> None:
    def one(_: int) -> str:
        return "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True) if chunk.choices)

    with ThreadPoolExecutor(32) as pool:
        texts = list(pool.map(one, range(32)))
    assert len(set(texts)) == 1 and texts[0]


def test_what_is_not_served_is_the_clients_error(client: Any) -> None:
    with pytest.raises(openai.APIStatusError) as error:
        ask(client, logprobs=True, top_logprobs=21)
    assert 400 <= error.value.status_code < 500
    assert ask(client).choices[0].message.content


def test_nobody_else_sets_up_the_gateway(server: dict[str, Any]) -> None:
    root = server["openai"].removesuffix("/v1")
    for path, body in (("/workers", b'{"url": "grpc://127.0.0.1:1"}'), ("/flush_cache", b"")):
        request = urllib.request.Request(root + path, body, {"Content-Type": "application/json"}, method="POST")
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request, timeout=DEADLINE_S)
        with error.value:
            assert error.value.code in (401, 403)


def test_the_gateways_view_of_the_cache(server: dict[str, Any]) -> None:
    """What ``VllmEngine`` tells beside completions: a snapshot of the cache, what changes in it, and loads."""
    prompt = list(range(100, 140))
    with (
        Client(server["address"], timeout=DEADLINE_S) as direct,
        grpc.insecure_channel(server["address"]) as channel,
    ):
        engine = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        engine.FlushCache(common_pb2.FlushCacheRequest(), timeout=DEADLINE_S)
        events = engine.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest(), timeout=DEADLINE_S)
        first = next(events)
        assert first.HasField("snapshot") and [event.WhichOneof("data") for event in first.events] == ["cleared"]
        direct.generate(prompt, SamplingParams(max_tokens=1))
        direct.generate(prompt[::-1], SamplingParams(max_tokens=1), cache_salt="somebody else's")
        stored, sequence = [], first.sequence_number
        while len(stored) < 2:
            batch = next(events)
            sequence += 1
            assert batch.sequence_number == sequence
            stored += [block for event in batch.events for block in event.stored.blocks]
        assert [list(block.token_ids) for block in stored] == [prompt[:16], prompt[16:32]]
        [again] = [
            event
            for event in next(
                engine.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest(), timeout=DEADLINE_S)
            ).events
            if event.stored.parent_block_hash
        ]
        assert again.stored.parent_block_hash == stored[0].block_hash
        assert list(again.stored.blocks) == [stored[1]]
        engine.FlushCache(common_pb2.FlushCacheRequest(), timeout=DEADLINE_S)
        batch = next(events)
        while not batch.events:
            batch = next(events)
        assert [event.WhichOneof("data") for event in batch.events] == ["cleared"]
        assert engine.GetLoads(vllm_engine_pb2.GetLoadsRequest(), timeout=DEADLINE_S).loads[0].num_running_reqs == 0
        info = engine.GetServerInfo(vllm_engine_pb2.GetServerInfoRequest(), timeout=DEADLINE_S)
        assert (info.server_type, info.block_size) == ("vllm-grpc", 16)
        model = engine.GetModelInfo(vllm_engine_pb2.GetModelInfoRequest(), timeout=DEADLINE_S)
        assert model.served_model_name == "smollm2" and "/" not in str(model)


@pytest.mark.slow
def test_https_with_the_certificate_of_the_server(smollm2: Path, certificates: Path) -> None:
    tls = ("--tls-cert", str(certificates / "good.pem"), "--tls-key", str(certificates / "good.key"))
    with serving(smollm2, *tls) as server:
        assert server["openai"].startswith("https://")
        trusted = ssl.create_default_context(cafile=str(certificates / "good-ca.pem"))
        with openai.OpenAI(
            base_url=server["openai"],
            api_key="none",
            timeout=DEADLINE_S,
            max_retries=0,
            http_client=openai.DefaultHttpxClient(verify=trusted),
        ) as client:
            assert ask(client).choices[0].message.content
        with Client(server["address"], timeout=DEADLINE_S, ca=certificates / "good-ca.pem") as direct:
            assert direct.generate([5], SamplingParams(max_tokens=1)).completion_tokens == 1
