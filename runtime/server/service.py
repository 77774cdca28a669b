"""InferenceService: thin between the wire and the engine."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import Message

from headwise.runtime.aio import AsyncLLM, Lane
from headwise.runtime.engine import Delta
from headwise.runtime.inputs import MAX_MESSAGES, MAX_PROMPT_BYTES
from headwise.runtime.request import Request
from headwise.runtime.sampling_params import MAX_LOGIT_BIAS_ENTRIES, MAX_LOGPROBS, MAX_N, MAX_STOP, MAX_STOP_CHARACTERS
from headwise.runtime.server import convert
from headwise.runtime.server.auth import Tenant, Tokens
from headwise.runtime.server.errors import (
    DeadlineError,
    PermissionDeniedError,
    StalledError,
    UnavailableError,
    abort,
    code_of,
)
from headwise.runtime.server.kv_messages import CAPACITY, kv_messages
from headwise.runtime.server.metrics import Metrics
from headwise.runtime.structured_outputs import MAX_CHOICES, MAX_GRAMMAR_BYTES
from headwise.v1 import inference_pb2 as pb
from headwise.v1.inference_pb2_grpc import InferenceServiceServicer
from headwise.workers.errors import InvalidValueError

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

requests_log = logging.getLogger("headwise.requests")
"""One line a request: JSON, without prompt or output."""

MAX_REQUEST_ID = 128
_SEPARATOR = "\x1f"
"""Between a tenant's name and its request's id: in neither, so that no two tenants' ids can be the same."""
_LARGE_BYTES = 32 << 10
"""Requests of more are checked on a thread of their own: 10,000 tokens as text, some 10 ms."""

_STATS = (
    *("num_running", "num_waiting", "num_blocks", "num_free_blocks"),
    *("num_steps", "num_generated_tokens", "num_preemptions"),
)


class Sessions:
    """What runs, whose it is, and whether more may come. Shared by every service of a server.

    Attributes:
        draining: no new request is let in.
        drained: a client asked for it, and nothing runs any more.
        owners: of the requests that run, by the engine's name for them.
    """

    def __init__(
        self, llm: AsyncLLM, metrics: Metrics, tokens: Tokens, stall_timeout_s: float, max_request_s: float
    ) -> None:
        """
        Args:
            stall_timeout_s: how long a client may leave a stream unread before its request is ended.
            max_request_s: how long a request may take, queued or running.
        """
        self.llm, self.metrics, self.tokens = llm, metrics, tokens
        self.stall_timeout_s, self.max_request_s = stall_timeout_s, max_request_s
        self.draining = False
        self.drained = asyncio.Event()
        self.owners: dict[str, Tenant] = {}
        self._empty = asyncio.Event()
        self._empty.set()

    def tenant(self, context: Context) -> Tenant:
        """
        Raises:
            UnauthenticatedError: the call has no valid token.
        """
        return self.tokens.tenant(context.invocation_metadata() or ())

    def drain(self) -> None:
        """Lets no new request in."""
        self.draining = True

    async def idle(self) -> None:
        """Returns once nothing runs."""
        await self._empty.wait()

    def engine_id(self, tenant: Tenant, request_id: str) -> str:
        """What the engine calls a request, whose id may be empty: tenants do not see each other's.

        Raises:
            InvalidValueError: the client's id is too long or not printable.
        """
        if len(request_id) > MAX_REQUEST_ID or not request_id.isprintable():
            limit = f"must have at most {MAX_REQUEST_ID} printable characters"
            raise InvalidValueError("request_id", request_id, limit)
        return f"{tenant.name}{_SEPARATOR}{request_id or f'request-{secrets.token_hex(8)}'}"

    async def run(self, context: Context, tenant: Tenant, requests: list[Request]) -> AsyncGenerator[list[Delta]]:
        """The deltas of a request's samples; counts it and logs it, however it ends.

        Raises:
            UnavailableError: the server drains.
            InvalidValueError: a request with this id still runs, or the call's deadline is too far away.
            DeadlineError: it has none, and took as long as one may be away.
        """
        request_id, code = requests[0].request_id, grpc.StatusCode.OK
        late = asyncio.Event()

        def end() -> None:
            late.set()
            self.llm.abort(request_id)

        try:
            self._admit(context, tenant, request_id)
            timer = asyncio.get_running_loop().call_later(self.max_request_s, end)
            try:
                async with aclosing(self.llm.stream(requests)) as stream:
                    async for deltas in stream:
                        if late.is_set():
                            raise DeadlineError(f"the request took more than {self.max_request_s:g} s")
                        yield deltas
            finally:
                timer.cancel()
                del self.owners[request_id]
                if not self.owners:
                    self._empty.set()
        except (asyncio.CancelledError, GeneratorExit):
            left = context.time_remaining()
            ended = left is not None and left <= 0
            code = grpc.StatusCode.DEADLINE_EXCEEDED if ended else grpc.StatusCode.CANCELLED
            raise
        except BaseException as error:
            code = code_of(error)
            raise
        finally:
            self._account(tenant, requests, code)

    async def write(self, context: Context, message: object) -> None:
        """
        Raises:
            StalledError: the client has not read for too long.
        """
        try:
            await asyncio.wait_for(context.write(message), self.stall_timeout_s)
        except TimeoutError:
            raise StalledError(f"the stream was not read for {self.stall_timeout_s:g} s") from None

    def refuse(self, error: BaseException) -> None:
        """Counts and logs a request that was refused before it was one of the engine's."""
        code = code_of(error).name
        self.metrics.requests.labels(code).inc()
        requests_log.info(json.dumps({"code": code}))

    def _admit(self, context: Context, tenant: Tenant, request_id: str) -> None:
        if self.draining:
            raise UnavailableError("this server drains and takes no more requests; use another")
        left = context.time_remaining()
        if left is not None and left > self.max_request_s:
            limit = f"must be at most {self.max_request_s:g} s away (--max-request-time)"
            raise InvalidValueError("deadline", f"{left:.0f} s", limit)
        if request_id in self.owners:
            raise InvalidValueError("request_id", client_id(request_id), "a request with this id still runs")
        self.owners[request_id] = tenant
        self._empty.clear()

    def _account(self, tenant: Tenant, requests: list[Request], code: grpc.StatusCode) -> None:
        self.metrics.requests.labels(code.name).inc()
        first = requests[0].metrics
        if first.first_scheduled:
            self.metrics.observe(requests)
        line = {
            "request": client_id(requests[0].request_id),
            "tenant": tenant.name,
            "code": code.name,
            "prompt_tokens": len(requests[0].prompt_token_ids),
            "cached_tokens": first.num_cached_tokens,
            "tokens": [len(request.generated) for request in requests],
            "finish": [request.finish_reason.value if request.finish_reason else None for request in requests],
            "ttft_s": round(first.time_to_first_token, 4),
            "total_s": round(time.monotonic() - first.arrival, 4),
        }
        requests_log.info(json.dumps(line))


