"""The health service: its state follows the shards' lives and the engine's progress."""

from __future__ import annotations

import asyncio

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headwise.runtime.server.errors import ENGINE_ENDED
from headwise.runtime.server.sessions import Context, Sessions

_INTERVAL_S = 0.2

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthMonitor:
    """Keeps the state of the health service up to date.

    Attributes:
        servicer: grpc.health.v1 for the server: ``Check`` and ``Watch``, of "" (the server) and of each service's name.
    """

    def __init__(self, sessions: Sessions, services: list[str]) -> None:
        self.servicer = HealthServicer(sessions, ["", *services])
        self._sessions = sessions

    async def run(self) -> None:
        """Runs until it is cancelled."""
        while True:
            self.set(self.problem() is None)
            await asyncio.sleep(_INTERVAL_S)

    def set(self, serving: bool) -> None:
        self.servicer.set(serving)

    def problem(self) -> str | None:
        """Why clients should ask another server now; None if they need not."""
        return self._sessions.llm.pause_reason or self.lasting_problem()

    def lasting_problem(self) -> str | None:
        """Why requests that come now will not be served here; None if they will be, be it after others were started in
        the place of dead shards."""
        llm = self._sessions.llm
        if llm.failure is not None:
            return ENGINE_ENDED
        if self._sessions.draining:
            return "this server drains"
        return llm.hang


class HealthServicer(health_pb2_grpc.HealthServicer):
    """grpc.health.v1. A client that does not read holds up neither the state nor other clients: grpc's own servicer
    keeps a lock while it writes."""

    def __init__(self, sessions: Sessions, services: list[str]) -> None:
        self._sessions, self._services = sessions, frozenset(services)
        self._serving = True
        self._watchers: set[asyncio.Event] = set()

    def set(self, serving: bool) -> None:
        """Notes the state of all services, and wakes whoever watches."""
        if serving == self._serving:
            return
        self._serving = serving
        for changed in self._watchers:
            changed.set()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return self._response(request.service)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """
        Raises:
            StalledError: the client has not read a state for the stall timeout.
            LeftError: the client is gone.
        """
        changed, told = asyncio.Event(), None
        self._watchers.add(changed)
        try:
            while True:
                changed.clear()
                response = self._response(request.service)
                if response.status != told:
                    told = response.status
                    await self._sessions.write(context, response)
                await changed.wait()
        finally:
            self._watchers.remove(changed)

    def _response(self, service: str) -> health_pb2.HealthCheckResponse:
        if service not in self._services:
            return health_pb2.HealthCheckResponse(status=SERVICE_UNKNOWN)
        return health_pb2.HealthCheckResponse(status=SERVING if self._serving else NOT_SERVING)
