"""A deployment of real engines, each on threads of this process, computes what one engine computes."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from headwise.cluster.group import GroupStartError
from headwise.runtime.aio import AsyncLLM
from headwise.runtime.async_model import QueueFullError
from headwise.runtime.config import EngineConfig
from headwise.runtime.deployment import model
from headwise.runtime.deployment.model import DeployedModel, _settings
from headwise.runtime.deployment.options import ReplicaOptions
from headwise.runtime.sampling_params import SamplingParams
from headwise.runtime.server.errors import code_of
from headwise.runtime.structured_outputs import StructuredOutputsParams
from headwise.workers.errors import InvalidValueError
from tests.byte_tokenizer import VOCAB, write_byte_tokenizer
from tests.checkpoints import write_checkpoint
from tests.local_replicas import LocalReplicas
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


def test_a_front_that_does_not_answer_says_so_and_does_nothing_later(
    deployed: Deployed, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, go_on = deployed(1), threading.Event()
    monkeypatch.setattr(model, "ANSWER_S", 0.1)
    llm._front.post(lambda _: go_on.wait(30.0))
    try:
        for ask_front in (llm.status, lambda: llm.scale(2), llm.restart):
            with pytest.raises(model.FrontBusyError, match="nothing was done") as error:
                ask_front()
            assert code_of(error.value) is grpc.StatusCode.UNAVAILABLE
    finally:
        go_on.set()
    monkeypatch.undo()
    status = llm.status()
    assert status["wanted"] == 1 and not status["restarting"]


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


@pytest.fixture
def speaking(config: EngineConfig, tmp_path: Path) -> EngineConfig:
    """Of a model that has a tokenizer whose tokens end within characters."""
    write_byte_tokenizer(write_checkpoint(tmp_path / "model", 8, 4, vocab_size=VOCAB))
    return config.model_copy(update={"model": str(tmp_path / "model")})


def texts() -> Asked:
    """Texts that end at stop strings over token borders, and such as have to match a grammar."""
    asked: Asked = []
    for seed in range(12):
        sampled: dict[str, Any] = {"seed": seed, "max_tokens": 48, "temperature": 1.0}
        stop = ["".join(pair) for pair in zip("abcé{1", "bc12:}", strict=True)] + ["e", "ab"]
        asked.append((f"plain-{seed}", f"Once {seed}", SamplingParams(**sampled)))
        asked.append((f"stop-{seed}", f"Once {seed}", SamplingParams(stop=stop, **sampled)))
        asked.append((f"min-{seed}", f"Once {seed}", SamplingParams(stop=stop, min_tokens=20, **sampled)))
        kept = SamplingParams(stop=stop, include_stop_str_in_output=True, n=2, **sampled)
        asked.append((f"kept-{seed}", f"Once {seed}", kept))
    for number, form in enumerate(
        (StructuredOutputsParams(regex="(ab|cé){3,9}1"), StructuredOutputsParams(choice=["true", "日本", "no"]))
    ):
        asked.append((f"form-{number}", "Say", SamplingParams(structured_outputs=form, max_tokens=64, seed=1)))
    return asked


@pytest.mark.parametrize("dies", [False, True])
def test_the_text_is_that_of_one_engine(speaking: EngineConfig, dies: bool) -> None:
    one = AsyncLLM(speaking, quiet=True)
    try:
        expected = ask_all(one, texts())
    finally:
        one.shutdown()
    assert {"stop", "length"} <= {sample.finish[0] for samples in expected for sample in samples}
    assert any(isinstance(sample.finish[1], str) for samples in expected for sample in samples)
    deployed = Deployed(speaking)
    try:
        llm, counts = deployed(2), dict[str, int]()

        async def run() -> list[list[Sample]]:
            def note(name: str, count: int) -> None:
                counts[name] = count
                if dies and sum(counts.values()) > 150 and "killed" not in counts:
                    counts["killed"] = 1
                    threading.Thread(target=deployed.kill, args=("replica-1",)).start()

            return await asyncio.gather(
                *(ask(llm, *one, on_tokens=partial(note, one[0])) for one in texts()),
            )

        assert asyncio.run(run()) == expected
        assert ("killed" in counts) == dies
        settled(llm)
    finally:
        deployed.close()


def test_a_slow_reader_pauses_its_request_alone(deployed: Deployed) -> None:
    llm = deployed(2)
    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)

    async def run() -> None:
        [request] = llm.inputs.requests("slow", [5, 6, 7], params, 0)
        async with asyncio.timeout(60), aclosing(llm.stream([request])) as stream:
            await anext(stream)
            others = [ask(llm, f"other-{n}", [5, 6, 7 + n], params) for n in range(2)]
            await asyncio.gather(*others)
            held = len(request.generated)
            assert held < 400, "it is paused"
            async for _ in stream:
                pass
            assert len(request.generated) == 400

    asyncio.run(run())
    settled(llm)


def test_leaving_and_aborting_leave_nothing(deployed: Deployed) -> None:
    llm = deployed(2)
    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True, n=2)

    async def run() -> None:
        async def leave() -> None:
            async with aclosing(llm.stream([*llm.inputs.requests("left", [5, 6], params, 0)])) as stream:
                await anext(stream)

        async def abort() -> list[Sample]:
            asked = asyncio.create_task(
                ask(llm, "aborted", [7, 8], params, on_tokens=lambda count: llm.abort("aborted") if count > 6 else None)
            )
            return await asked

        async def cancel() -> None:
            with suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await ask(llm, "late", [9, 8], params)

        _, aborted, _ = await asyncio.gather(leave(), abort(), cancel())
        assert {sample.finish[0] for sample in aborted} == {"abort"}

    asyncio.run(run())
    settled(llm)
    hosts = [replica.host for replica in deployed.factory.started]
    wait_until(lambda: all(not host._requests for host in hosts))


def test_the_queue_and_tenants_shares_are_of_the_whole_deployment(deployed: Deployed) -> None:
    llm = deployed(2, queued=3)
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)

    async def run() -> list[Any]:
        hold = [ask(llm, f"r{number}", [5, 6, 7], params) for number in range(12)]
        return await asyncio.gather(*hold, return_exceptions=True)

    results = asyncio.run(run())
    refused = [result for result in results if isinstance(result, QueueFullError)]
    assert refused and len(refused) < 12 and all(isinstance(r, list | QueueFullError) for r in results)
    settled(llm)


def test_a_model_that_cannot_be_loaded_is_said_at_the_start(config: EngineConfig) -> None:
    class Fails(LocalReplicas):
        def start(self, *_: Any) -> Any:
            raise GroupStartError("there is no room")

    with pytest.raises(GroupStartError, match="no room"):
        DeployedModel(config, ReplicaOptions(2), Fails())
    with pytest.raises(InvalidValueError, match="tensor_parallel_size"):
        DeployedModel(config.model_copy(update={"tensor_parallel_size": 99}), ReplicaOptions(2), LocalReplicas())


def test_one_that_starts_is_enough(config: EngineConfig) -> None:
    class FailsOnce(LocalReplicas):
        def start(self, name: str, *rest: Any) -> Any:
            if name == "replica-1":
                raise GroupStartError("there is no room")
            return super().start(name, *rest)

    llm = DeployedModel(config, ReplicaOptions(2), FailsOnce())
    try:
        wait_until(lambda: [r["state"] for r in llm.status()["replicas"]] == ["serving", "serving"])
    finally:
        llm.shutdown()


def test_each_place_has_a_folder_of_its_own_for_kv(config: EngineConfig) -> None:
    with_disk = config.model_copy(update={"disk_kv_path": "/kv"})
    assert [_settings(with_disk, "both", place)["disk_kv_path"] for place in (1, 2)] == [
        "/kv/replica-1",
        "/kv/replica-2",
    ]