def client_id(engine_id: str) -> str:
    """A request's id as its client knows it."""
    return engine_id.partition(_SEPARATOR)[2]


def lane_of(request: Message, structured: bool = False) -> Lane | None:
    """Where :meth:`AsyncLLM.off_loop <headwise.runtime.aio.AsyncLLM.off_loop>` is to check a request."""
    if structured:
        return "grammar"
    return "text" if request.ByteSize() > _LARGE_BYTES else None


class InferenceService(InferenceServiceServicer):
    """Headwise's own API."""

    def __init__(self, sessions: Sessions, name: str) -> None:
        """Args: ``name``: of the model, as clients see it."""
        self._sessions, self._llm, self._name = sessions, sessions.llm, name

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        sessions = self._sessions
        admitted = False
        try:
            tenant = sessions.tenant(context)
            lane = lane_of(request, request.sampling_params.HasField("structured_outputs"))
            requests = await self._llm.off_loop(partial(self._requests, request, tenant), lane)
            with_text = self._llm.inputs.tokenizer is not None
            admitted = True
            async with aclosing(sessions.run(context, tenant, requests)) as stream:
                async for deltas in stream if requests[0].streamed else _whole(stream):
                    for increment in convert.increments(deltas, with_text):
                        await sessions.write(context, pb.GenerateResponse(increment=increment))
            result = convert.result(requests)
            result.request_id = client_id(result.request_id)
            await sessions.write(context, pb.GenerateResponse(result=result))
        except Exception as error:
            if not admitted:
                sessions.refuse(error)
            await abort(context, error)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        def tokenize() -> list[int]:
            inputs = self._llm.inputs
            if request.WhichOneof("input") == "messages":
                return inputs.chat_token_ids(convert.messages(request.messages))
            if request.WhichOneof("input") != "text":
                raise InvalidValueError("input", None, "must be one of text and messages")
            return inputs.encode(request.text)

        try:
            self._sessions.tenant(context)
            return pb.TokenizeResponse(token_ids=await self._llm.off_loop(tokenize, lane_of(request)))
        except Exception as error:
            await abort(context, error)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        try:
            self._sessions.tenant(context)
            decode = partial(self._llm.inputs.decode, request.token_ids, skip)
            return pb.DetokenizeResponse(text=await self._llm.off_loop(decode, lane_of(request)))
        except Exception as error:
            await abort(context, error)

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        try:
            tenant = self._sessions.tenant(context)
            for engine_id, owner in list(self._sessions.owners.items()):
                names = {client_id(engine_id)} if owner.name == tenant.name else set()
                if tenant.admin:
                    names.add(f"{owner.name}/{client_id(engine_id)}")
                if names.intersection(request.request_ids):
                    self._llm.abort(engine_id)
            return pb.AbortResponse()
        except Exception as error:
            await abort(context, error)

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        try:
            self._sessions.tenant(context)
        except Exception as error:
            await abort(context, error)
        llm, inputs = self._llm, self._llm.inputs
        return pb.GetModelResponse(
            name=self._name,
            vocab_size=inputs.model.vocab_size,
            eos_token_ids=inputs.model.eos_token_ids,
            has_tokenizer=inputs.tokenizer is not None,
            has_chat_template=inputs.tokenizer is not None and inputs.tokenizer.has_chat_template,
            tensor_parallel_size=llm.config.tensor_parallel_size,
            dtype=llm.dtype,
            kv_tokens=llm.num_blocks * llm.config.block_size,
            block_size=llm.config.block_size,
            limits=pb.Limits(
                max_model_len=inputs.max_model_len,
                max_n=MAX_N,
                max_logprobs=MAX_LOGPROBS,
                max_logit_bias=MAX_LOGIT_BIAS_ENTRIES,
                max_stop=MAX_STOP,
                max_stop_characters=MAX_STOP_CHARACTERS,
                max_messages=MAX_MESSAGES,
                max_prompt_bytes=MAX_PROMPT_BYTES,
                max_queued_requests=llm.max_queued_requests,
                max_request_seconds=self._sessions.max_request_s,
                max_grammar_bytes=MAX_GRAMMAR_BYTES if inputs.takes_grammars else 0,
                max_choices=MAX_CHOICES if inputs.takes_grammars else 0,
            ),
        )

    async def GetStats(self, request: pb.GetStatsRequest, context: Context) -> pb.GetStatsResponse:
        try:
            tenant = self._sessions.tenant(context)
            stats = await self._llm.stats()
        except Exception as error:
            await abort(context, error)
        # Hits of the prefix cache tell when others ask the same.
        details = json.dumps(stats) if tenant.admin else ""
        return pb.GetStatsResponse(json=details, **{name: stats[name] for name in _STATS})

    async def SubscribeKvEvents(self, request: pb.SubscribeKvEventsRequest, context: Context) -> None:
        capacity = request.capacity or CAPACITY
        try:
            if not self._sessions.tenant(context).admin:
                raise PermissionDeniedError("which blocks tenants have is told to admins, such as a router, alone")
            if capacity > 1 << 16:
                raise InvalidValueError("capacity", capacity, f"must be at most {1 << 16}")
            async with aclosing(kv_messages(self._llm, capacity)) as messages:
                snapshot = await anext(messages)
                await self._sessions.write(context, pb.SubscribeKvEventsResponse(snapshot=snapshot))
                async for data in messages:
                    await self._sessions.write(context, pb.SubscribeKvEventsResponse(events=data))
        except Exception as error:
            await abort(context, error)

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        try:
            if not self._sessions.tenant(context).admin:
                raise PermissionDeniedError("draining takes an admin's token")
            self._sessions.drain()
            await self._sessions.idle()
            self._sessions.drained.set()
            return pb.DrainResponse()
        except Exception as error:
            await abort(context, error)

    def _requests(self, request: pb.GenerateRequest, tenant: Tenant) -> list[Request]:
        inputs, number = self._llm.inputs, self._llm.next_number()
        name = self._sessions.engine_id(tenant, request.request_id)
        params = convert.sampling_params(request.sampling_params)
        ids = convert.prompt_ids(inputs, request)
        requests = list(inputs.requests(name, ids, params, number, tenant.cache_salt(request.cache_salt)))
        for one in requests:
            one.streamed = request.stream or not request.HasField("stream")
        return requests


async def _whole(stream: AsyncGenerator[list[Delta]]) -> AsyncGenerator[list[Delta]]:
    """The deltas of each sample, once it has ended."""
    kept: dict[int, list[Delta]] = {}
    async for deltas in stream:
        for delta in deltas:
            kept.setdefault(delta.request.index, []).append(delta)
            if delta.finished:
                yield kept.pop(delta.request.index)
