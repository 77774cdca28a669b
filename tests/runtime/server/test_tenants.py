"""What a tenant does costs other tenants no more than their turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from headwise.runtime import SamplingParams
from headwise.runtime.client import ServerError
from headwise.runtime.server.sessions import MAX_STALLED, MAX_STALLED_OF_TENANT
from headwise.v1 import inference_pb2 as pb
from headwise.v1.inference_pb2_grpc import InferenceServiceStub
from tests.runtime.server.conftest import DEADLINE_S, Running, steps_held
from tests.runtime.server.test_service import PROMPT, no_blocks_are_held, wait_until

Serve = Callable[..., Running]
ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef"
SHORT = SamplingParams(max_tokens=2, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, ignore_eos=True)
SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096)]


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"alice {ALICE}\nbob {BOB}\n")
    return path


def generate(channel: Any, token: str, tokens: int, **params: Any) -> Any:
    """A call of a tenant's."""
    sampling = pb.SamplingParams(max_tokens=tokens, ignore_eos=True, **params)
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT), sampling_params=sampling)
    metadata = (("authorization", f"Bearer {token}"),)
    return InferenceServiceStub(channel).Generate(request, timeout=DEADLINE_S, metadata=metadata)


def cancel(calls: Sequence[Any]) -> None:
    for call in calls:
        call.cancel()


def test_requests_of_tenants_take_turns(serve: Serve, token_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve(options={"token_file": token_file}, max_num_seqs=1)
    ended: list[str] = []

    async def finish(channel: Any, name: str, token: str) -> None:
        async for _ in generate(channel, token, 2):
            pass
        ended.append(name)

    async def all_at_once(go_on: Any) -> None:
        async with grpc.aio.insecure_channel(running.address) as channel:
            calls = [asyncio.create_task(finish(channel, "alice", ALICE)) for _ in range(20)]
            await asyncio.to_thread(wait_until, lambda: running.llm.num_streams == 20)
            calls += [asyncio.create_task(finish(channel, "bob", BOB)) for _ in range(2)]
            await asyncio.to_thread(wait_until, lambda: running.llm.num_streams == 22)
            go_on.set()
            await asyncio.gather(*calls)

    with steps_held(monkeypatch) as go_on:
        asyncio.run(all_at_once(go_on))
    # Of the 20 one runs, and one may have been the next, when bob comes.
    assert [index for index, name in enumerate(ended) if name == "bob"][-1] <= 6, ended


def test_a_tenant_that_fills_its_queue_leaves_room_for_others(serve: Serve, token_file: Path) -> None:
    running = serve(options={"token_file": token_file}, max_num_seqs=1, max_queued_requests=8)
    with (
        grpc.insecure_channel(running.address) as channel,
        running.client(token=ALICE, retries=0) as alice,
        running.client(token=BOB, retries=0) as bob,
    ):
        first = alice.stream(PROMPT, LONG)
        next(first)
        calls = [generate(channel, ALICE, 2) for _ in range(4)]
        wait_until(lambda: running.stats()["num_waiting"] == 4)
        with pytest.raises(ServerError, match="now 4 of max_queued_requests=8") as error:
            alice.generate(PROMPT, SHORT)
        assert error.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED and error.value.retry_after_s == 1.0
        calls.append(generate(channel, BOB, 2))
        wait_until(lambda: running.stats()["num_waiting"] == 5)
        cancel(calls)
        first.close()  # type: ignore[attr-defined]
        wait_until(lambda: no_blocks_are_held(running))
        with pytest.raises(ServerError, match="half of max_queued_requests=8") as never:
            bob.generate(PROMPT, SamplingParams(n=5, max_tokens=2))
        assert never.value.code is grpc.StatusCode.INVALID_ARGUMENT and never.value.field == "n"


def test_a_tenant_finds_a_row_while_another_has_many(serve: Serve, token_file: Path) -> None:
    running = serve(options={"token_file": token_file}, max_num_seqs=8)
    with grpc.insecure_channel(running.address) as channel, running.client(token=BOB) as bob:
        calls = [generate(channel, ALICE, 400) for _ in range(20)]
        wait_until(lambda: running.stats()["num_waiting"] == 13)
        bob.generate(PROMPT, SHORT)
        assert running.stats()["num_waiting"] == 13, "bob waited until alice's requests were done"
        cancel(calls)
        wait_until(lambda: no_blocks_are_held(running))


def test_a_tenant_has_at_most_half_of_the_calls(
    serve: Serve, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headwise.runtime.server.sessions.SPARE_CALLS", 0)
    running = serve(options={"token_file": token_file}, max_num_seqs=4, max_queued_requests=12)
    with (
        grpc.insecure_channel(running.address) as channel,
        running.client(token=ALICE, retries=0) as alice,
        running.client(token=BOB, retries=0) as bob,
        steps_held(monkeypatch) as go_on,
    ):
        calls = [generate(channel, ALICE, 2) for _ in range(8)]
        wait_until(lambda: running.server.sessions.num_calls == 8)
        with pytest.raises(ServerError, match="8 calls of tenant alice run") as error:
            alice.generate(PROMPT, SHORT)
        assert error.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        go_on.set()
        assert bob.generate(PROMPT, SHORT).completion_tokens == 2
        cancel(calls)


def test_a_quota_is_the_tenants_whatever_its_salts(serve: Serve, token_file: Path) -> None:
    running = serve(options={"token_file": token_file}, num_blocks=64, cache_quota=0.25)
    with running.client(token=ALICE) as alice, running.client(token=BOB) as bob:
        bob.generate(PROMPT, SHORT)
        for number in range(12):
            alice.generate(PROMPT, SHORT, cache_salt=f"salt {number}")
        cached = running.stats()["prefix_cache"]
        assert cached["cached_blocks"] == 2 + 16 and cached["evictions"] == {"quota": 8}
        assert alice.generate(PROMPT, SHORT, cache_salt="salt 11").cached_tokens == 32
        assert alice.generate(PROMPT, SHORT, cache_salt="salt 0").cached_tokens == 0


def test_a_tenant_whose_streams_nobody_reads_gets_no_more_over_other_connections(
    serve: Serve, token_file: Path
) -> None:
    running = serve(options={"token_file": token_file, "stall_timeout_s": 0.2})

    async def never_read() -> None:
        # Each with a pool of connections of its own, or they would share one.
        channels = [
            grpc.aio.insecure_channel(running.address, [*SMALL_WINDOW, ("n", index)])
            for index in range(MAX_STALLED_OF_TENANT // MAX_STALLED + 1)
        ]
        for count, channel in enumerate(channels[:-1], start=1):
            calls = [generate(channel, ALICE, 450, logprobs=20, n=2) for _ in range(MAX_STALLED)]
            assert len(calls) == MAX_STALLED
            sessions = running.server.sessions
            stalled = count * MAX_STALLED
            await asyncio.to_thread(wait_until, lambda: sum(sessions._stalled.values()) == stalled)  # noqa: B023
        with pytest.raises(grpc.aio.AioRpcError, match="of tenant alice were not read") as error:
            async for _ in generate(channels[-1], ALICE, 2):
                pass
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        async for _ in generate(channels[-1], BOB, 2):
            pass
        for channel in channels:
            await channel.close()

    asyncio.run(never_read())
    wait_until(lambda: not running.server.sessions._stalled and not running.server.sessions._stalled_of)
