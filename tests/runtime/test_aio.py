"""AsyncLLM in a program of one's own; what servers do with it is tested with them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from headwise.runtime import SamplingParams, start
from headwise.runtime.aio import AsyncLLM
from headwise.runtime.config import engine_config
from headwise.runtime.engine.request import Request
from headwise.workers.errors import InvalidValueError
from tests.thread_group import thread_groups

DEADLINE_S = 60.0
PARAMS = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, n=2)


@pytest.fixture
def llm(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[AsyncLLM]:
    monkeypatch.setattr(start, "make_factory", thread_groups())
    llm = AsyncLLM(engine_config(model=str(checkpoint("gqa")), kv_memory="16MiB"), quiet=True)
    yield llm
    llm.shutdown()


def samples(llm: AsyncLLM, name: str) -> list[Request]:
    return list(llm.inputs.requests(name, [5, 6, 7], PARAMS, llm.next_number()))


async def count_tokens(llm: AsyncLLM, requests: list[Request]) -> int:
    async with asyncio.timeout(DEADLINE_S):
        return sum([len(delta.token_ids) async for deltas in llm.stream(requests) for delta in deltas])


@asynccontextmanager
async def refused(llm: AsyncLLM, words: str) -> AsyncIterator[None]:
    with pytest.raises(InvalidValueError, match=words):
        yield
    assert await count_tokens(llm, samples(llm, "next")) == 6, "the engine runs on"


def test_requests_that_ran_before_are_refused(llm: AsyncLLM) -> None:
    async def run() -> None:
        requests = samples(llm, "mine")
        assert await count_tokens(llm, requests) == 6
        async with refused(llm, "requests='mine': ran before"):
            await count_tokens(llm, requests)

    asyncio.run(run())


def test_requests_that_are_not_the_samples_of_one_are_refused(llm: AsyncLLM) -> None:
    async def run() -> None:
        first, second = samples(llm, "mine")
        async with refused(llm, "each once"):
            await count_tokens(llm, [first, first])
        async with refused(llm, "of one request"):
            await count_tokens(llm, [second, samples(llm, "other")[0]])
        assert await count_tokens(llm, [first, second]) == 6

    asyncio.run(run())


@pytest.mark.parametrize("name", [["mine"], 7, None])
def test_an_abort_of_what_is_no_name_is_refused(llm: AsyncLLM, name: str) -> None:
    async def run() -> None:
        async with refused(llm, "request_id=.* must be a string"):
            llm.abort(name)

    asyncio.run(run())
