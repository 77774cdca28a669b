"""KvHandoffService on the server's event loop."""

from __future__ import annotations

import asyncio
from typing import Any

from headwise.runtime.handoff.service import MAX_WAIT_S, HandoffService
from headwise.runtime.server.errors import DeadlineError, UnavailableError, abort
from headwise.runtime.server.sessions import Context, Sessions
from headwise.v1 import kv_transfer_pb2 as pb
from headwise.v1.kv_transfer_pb2_grpc import KvHandoffServiceServicer


class AsyncHandoffService(KvHandoffServiceServicer):
    """What peers call. A call that waits takes no thread.

    While the server drains no more prompts are taken; transfers that run may end.
    """

    def __init__(self, sessions: Sessions, service: HandoffService) -> None:
        self._sessions, self._service = sessions, service

    async def Hello(self, request: pb.HelloRequest, context: Context) -> pb.HelloResponse:
        return await self._answer("Hello", request, context)

    async def Prefill(self, request: pb.PrefillRequest, context: Context) -> pb.PrefillResponse:
        return await self._answer("Prefill", request, context)

    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewResponse:
        return await self._answer("Renew", request, context)

    async def Commit(self, request: pb.CommitRequest, context: Context) -> pb.CommitResponse:
        return await self._answer("Commit", request, context)

    async def AbortTransfer(self, request: pb.AbortTransferRequest, context: Context) -> pb.AbortTransferResponse:
        return await self._answer("AbortTransfer", request, context)

    async def Query(self, request: pb.QueryRequest, context: Context) -> pb.QueryResponse:
        return await self._answer("Query", request, context)

    async def _answer(self, method: str, request: Any, context: Context) -> Any:
        try:
            if self._sessions.draining and method in ("Hello", "Prefill"):
                raise UnavailableError("this server drains and computes no more prompts; use another")
            answer = self._service.answer(method, request, context.peer())
            left_s = context.time_remaining()
            timeout_s = MAX_WAIT_S if left_s is None else min(left_s, MAX_WAIT_S)
            try:
                return await asyncio.wait_for(asyncio.wrap_future(answer), timeout_s)
            except TimeoutError:
                raise DeadlineError("the engine did not answer in time") from None
        except Exception as error:
            await abort(context, error)
