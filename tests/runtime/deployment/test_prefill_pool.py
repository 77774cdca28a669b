"""Deployments in which some replicas compute the prompts of others: who is told of whom, and the tokens."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headwise.cluster.supervisor import MAX_FAILURES
from headwise.runtime.aio import AsyncLLM
from headwise.runtime.config import EngineConfig, engine_config, handoff_config
from headwise.runtime.deployment import model as model_module
from headwise.runtime.deployment.model import DeployedModel, _settings
from headwise.runtime.deployment.options import ReplicaOptions
from headwise.runtime.sampling_params import SamplingParams
from headwise.runtime.sides import pool_configs
from headwise.workers.errors import InvalidValueError
from tests.local_replicas import LocalReplicas
from tests.runtime.deployment.deployed import Asked, Deployed, Sample, ask, ask_all, prompts, settled, wait_until
from tests.runtime.deployment.script import Script

LONG: Asked = [
    (f"long-{index}", one * 20, SamplingParams(temperature=index % 2, seed=5, max_tokens=30, ignore_eos=True))
    for index, one in enumerate([prompt[:6] for prompt in prompts(12) if len(prompt) >= 6])
]


def with_pools(config: EngineConfig) -> EngineConfig:
    handoff = handoff_config(role="decode", min_tokens=0)
    return config.model_copy(update={"prefill": {}, "handoff": handoff, "kv_memory": "4MiB"})


def roles(script: Script) -> dict[str, str]:
    return {replica["name"]: replica["role"] for replica in script.deployment.status()["replicas"]}


def test_decode_replicas_are_told_who_computes_prompts_when_that_changes() -> None:
    script = Script(2, prefill=2)
    assert script.names == ["replica-1", "replica-2", "replica-3", "replica-4"] and script.asked == [2]
    assert [one.role for one in script.starting] == ["prefill", "prefill", "decode", "decode"]
    script.start("replica-3")
    script.start("replica-1")
    script.start("replica-4")
    script.start("replica-2")
    assert script.replicas["replica-3"].peers == [[], ["replica-1"], ["replica-1", "replica-2"]]
    assert script.replicas["replica-4"].peers == [["replica-1"], ["replica-1", "replica-2"]]
    assert roles(script) == {f"replica-{n}": "prefill" if n < 3 else "decode" for n in range(1, 5)}
    script.wait(3)
    assert len(script.replicas["replica-4"].peers) == 2, "nothing new"
    script.report("replica-1", rebuilding=True)
    script.deployment.tick()
    script.follow()
    assert len(script.replicas["replica-4"].peers) == 2, "it comes back by itself"
    script.die("replica-1")
    assert script.replicas["replica-4"].peers[-1] == ["replica-2"]
    script.close_all()
    script.wait(1)
    [started] = script.starting
    assert (started.name, started.role, started.place) == ("replica-5", "prefill", 1)
    script.start("replica-5")
    assert (
        script.replicas["replica-4"].peers[-1] == script.replicas["replica-3"].peers[-1] == ["replica-2", "replica-5"]
    )


def test_requests_go_to_decode_replicas_alone() -> None:
    script = Script.serving(2, prefill=2)
    requests = [script.add(f"r{number}", 5) for number in range(8)]
    assert {script.where(request) for request in requests} == {"replica-3", "replica-4"}
    assert [script.replicas[name].snapshots for name in sorted(script.replicas)] == [0, 0, 1, 1]
    script.deployment.reset_prefix_cache()
    script.follow()
    assert [script.replicas[name].resets for name in sorted(script.replicas)] == [1, 1, 1, 1]
    stats = script.deployment.stats()
    assert stats["num_blocks"] == 0 and "prefill" in stats


def test_without_prefill_replicas_the_others_go_on_and_without_these_it_is_over() -> None:
    script = Script(1, prefill=1)
    script.start("replica-2")
    for _ in range(MAX_FAILURES):
        script.fail_start(next(one.name for one in script.starting))
        script.wait(40)
    assert script.names == [] and script.over is None
    request = script.add("a", 1)
    script.step("replica-2")
    assert request.key in script.ended
    script.die("replica-2")
    script.close_all()
    for _ in range(MAX_FAILURES):
        if script.starting:
            script.fail_start(script.names[0])
        script.wait(40)
    assert script.over is not None


def test_a_rolling_restart_replaces_both_kinds_and_a_prefill_replica_ends_its_prompts() -> None:
    script = Script.serving(1, prefill=1)
    script.deployment.restart()
    script.follow()
    with pytest.raises(InvalidValueError, match="restart"):
        script.deployment.restart()
    assert [(one.role, one.extra) for one in script.starting] == [("decode", True), ("prefill", True)]
    script.report("replica-1", running=1)
    script.start_all()
    assert script.replicas["replica-3"].peers[-1] == ["replica-4"], "the old one is asked for no more"
    script.now += 0.25
    script.report("replica-1", running=1)
    script.deployment.tick()
    script.follow()
    assert [one.name for one in script.ending] == ["replica-2"]
    script.now += 0.25
    script.report("replica-1")
    script.deployment.tick()
    script.follow()
    assert [(one.name, one.ask) for one in script.ending] == [("replica-2", True), ("replica-1", True)]
    script.close_all()
    script.wait(1)
    assert not script.deployment.status()["restarting"]
    assert script.states() == {"replica-3": "serving", "replica-4": "serving"}


def test_scaling_is_of_decode_replicas() -> None:
    script = Script.serving(1, prefill=2)
    script.deployment.scale(2)
    script.follow()
    assert [one.role for one in script.starting] == ["decode"] and script.deployment.status()["wanted"] == 2


@pytest.fixture
def pools(config: EngineConfig) -> Iterator[Deployed]:
    made = Deployed(with_pools(config))
    yield made
    made.close()


def test_tokens_are_those_of_one_engine_though_prefill_replicas_die(one: AsyncLLM, pools: Deployed) -> None:
    expected = ask_all(one, LONG)
    llm = pools(2, prefill=2)
    wait_until(lambda: _connected(llm) == 2)
    assert ask_all(llm, LONG) == expected
    wait_until(lambda: llm.stats_within(5.0)["handoff"]["committed"] > 0)
    wait_until(lambda: llm.stats_within(5.0)["prefill"]["num_steps"] > 0)
    asyncio.run(llm.reset_prefix_cache())
    killed: list[str] = []

    def kill(count: int) -> None:
        if not killed:
            killed.append("replica-1")
            pools.kill("replica-1")

    async def run() -> list[list[Sample]]:
        return await asyncio.gather(*(ask(llm, *one, on_tokens=kill) for one in LONG))

    assert asyncio.run(run()) == expected
    settled(llm)
    wait_until(lambda: sorted(pools.states().values()) == ["serving"] * 4)
    assert "replica-1" not in pools.states()
    wait_until(lambda: _connected(llm) == 2)
    asyncio.run(llm.reset_prefix_cache())
    assert ask_all(llm, LONG) == expected


def _connected(llm: DeployedModel) -> int:
    """The prefill replicas that some decode replica is connected to."""
    peers = llm.stats_within(5.0)["handoff"].get("peers", {})
    return sum(bool(peer["connected"]) for peer in peers.values())


def test_each_side_has_its_settings() -> None:
    secured = handoff_config(role="decode", min_tokens=5, ca="ca", tls_cert="cert", tls_key="key")
    config = engine_config(
        model="m", tensor_parallel_size=2, kv_memory="2GiB", disk_kv_path="/kv", prefill={"kv_memory": "1GiB"},
        handoff=secured,
    )  # fmt: skip
    prefill, decode = pool_configs(config)
    assert (prefill.tensor_parallel_size, prefill.kv_memory, prefill.disk_kv_path) == (2, "1GiB", None)
    assert (decode.kv_memory, decode.disk_kv_path) == ("2GiB", "/kv") and decode.handoff is not None
    token = decode.handoff.token
    assert token and decode.handoff == secured.model_copy(update={"token": token})
    assert prefill.handoff == handoff_config(role="prefill", ca="ca", tls_cert="cert", tls_key="key", token=token)
    assert decode.prefill is None and prefill.cpus_per_rank is None
    assert _settings(decode, "decode", 2)["disk_kv_path"] == "/kv/decode-2"
    assert _settings(prefill, "prefill", 2)["handoff"]["role"] == "prefill"


def test_several_replicas_and_one_engine_for_prompts_do_not_go_together(config: EngineConfig) -> None:
    with pytest.raises(InvalidValueError, match=r'^--prefill=.*"2x tp=1"'):
        DeployedModel(with_pools(config), ReplicaOptions(2), LocalReplicas())


@pytest.mark.slow
def test_on_ray_a_prefill_replica_that_is_killed_costs_no_request(
    one: AsyncLLM, checkpoint: Callable[..., Path], config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill on one rank, decode on two."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    expected = ask_all(one, LONG)
    sides = {"prefill": {"tensor_parallel_size": 1}, "tensor_parallel_size": 2, "executor": "ray"}
    pooled = with_pools(config).model_copy(update=sides | {"cpus_per_rank": None})
    options = ReplicaOptions(1, prefill=2)
    llm = DeployedModel(pooled, options, model_module.make_replicas(pooled, options))
    try:
        wait_until(lambda: _connected(llm) == 2)
        replicas: dict[str, Any] = {replica["name"]: replica for replica in llm.status()["replicas"]}
        killed: list[int] = []

        def kill(count: int) -> None:
            if not killed:
                killed.append(replicas["replica-1"]["pid"])
                os.kill(killed[0], signal.SIGKILL)

        async def run() -> list[list[Sample]]:
            return await asyncio.gather(*(ask(llm, *one, on_tokens=kill) for one in LONG))

        assert asyncio.run(run()) == expected
        wait_until(lambda: llm.stats_within(5.0)["handoff"]["committed"] > 0)
        settled(llm)
        wait_until(lambda: _connected(llm) == 2)
    finally:
        llm.shutdown()
