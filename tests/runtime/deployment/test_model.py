"""A deployment of real engines, each on threads of this process, computes what one engine computes."""

from __future__ import annotations

import asyncio

import pytest

from headwise.runtime.aio import AsyncLLM
from headwise.runtime.sampling_params import SamplingParams
from tests.runtime.deployment.deployed import (
    Asked,
    Deployed,
    Sample,
    ask,
    ask_all,
    greedy,
    prompts,
    settled,
    wait_until,
)

KINDS: dict[str, SamplingParams] = {
    "greedy": SamplingParams(temperature=0, max_tokens=24),
    "seeded": SamplingParams(temperature=1.0, seed=7, max_tokens=24, top_p=0.9),
    "by number": SamplingParams(temperature=0.8, max_tokens=24),
    "samples": SamplingParams(n=3, seed=1, max_tokens=16),
    "min tokens": SamplingParams(temperature=2.0, seed=3, min_tokens=12, max_tokens=24),
    "logprobs": SamplingParams(temperature=0.7, seed=5, logprobs=3, max_tokens=12),
    "penalties": SamplingParams(temperature=0, repetition_penalty=1.3, frequency_penalty=0.5, max_tokens=24),
    "stop token": SamplingParams(temperature=1.0, seed=9, stop_token_ids=list(range(3, 40)), max_tokens=64),
}


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_the_tokens_are_those_of_one_engine(one: AsyncLLM, deployed: Deployed, replicas: int, streamed: bool) -> None:
    asked: Asked = [
        (f"{kind}-{index}", prompt, params)
        for kind, params in KINDS.items()
        for index, prompt in enumerate(prompts(2, sum(kind.encode())))
    ]
    expected: list[list[Sample]] = ask_all(one, asked, streamed=streamed)
    llm = deployed(replicas)
    assert ask_all(llm, asked, streamed=streamed) == expected
    settled(llm)


def test_a_death_with_16_streams_changes_no_token(one: AsyncLLM, deployed: Deployed) -> None:
    asked = greedy(16, 60)
    expected = ask_all(one, asked)
    llm, killed = deployed(2), []

    def kill(count: int) -> None:
        if count > 20 and not killed:
            killed.append(next(r["name"] for r in llm.status()["replicas"] if r["running"]))
            deployed.kill(killed[0])

    async def run() -> list[list[Sample]]:
        return await asyncio.gather(*(ask(llm, *one, on_tokens=kill) for one in asked))

    assert asyncio.run(run()) == expected
    assert killed
    settled(llm)
    wait_until(lambda: list(deployed.states().values()) == ["serving", "serving"])
    assert killed[0] not in deployed.states() and "replica-3" in deployed.states()
    assert ask_all(llm, asked) == expected, "what took its place computes"
