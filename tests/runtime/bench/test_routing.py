"""``headwise bench routing`` on replicas in this process: what it measures, and that the router keeps its promise."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from headwise.runtime import start
from headwise.runtime.bench import routing
from headwise.runtime.bench.routing import WAYS, Load, Reading, SwitchRouter, measure
from headwise.runtime.config import EngineConfig, engine_config
from tests.local_replicas import LocalReplicas
from tests.runtime.conftest import Run
from tests.thread_group import thread_groups

LOAD = Load(replicas=2, prefixes=8, each=8, prefix_tokens=128, own_tokens=16, tokens=8, at_once=8, repeats=1)


@pytest.fixture
def config(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> EngineConfig:
    monkeypatch.setattr(start, "make_factory", thread_groups())
    return engine_config(model=str(checkpoint("gqa", vocab_size=512)), kv_memory="16MiB")


def test_the_router_finds_what_one_replica_would_and_shares_the_work(config: EngineConfig) -> None:
    readings = asyncio.run(measure(config, LOAD, LocalReplicas()))
    assert [len(readings[way]) for way in WAYS] == [1, 1, 1]
    optimum, total = LOAD.optimum(config.block_size), 64 * (128 + 16 + 8)
    assert optimum == 56 * 128
    for [reading] in readings.values():
        assert sum(reading.requests) == 64 and len(reading.requests) == 2
        assert reading.hit_tokens + sum(reading.computed_tokens) == total, "every token is found or computed"
        assert 0 < reading.hit_tokens <= optimum and 0 < reading.ttft_s <= reading.seconds
    [router] = readings["router"]
    assert router.hit_tokens >= 0.9 * optimum
    assert router.hit_tokens > readings["in turns"][0].hit_tokens


def test_how_far_the_busiest_is_above_the_mean() -> None:
    assert Reading(0, [1, 1], [300, 100], 0.1, 1.0).off_mean == 0.5
    assert Reading(0, [1, 1], [200, 200], 0.1, 1.0).off_mean == 0.0


def test_the_other_ways_of_routing() -> None:
    router = SwitchRouter(16)
    router.way = "in turns"
    assert router.route("first", [], 10) is None
    for name in ("a", "b", "c"):
        router.joined(name)
    router.draining("b")

    def routed(*requests: str) -> list[str]:
        choices = [router.route(request, [], 10) for request in requests]
        return [choice.replica for choice in choices if choice is not None]

    assert sorted(routed("1", "2", "3", "4")) == ["a", "a", "c", "c"]
    router.way = "least loaded"
    for request in ("1", "2", "3", "4"):
        router.finished(request)
    [busy] = routed("5")
    assert routed("6") == [{"a": "c", "c": "a"}[busy]]


def test_what_is_printed(headwise: Run, config: EngineConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(routing, "make_replicas", lambda *_: LocalReplicas())
    plot = tmp_path / "routing.svg"
    options = ("--prefixes", "2", "--each", "2", "--prefix-tokens", "32", "--own-tokens", "8", "--tokens", "2")
    command = ("bench", "routing", "--model", config.model, "--repeats", "1", "--max-model-len", "256", *options)
    code, out, _ = headwise(*command, "--kv-memory", "16MiB", "--json", "--plot", str(plot))
    *results, summary = map(json.loads, out.splitlines())
    assert code == 0 and [one["way"] for one in results] == list(WAYS) and summary["optimum"] == 64
    assert plot.stat().st_size > 0
    assert replace(LOAD, each=3).optimum(16) == 16 * 128
