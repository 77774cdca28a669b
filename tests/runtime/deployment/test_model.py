"""A deployment of real engines, each on threads of this process, computes what one engine computes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headwise.runtime import start
from headwise.runtime.aio import AsyncLLM
from headwise.runtime.config import EngineConfig, engine_config
from headwise.runtime.deployment.model import DeployedModel
from headwise.runtime.deployment.options import ReplicaOptions
from headwise.runtime.sampling_params import SamplingParams
from tests.local_replicas import LocalReplicas
from tests.runtime.deployment.deployed import Sample, ask, ask_all, wait_until
from tests.thread_group import thread_groups

Asked = list[tuple[str, str | list[int], SamplingParams]]


@pytest.fixture
def config(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> EngineConfig:
    monkeypatch.setattr(start, "make_factory", thread_groups())
    return engine_config(model=str(checkpoint("gqa")), kv_memory="4MiB", max_num_seqs=8)


@pytest.fixture
def one(config: EngineConfig) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(config, quiet=True)
    yield llm
    llm.shutdown()


class Deployed:
    """Deployments, and their replicas."""

    def __init__(self, config: EngineConfig) -> None:
        self._config, self._made = config, list[DeployedModel]()

    def __call__(self, replicas: int, queued: int = 1024, **options: Any) -> DeployedModel:
        self.factory = LocalReplicas()
        self.llm = DeployedModel(
            self._config, ReplicaOptions(replicas, **options), self.factory, max_queued_requests=queued
        )
        self._made.append(self.llm)
        return self.llm

    def kill(self, name: str) -> None:
        next(replica for replica in self.factory.started if replica.name == name).die()

    def states(self) -> dict[str, str]:
        return {replica["name"]: replica["state"] for replica in self.llm.status()["replicas"]}

    def close(self) -> None:
        for llm in self._made:
            llm.shutdown()


@pytest.fixture
def deployed(config: EngineConfig) -> Iterator[Deployed]:
    made = Deployed(config)
    yield made
    made.close()


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(3, 256) for _ in range(numbers.randrange(3, 60))] for _ in range(count)]


def greedy(count: int, max_tokens: int = 40, seed: int = 0) -> Asked:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return [(f"request-{index}", prompt, params) for index, prompt in enumerate(prompts(count, seed))]


def settled(llm: DeployedModel) -> None:
    """No request is left in any book."""

    def empty() -> bool:
        stats = llm._front.run(lambda deployment: (deployment.check(), deployment._router.stats())[1])
        return stats["requests"] == 0 and llm.num_streams == 0

    wait_until(empty)
    assert llm._front.run(lambda deployment: deployment._dispatcher._live) == {}


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
