"""How many calls may be open, and whose: no connection, host or tenant can hold all of them.

gRPC cannot end a call whose client does not read: the call stays open after its handler has returned, until the client
reads or its connection ends. So a call is counted from its headers until it is really over.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from headwise.runtime.addresses import network_of
from headwise.runtime.engine.waiting import share
from headwise.runtime.server.auth import Details, Handler, Tenant, check_method
from headwise.runtime.server.errors import TooManyCallsError, abort, for_admin
from headwise.runtime.server.sessions import Context, Sessions
from headwise.workers.errors import HeadwiseError, InvalidValueError

HEALTH_CALLS = 256
"""Of the health service, open at once. They have places of their own, for anybody may ask."""
HEALTH_CALLS_OF_HOST = 64
HEALTH_CALLS_OF_CONNECTION = 16
MESSAGE_TIMEOUT_S = 60.0
"""For a call's message to come, once its headers have."""
_MARGIN = 1024
"""Calls that are being refused."""

_HEALTH = "/grpc.health.v1.Health/"


class Slots(grpc.aio.ServerInterceptor):
    """Refuses calls of a connection, a host or a tenant that has too many open.

    Attributes:
        of_connection: calls that a connection may have open, those of the health service included.
        total: calls that the server may have open: twice as many as a connection, so that one client leaves as many to
            others.
    """

    def __init__(self, sessions: Sessions) -> None:
        self._sessions, self._of_client = sessions, sessions.max_calls
        self.of_connection = self._of_client + HEALTH_CALLS_OF_CONNECTION
        self.total = 2 * self._of_client + HEALTH_CALLS + _MARGIN
        self._open: Counter[str] = Counter()

    async def intercept_service(
        self, continuation: Callable[[Details], Awaitable[Handler | None]], handler_call_details: Details
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        is_health = handler_call_details.method.startswith(_HEALTH)

        # Of both sides' streams whatever the method is: others are not called before the message has come.
        async def run(messages: AsyncIterator[Any], context: Context) -> None:
            try:
                if is_health:
                    self._take(context, self._health_limits(context.peer()))
                else:
                    tenant = self._sessions.tenant(context)
                    for_admin.set(tenant.admin)
                    check_method(tenant, handler_call_details.method)
                    self._take(context, self._limits(context.peer(), tenant))
            except HeadwiseError as error:
                if not is_health:
                    self._sessions.refuse(error, context.peer())
                await abort(context, error)
            try:
                await self._run(handler, messages, context)
            except HeadwiseError as error:
                await abort(context, error)

        return grpc.stream_stream_rpc_method_handler(run, handler.request_deserializer, handler.response_serializer)

    async def _run(self, handler: Handler, messages: AsyncIterator[Any], context: Context) -> None:
        behavior: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        answer = behavior(messages if handler.request_streaming else await _message(context), context)
        if isinstance(answer, AsyncIterator):
            async for response in answer:
                await self._sessions.write(context, response)
            return
        response = await answer
        if not handler.response_streaming:
            await self._sessions.write(context, response)

    def _take(self, context: Context, limits: dict[str, int]) -> None:
        """Counts a call until it is over.

        Args:
            limits: how many calls may be open, by what they have in common.

        Raises:
            TooManyCallsError: as many are.
        """
        for name, limit in limits.items():
            if self._open[name] >= limit:
                raise TooManyCallsError(f"{name} has {limit} calls open, as many as it may; end some, or read them")
        self._open.update(limits.keys())

        def give_back(context: Context) -> None:
            self._open.subtract(limits.keys())
            for name in limits:
                if not self._open[name]:
                    del self._open[name]

        context.add_done_callback(give_back)  # type: ignore[arg-type]  # the stubs want a class of their own

    def _limits(self, connection: str, tenant: Tenant) -> dict[str, int]:
        everybody, most = "this server", 2 * self._of_client
        limits = {everybody: most, f"the connection {connection}": self._of_client}
        if tenant.name:
            name = f"the tenant {tenant.name}"
            limits[name] = self._share(name, everybody, most)
        return limits

    def _health_limits(self, connection: str) -> dict[str, int]:
        everybody, host = "the health service", f"the health service, from {network_of(connection)},"
        return {
            everybody: HEALTH_CALLS,
            host: min(HEALTH_CALLS_OF_HOST, self._share(host, everybody, HEALTH_CALLS)),
            f"the health service, from {connection},": HEALTH_CALLS_OF_CONNECTION,
        }

    def _share(self, one: str, everybody: str, most: int) -> int:
        """What one of those who have calls open may have open: half of what others leave free."""
        return share(most, self._open[everybody] - self._open[one])


async def _message(context: Context) -> Any:
    """The one message of a call.

    Raises:
        InvalidValueError: it does not come.
    """
    try:
        message = await asyncio.wait_for(context.read(), MESSAGE_TIMEOUT_S)
    except TimeoutError:
        raise InvalidValueError("message", None, f"must come within {MESSAGE_TIMEOUT_S:g} s") from None
    if message is grpc.aio.EOF:
        raise InvalidValueError("message", None, "this method takes one message")
    return message
