"""A server's one engine, to whoever runs the server: a deployment of one replica."""

from __future__ import annotations

import os
import time
from typing import Any, NoReturn

from headwise.cluster.group import ShardGroupDied
from headwise.runtime.aio import AsyncLLM
from headwise.runtime.deployment.control import ReplicaStatus, Role, ShardPlace, State, Status
from headwise.runtime.engine.engine import Engine
from headwise.runtime.engine.loop import EngineStoppedError, is_hung
from headwise.workers.errors import InvalidValueError

STATS_TIMEOUT_S = 2.0
"""For the engine to say what it has done, which it does between two steps."""
NAME = "engine"

_NO_STATS: dict[str, Any] = {
    "num_queued_tokens": 0,
    "num_running": 0,
    "num_waiting": 0,
    "num_blocks": 0,
    "num_free_blocks": 0,
    "num_generated_tokens": 0,
    "prefix_cache": {"queried_tokens": 0, "hit_tokens": 0},
    "recoveries": {},
}


class SingleEngine:
    """The :class:`~headwise.runtime.deployment.control.Control` of a server without replicas."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm, self._stats = llm, _NO_STATS

    def status(self) -> Status:
        """As of the protocol. Of an engine that does not answer within STATS_TIMEOUT_S, the counts are those that it
        told before."""
        return Status(
            wanted=1,
            min_replicas=None,
            max_replicas=None,
            waiting=0,
            restarting=False,
            routing={},
            replicas=[self._replica()],
        )

    def scale(self, replicas: int) -> NoReturn:
        limit = "this server has one engine, in its own process"
        raise InvalidValueError("replicas", replicas, limit, "start it with --replicas to have several")

    def restart(self) -> NoReturn:
        limit = "this server has one engine, in its own process, and would answer nobody meanwhile"
        raise InvalidValueError("restart", "rolling", limit, "start it with --replicas to restart one after another")

    def _replica(self) -> ReplicaStatus:
        llm, engine = self._llm, self._llm.engine
        state, problem = self._state(self._ask())
        stats, places = self._stats, engine.generation.group.places
        cache = stats["prefix_cache"]
        return ReplicaStatus(
            name=NAME,
            role=self._role(),
            state=state,
            node=os.uname().nodename,
            pid=os.getpid(),
            since_s=time.monotonic() - engine.rebuilding_changed,
            tensor_parallel_size=llm.config.tensor_parallel_size,
            epoch=engine.events.epoch,
            running=stats["num_running"],
            waiting=stats["num_waiting"],
            queued_tokens=stats["num_queued_tokens"],
            kv_blocks=stats["num_blocks"],
            kv_free_blocks=stats["num_free_blocks"],
            queried_tokens=cache["queried_tokens"],
            hit_tokens=cache["hit_tokens"],
            generated_tokens=stats["num_generated_tokens"],
            recoveries=stats["recoveries"].get("count", 0),
            problem=problem,
            shards=[ShardPlace(rank=rank, node=node, pid=pid) for rank, (node, pid) in enumerate(places)],
        )

    def _ask(self) -> str:
        """Has the engine tell what it has done; returns why it does not, or nothing."""
        try:
            self._stats = self._llm.submit(_look).result(STATS_TIMEOUT_S)
        except TimeoutError:
            return f"the engine has not answered within {STATS_TIMEOUT_S:g} s"
        except (EngineStoppedError, ShardGroupDied) as error:
            return str(error)
        return ""

    def _state(self, problem: str) -> tuple[State, str]:
        """Its state, and why it does not serve.

        Args:
            problem: why it does not answer.
        """
        engine = self._llm.engine
        if self._llm.failure is not None:
            return "ended", str(self._llm.failure)
        if engine.rebuilding:
            return "rebuilding", "the shards are dead, and others are started"
        return "serving", "a step makes no progress" if is_hung(engine) else problem

    def _role(self) -> Role:
        handoff = self._llm.config.handoff
        # With a prefill engine of its own, the server does both.
        if handoff is None or self._llm.config.prefill is not None:
            return "both"
        return handoff.role


def _look(engine: Engine) -> dict[str, Any]:
    return engine.stats() | {"num_queued_tokens": engine.num_queued_tokens}
