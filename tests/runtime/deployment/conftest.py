"""A replica in this process, and whoever talks to it as a front does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from headwise.cluster.channel import Kind
from headwise.runtime import start
from headwise.runtime.aio import AsyncLLM
from headwise.runtime.config import EngineConfig, engine_config
from headwise.runtime.deployment.messages import (
    Add,
    FrontMessage,
    Output,
    ReplicaMessage,
    Report,
    RequestDelta,
    decode_replica,
    encode,
)
from headwise.workers.plan import RowSampling
from tests.local_replicas import LocalReplica
from tests.runtime.deployment.deployed import Deployed
from tests.thread_group import thread_groups

T = TypeVar("T")

DEADLINE_S = 30.0


class Talk:
    """The front's end of one replica's channel."""

    def __init__(self, replica: LocalReplica) -> None:
        self.replica, self._number = replica, 0
        self.seen: list[ReplicaMessage] = []

    def say(self, message: FrontMessage) -> None:
        self.say_bytes(encode(message))

    def say_bytes(self, data: bytes, kind: Kind = Kind.STEP) -> None:
        self.replica.channel.send(0, kind, data)

    def hear(self) -> ReplicaMessage:
        got = self.replica.channel.receive(DEADLINE_S)
        assert got is not None and got[0] == Kind.OUTPUT, f"nothing was heard for {DEADLINE_S:g} s"
        self.seen.append(decode_replica(got[2]))
        return self.seen[-1]

    def wait_for(self, find: Callable[[ReplicaMessage], T | None]) -> T:
        """What is found in the first message that has it."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            if (found := find(self.hear())) is not None:
                return found
        raise AssertionError(f"not heard in {DEADLINE_S:g} s")

    def add(self, prompt: list[int], max_tokens: int, sampling: RowSampling | None = None, **fields: Any) -> int:
        self._number += 1
        generated = fields.pop("generated", [])
        self.say(Add(self._number, prompt, generated, sampling or RowSampling(), max_tokens, **fields))
        return self._number

    def deltas(self, number: int) -> list[RequestDelta]:
        """What comes of a request, until it ends."""
        found: list[RequestDelta] = []

        def look(message: ReplicaMessage) -> bool | None:
            if isinstance(message, Output):
                found.extend(delta for delta in message.deltas if delta.number == number)
            return True if found and found[-1].finish_reason is not None else None

        self.wait_for(look)
        return found

    def tokens(self, number: int) -> list[int]:
        return [token for delta in self.deltas(number) for token in delta.token_ids]

    def report(self, holds: Callable[[Report], bool] = lambda report: True) -> Report:
        """The next report for which something holds."""
        return self.wait_for(lambda m: m if isinstance(m, Report) and holds(m) else None)


@pytest.fixture(scope="module")
def replica_settings(checkpoint: Callable[..., Path]) -> dict[str, Any]:
    return {"model": str(checkpoint("gqa")), "executor": "local", "kv_memory": "1MiB", "cpus_per_rank": 1.0}


@pytest.fixture
def deaths() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def talk(replica_settings: dict[str, Any], deaths: list[tuple[str, str]]) -> Iterator[Talk]:
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
