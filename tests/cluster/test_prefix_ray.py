"""The prefix cache's tiers across real processes: what each rank kept of its heads comes back."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headwise.runtime import LLM
from headwise.runtime.engine.engine import Engine
from tests.cluster.test_ray_group import nothing_left
from tests.runtime.kv.test_prefix_parity import (
    GREEDY,
    SHAPE,
    always_restore,
    block_bytes,
    prefix_stats,
    settle,
    some_tokens,
    tokens,
    without_cache,
)

__all__ = ["always_restore"]  # a fixture


@pytest.mark.thorough
@pytest.mark.usefixtures("always_restore", "one_ray")
def test_ranks_in_processes_restore_from_host_and_disk(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    chance = random.Random(4)
    starts = [some_tokens(chance, length) for length in (64, 80, 96, 97, 112)]
    prompts = [chance.choice(starts) + some_tokens(chance, chance.randint(1, 20)) for _ in range(25)]

    def llm(**settings: Any) -> LLM:
        common = {"tensor_parallel_size": 2, "cpus_per_rank": 0.5, "max_model_len": 176, "quiet": True}
        return LLM(checkpoint(SHAPE), **{"kv_memory": "64MiB"} | common | settings)

    expected = without_cache(checkpoint(SHAPE), prompts)
    pids: list[int] = []
    tiers = {"num_blocks": 12, "host_kv_memory": 13 * block_bytes(2), "disk_kv_path": tmp_path / "kv"}
    with llm(**tiers) as first:
        assert [tokens(first.generate(prompt, GREEDY))[0] for prompt in prompts] == expected
        settle(first)
        first._loop.run(Engine.check_integrity)
        found = prefix_stats(first)["tiers"]
        assert found["host"]["hit_tokens"] > 0 and found["disk"]["hit_tokens"] > 0
        assert found["disk"]["damaged"] == found["disk"]["refused"] == 0
        stats = first.stats()
        assert [shard["disk_kv_blocks"] for shard in stats["shards"]] == [found["disk"]["blocks"]] * 2
        pids += stats["shard_pids"]
    with llm(**tiers) as second:
        assert tokens(second.generate(prompts, GREEDY)) == expected
        assert prefix_stats(second)["tiers"]["disk"]["hit_tokens"] > 0
        pids += second.stats()["shard_pids"]
    assert len(set(pids)) == 4
    nothing_left(pids)
    for rank in range(2):
        assert not list((tmp_path / "kv" / f"rank-{rank}-of-2").rglob("*.tmp"))
