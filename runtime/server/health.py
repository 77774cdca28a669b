"""The health service's state: it follows the shards' lives and their progress, not just this process's."""

from __future__ import annotations

import asyncio
import time

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio

from headwise.runtime.engine.engine import Engine
from headwise.runtime.server.sessions import Context, Sessions

MAX_WATCHING = 64
"""Clients that watch the health at once."""
_INTERVAL_S = 0.5

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class HealthMonitor:
    """Keeps the packaged health servicer up to date.

    Attributes:
        servicer: grpc.health.v1, for the server; ``Check`` and ``Watch`` of "" and of each service's name.
    """

    def __init__(self, sessions: Sessions, services: list[str], step_timeout_s: float) -> None:
        """Args: ``step_timeout_s``: how long a step may take before the engine counts as hung."""
        self.servicer = _HealthServicer()
        self._sessions, self._services, self._step_timeout_s = sessions, ["", *services], step_timeout_s
        self._serving: bool | None = None

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            self._sessions.llm.check_shards()
            await self.set(self.problem() is None)
            await asyncio.sleep(_INTERVAL_S)

    async def set(self, serving: bool) -> None:
        if serving == self._serving:
            return
        self._serving = serving
        for service in self._services:
            await self.servicer.set(service, SERVING if serving else NOT_SERVING)

    def problem(self) -> str | None:
        """Why no request should come here now; None if one may."""
        llm = self._sessions.llm
        if llm.failure is not None:
            return str(llm.failure)
        if self._sessions.draining:
            return "this server drains"
        return "a step makes no progress" if is_hung(llm.engine, self._step_timeout_s) else None


class _HealthServicer(health_aio.HealthServicer):
    """Anybody may ask, so that anybody could keep the server busy with watching."""

    def __init__(self) -> None:
        super().__init__()
        self._num_watching = 0

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        if self._num_watching >= MAX_WATCHING:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WATCHING} clients watch already")
        self._num_watching += 1
        try:
            await super().Watch(request, context)
        finally:
            self._num_watching -= 1


def is_hung(engine: Engine, step_timeout_s: float) -> bool:
    """Whether a step makes no progress, or what is called between two."""
    since = engine.busy_since
    return since is not None and time.monotonic() - since > step_timeout_s
