"""What replicas of one host take of its memory for KV."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headwise.runtime.capacity import capacity
from headwise.runtime.config import engine_config
from headwise.runtime.deployment.memory_share import own_kv_memory
from headwise.workers.errors import InvalidValueError
from headwise.workers.model.model_config import load_model_config
from tests.local_replicas import LocalReplica

SHARE = 4 << 20


@pytest.mark.parametrize("kv_memory", [0.5, "0.5"])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_fraction_is_of_the_share_without_the_weights(
    checkpoint: Callable[..., Path], kv_memory: str | float, tp: int
) -> None:
    path = checkpoint("uneven")
    config = engine_config(model=str(path), device="cpu", kv_memory=kv_memory, tensor_parallel_size=tp)
    weights = max(rank.weight_bytes for rank in capacity(load_model_config(path), tp, "float32", 1).ranks)
    assert own_kv_memory(config, SHARE).kv_memory == (SHARE - weights) // 2
    tiered = config.model_copy(update={"host_kv_memory": "1MiB"})
    assert own_kv_memory(tiered, SHARE).kv_memory == (SHARE - weights - (1 << 20)) // 2


@pytest.mark.parametrize(
    "settings",
    [{"kv_memory": None}, {"kv_memory": "2GiB"}, {"kv_memory": 1 << 20}, {"kv_memory": 0.5, "device": "cuda"}],
)
def test_nothing_else_changes(checkpoint: Callable[..., Path], settings: dict[str, Any]) -> None:
    config = engine_config(**{"model": str(checkpoint("uneven")), "device": "cpu", **settings})
    assert own_kv_memory(config, SHARE) == config


def test_a_share_that_has_no_room_for_the_weights_is_refused(checkpoint: Callable[..., Path]) -> None:
    config = engine_config(model=str(checkpoint("uneven")), device="cpu", kv_memory=0.5)
    with pytest.raises(InvalidValueError, match=r"^kv_memory=0\.5: .* of 1000 bytes"):
        own_kv_memory(config, 1000)


def test_a_replica_takes_its_part(replica_settings: dict[str, Any]) -> None:
    settings = replica_settings | {"kv_memory": 0.5, "device": "cpu", "rank_memory": SHARE}
    replica = LocalReplica("replica-1", settings, lambda name, cause: None)
    size = 2 * 2 * 4 * 16 * 4 * 16  # K and V, layers, KV heads, head_dim, float32, block
    assert 0 < replica.about["num_blocks"] * size < SHARE // 2
    replica.close()
