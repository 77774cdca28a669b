"""Many clients, most of them bad: what they send, and how they leave, costs nobody else anything."""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from headwise.runtime import SamplingParams
from headwise.runtime.server.sessions import MAX_STALLED
from headwise.v1 import inference_pb2 as pb
from headwise.v1.inference_pb2_grpc import InferenceServiceStub
from tests.byte_tokenizer import VOCAB, write_byte_tokenizer
from tests.checkpoints import write_checkpoint
from tests.effort import thorough
from tests.runtime.server.conftest import DEADLINE_S, Running
from tests.runtime.server.test_service import PROMPT, no_blocks_are_held, wait_until

Serve = Callable[..., Running]
ALLOWED = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED}
FUZZED = 4_000
"""Requests a round; CI has time for the first of three."""
INTEGERS = (0, 1, 2, 3, 5, 16, 20, 21, 64, 65, 255, 256, 257, 511, 512, 2**31 - 1, 2**32 - 1)
FLOATS = (0.0, -0.0, 0.5, 1.0, 1.5, 2.0, -1.0, -2.5, 1e-9, 1e30, -1e300, float("inf"), float("-inf"), float("nan"))
TEXTS = ("", "a", "stop", "é🦊", "\0", "\n", "x" * 300, "</s>", "../..", "%s%n", "{}")

GRAMMARS = (
    *("", "a", "(", "[a-z]{2,5}", "(?=a)", "x" * 300, "(a|b)?" * 20_000, "\\d+", "é🦊", "[]", "{}", "null", "{" * 5000),
    *(
        '{"type": "object"}',
        '{"type": "strin"}',
        '{"multipleOf": 9000001, "type": "integer"}',
        '{"$ref": "http://x/y"}',
    ),
    *('start: "a" | b\nb: "c" b', "root ::= [0-9]+", "start: " + "(" * 999, 'start: ""', 'start: a\na: a a | "x"'),
    "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(3000)) + '\na3000: "x"',
)


def fuzzed(chance: random.Random) -> pb.GenerateRequest:
    """Half of its fields are set, a few of them to what makes sense."""
    request = pb.GenerateRequest()
    if chance.random() < 0.2:
        request.request_id = chance.choice(TEXTS) * chance.randint(0, 3)
    if chance.random() < 0.2:
        request.cache_salt = chance.choice(TEXTS)
    kind = chance.random()
    if kind < 0.7:
        top = 256 if chance.random() < 0.9 else 2**32
        request.token_ids.ids.extend(chance.randrange(top) for _ in range(chance.choice((0, 1, 3, 17, 40, 600))))
    elif kind < 0.8:
        request.text = chance.choice(TEXTS) * chance.randint(0, 9)
    elif kind < 0.9:
        for _ in range(chance.randint(0, 3)):
            request.messages.messages.add(role=chance.choice(TEXTS), content=chance.choice(TEXTS))
    fuzz_params(request.sampling_params, chance, 0.05 if chance.random() < 0.6 else 0.5)
    return request


def fuzz_params(params: pb.SamplingParams, chance: random.Random, share: float) -> None:
    for field in pb.SamplingParams.DESCRIPTOR.fields:
        if chance.random() > share:
            continue
        if field.name == "logit_bias":
            for _ in range(chance.choice((1, 2, 30))):
                params.logit_bias[chance.choice(INTEGERS)] = chance.choice(FLOATS)
        elif field.name == "stop":
            params.stop.extend(chance.choice(TEXTS) for _ in range(chance.choice((1, 2, 17))))
        elif field.name == "stop_token_ids":
            params.stop_token_ids.extend(chance.choice(INTEGERS) for _ in range(chance.choice((1, 2, 200))))
        elif field.name == "structured_outputs":
            fuzz_structured(params.structured_outputs, chance)
        elif field.type == field.TYPE_BOOL:
            setattr(params, field.name, chance.random() < 0.5)
        elif field.type == field.TYPE_DOUBLE:
            setattr(params, field.name, chance.choice(FLOATS))
        elif field.type in (field.TYPE_INT32, field.TYPE_INT64):
            setattr(params, field.name, min(chance.choice((-1, 1)) * chance.choice(INTEGERS), 2**31 - 1) % 2**31)
        else:
            setattr(params, field.name, chance.choice(INTEGERS))
    if not params.HasField("max_tokens") or params.max_tokens > 8:
        params.max_tokens = chance.choice((1, 2, 2, 3))  # or the test would take as long as its longest answers


