"""What the tests of a deployment ask of a model, and what they get."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from headwise.runtime.async_model import AsyncModel
from headwise.runtime.config import EngineConfig
from headwise.runtime.deployment.model import DeployedModel
from headwise.runtime.deployment.options import ReplicaOptions
from headwise.runtime.sampling_params import SamplingParams
from tests.local_replicas import LocalReplicas

DEADLINE_S = 60.0

Asked = list[tuple[str, str | list[int], SamplingParams]]


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


@dataclass
class Sample:
    """One sample of a request, as its client sees it."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    finish: tuple[str | None, int | str | None] = (None, None)
    error: str | None = None


async def ask(
    llm: AsyncModel[Any],
    name: str,
    prompt: str | list[int],
    params: SamplingParams,
    *,
    tenant: str = "",
    streamed: bool = True,
    on_tokens: Callable[[int], object] = lambda count: None,
) -> list[Sample]:
    """The samples of one request. ``on_tokens`` gets the number of tokens so far each time there are new ones."""
    ids = llm.inputs.token_ids(prompt)
    # The seed of a request without one depends on its number.
    requests = list(llm.inputs.requests(name, ids, params, sum(name.encode()), tenant=tenant))
    samples, count = [Sample() for _ in requests], 0
    for request in requests:
        request.streamed = streamed
    async with asyncio.timeout(DEADLINE_S):
        async for deltas in llm.stream(requests):
            for delta in deltas:
                sample = samples[delta.request.index]
                sample.tokens += delta.token_ids
                sample.text += delta.text or ""
                sample.logprobs += [delta.logprobs] if delta.logprobs is not None else []
                count += len(delta.token_ids)
            on_tokens(count)
    for request, sample in zip(requests, samples, strict=True):
        assert sample.tokens == request.generated
        sample.finish, sample.error = (request.finish_reason, request.stop_reason), request.error
    return samples


def ask_all(llm: AsyncModel[Any], asked: Sequence[tuple[str, str | list[int], SamplingParams]], **options: Any) -> Any:
    """The samples of several requests at once."""

    async def run() -> list[list[Sample]]:
        return await asyncio.gather(*(ask(llm, *one, **options) for one in asked))

    return asyncio.run(run())


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


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
