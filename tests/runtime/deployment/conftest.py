"""A replica in this process, and whoever talks to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headwise.runtime import start
from headwise.runtime.aio import AsyncLLM
from headwise.runtime.config import EngineConfig, engine_config
from tests.local_replicas import LocalReplica
from tests.replica_talk import Talk
from tests.runtime.deployment.deployed import Deployed
from tests.thread_group import thread_groups


@pytest.fixture(scope="module")
def replica_settings(checkpoint: Callable[..., Path]) -> dict[str, Any]:
    return {"model": str(checkpoint("gqa")), "executor": "local", "kv_memory": "1MiB", "cpus_per_rank": 1.0}


@pytest.fixture
def deaths() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def talk(replica_settings: dict[str, Any], deaths: list[tuple[str, str]]) -> Iterator[Talk[LocalReplica]]:
    replica = LocalReplica("replica-1", replica_settings, lambda name, cause: deaths.append((name, cause)))
    yield Talk(replica)
    replica.close()


@pytest.fixture
def config(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> EngineConfig:
    monkeypatch.setattr(start, "make_factory", thread_groups())
    return engine_config(model=str(checkpoint("gqa")), kv_memory="4MiB", max_num_seqs=8)


@pytest.fixture
def one(config: EngineConfig) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(config, quiet=True)
    yield llm
    llm.shutdown()


@pytest.fixture
def deployed(config: EngineConfig) -> Iterator[Deployed]:
    made = Deployed(config)
    yield made
    made.close()