def fuzz_structured(message: pb.StructuredOutputs, chance: random.Random) -> None:
    kind = chance.choice(("json", "regex", "choice", "grammar", "json_object", None))
    if kind == "choice":
        message.choice.choices.extend(chance.choice(TEXTS) for _ in range(chance.choice((0, 1, 3, 1100))))
    elif kind == "json_object":
        message.json_object = chance.random() < 0.5
    elif kind is not None:
        setattr(message, kind, chance.choice(GRAMMARS))


@pytest.mark.parametrize(
    "first",
    [thorough(0), pytest.param(FUZZED, marks=pytest.mark.slow), pytest.param(2 * FUZZED, marks=pytest.mark.slow)],
)
def test_fuzzed_requests_get_an_answer_or_a_reason(serve: Serve, tmp_path: Path, first: int) -> None:
    write_byte_tokenizer(write_checkpoint(tmp_path, 8, 4, vocab_size=VOCAB))
    running = serve(tmp_path, max_num_seqs=32)
    codes: Counter[grpc.StatusCode] = Counter()
    fields: Counter[str] = Counter()

    async def send(stub: Any, requests: list[pb.GenerateRequest]) -> None:
        while requests:
            try:
                async for _ in stub.Generate(requests.pop(), timeout=DEADLINE_S):
                    pass
                codes[grpc.StatusCode.OK] += 1
            except grpc.aio.AioRpcError as error:
                codes[error.code()] += 1
                fields[(error.details() or "").partition("=")[0]] += 1

    async def send_all() -> None:
        requests = [fuzzed(random.Random(seed)) for seed in range(first, first + FUZZED)]
        async with grpc.aio.insecure_channel(running.address) as channel:
            stub = InferenceServiceStub(channel)
            await asyncio.gather(*[send(stub, requests) for _ in range(32)])

    asyncio.run(send_all())
    assert codes.keys() <= ALLOWED, codes
    assert codes.total() == FUZZED and codes[grpc.StatusCode.OK] > FUZZED / 20 and len(fields) > 15
    wait_until(lambda: no_blocks_are_held(running))
    with running.client() as client:
        assert client.generate(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True)).completion_tokens == 3


@pytest.mark.thorough
def test_64_clients_that_cancel_stop_reading_or_finish(serve: Serve) -> None:
    running = serve(max_num_seqs=16, options={"stall_timeout_s": 2.0})
    chance = random.Random(1)

    def request(tokens: int, **params: Any) -> pb.GenerateRequest:
        ids = pb.TokenIds(ids=[chance.randrange(256) for _ in range(chance.randint(1, 40))])
        sampling = pb.SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0, **params)
        return pb.GenerateRequest(token_ids=ids, sampling_params=sampling)

    async def finish(stub: Any) -> int:
        tokens = 0
        async for response in stub.Generate(request(50), timeout=DEADLINE_S):
            tokens += len(response.increment.token_ids)
        return tokens

    async def cancel(stub: Any) -> None:
        call = stub.Generate(request(400), timeout=DEADLINE_S)
        for _ in range(chance.randint(0, 30)):
            await call.read()
        call.cancel()

    async def stop_reading(stub: Any, over: asyncio.Event) -> None:
        call = stub.Generate(request(400, logprobs=20, n=2), timeout=DEADLINE_S)
        await call.read()
        await over.wait()
        with pytest.raises(grpc.aio.AioRpcError, match="was not read"):
            while await call.read() is not grpc.aio.EOF:
                pass

    async def all_at_once() -> None:
        options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096)]
        channels = [grpc.aio.insecure_channel(running.address, [*options, ("n", index)]) for index in range(64)]
        stubs, over = [InferenceServiceStub(channel) for channel in channels], asyncio.Event()
        unread = [asyncio.create_task(stop_reading(stub, over)) for stub in stubs[::3]]
        gone = [asyncio.create_task(cancel(stub)) for stub in stubs[1::3]]
        done = await asyncio.gather(*[finish(stub) for stub in stubs[2::3]])
        assert done == [50] * len(done), "a stream that was read was held up or cut"
        await asyncio.gather(*gone)
        await asyncio.to_thread(wait_until, lambda: running.llm.num_streams == 0)
        over.set()
        await asyncio.gather(*unread)
        for channel in channels:
            await channel.close()

    def tasks() -> int:
        return asyncio.run_coroutine_threadsafe(_count_tasks(), running.loop).result(DEADLINE_S)

    asyncio.run(all_at_once())  # once, so that what is allocated once is
    wait_until(lambda: no_blocks_are_held(running))
    gc.collect()
    before, tasks_before = psutil.Process().memory_info().rss, tasks()
    asyncio.run(all_at_once())
    wait_until(lambda: no_blocks_are_held(running) and running.llm.num_streams == 0)
    wait_until(lambda: tasks() <= tasks_before)
    gc.collect()
    assert psutil.Process().memory_info().rss < 1.05 * before


