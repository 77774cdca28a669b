"""The state of the health service: it follows the shards' lives and the engine's progress."""

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
    """Keeps the state of the health service up to date.

    Attributes:
        servicer: grpc.health.v1 for the server: ``Check`` and ``Watch``, of "" (the server) and of each service's name.
    """

    def __init__(self, sessions: Sessions, services: list[str], step_timeout_s: float) -> None:
        """
        Args:
            step_timeout_s: how long a step may take, in seconds, before the engine counts as hung.
        """
        self.servicer = _HealthServicer()
        self._sessions, self._services, self._step_timeout_s = sessions, ["", *services], step_timeout_s
        self._serving: bool | None = None

    async def run(self) -> None:
        """Runs until it is cancelled."""
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
        """Why clients should send no request now; None if they may."""
        llm = self._sessions.llm
        if llm.failure is not None:
            return str(llm.failure)
        if self._sessions.draining:
            return "this server drains"
        return "a step makes no progress" if is_hung(llm.engine, self._step_timeout_s) else None


class _HealthServicer(health_aio.HealthServicer):
    """Limits the number of watching clients: health needs no token, so anybody could open any number of them."""

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
    """Whether the current step, or a call between two steps, has taken longer than ``step_timeout_s``."""
    since = engine.busy_since
    return since is not None and time.monotonic() - since > step_timeout_s