async def _count_tasks() -> int:
    return len(asyncio.all_tasks())


def test_a_connection_whose_streams_nobody_reads_gets_no_more(serve: Serve) -> None:
    """Their ends cannot be told before somebody reads, or closes it; so what they take here is bounded."""
    running = serve(options={"stall_timeout_s": 0.2})
    params = pb.SamplingParams(max_tokens=450, ignore_eos=True, logprobs=20, n=2)
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT), sampling_params=params)
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096)]

    def num_stalled() -> int:
        return sum(running.server.sessions._stalled.values())

    async def never_read() -> None:
        async with grpc.aio.insecure_channel(running.address, options) as channel:
            stub = InferenceServiceStub(channel)
            calls = [stub.Generate(request) for _ in range(MAX_STALLED)]
            await asyncio.to_thread(wait_until, lambda: num_stalled() == MAX_STALLED)
            await asyncio.to_thread(wait_until, lambda: no_blocks_are_held(running))
            with pytest.raises(grpc.aio.AioRpcError, match="close it") as error:
                await stub.Generate(request).read()
            assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            with running.client() as client:
                params = SamplingParams(max_tokens=2, ignore_eos=True)
                other = await asyncio.to_thread(client.generate, PROMPT, params)
            assert other.completion_tokens == 2 and not any(call.done() for call in calls)

    asyncio.run(never_read())
    wait_until(lambda: not running.server.sessions._stalled)


def test_a_client_that_never_reads_is_paused_and_then_ended(serve: Serve) -> None:
    """Its messages are large enough to fill what the connection holds back long before its last token."""
    running = serve(options={"stall_timeout_s": 1.0})

    def is_paused() -> bool:
        return running.llm.submit(lambda engine: engine.num_paused).result(DEADLINE_S) == 8

    async def never_read() -> grpc.StatusCode:
        options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096)]
        async with grpc.aio.insecure_channel(running.address, options) as channel:
            params = pb.SamplingParams(max_tokens=450, ignore_eos=True, logprobs=20, n=8)
            request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT), sampling_params=params)
            call = InferenceServiceStub(channel).Generate(request, timeout=DEADLINE_S)
            await asyncio.to_thread(wait_until, is_paused)
            with running.client() as client:
                other = await asyncio.to_thread(
                    client.generate, [9] * 20, SamplingParams(max_tokens=20, ignore_eos=True)
                )
            assert other.completion_tokens == 20
            await asyncio.to_thread(wait_until, lambda: no_blocks_are_held(running))
            try:
                while await call.read() is not grpc.aio.EOF:
                    pass
            except grpc.aio.AioRpcError as error:
                return error.code()
            return await call.code()

    assert asyncio.run(never_read()) is grpc.StatusCode.CANCELLED
