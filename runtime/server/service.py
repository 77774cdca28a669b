"""InferenceService: thin between the wire and the engine."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any, TypeAlias

import grpc

from headwise.runtime.aio import AsyncLLM
from headwise.runtime.engine import Delta
from headwise.runtime.inputs import MAX_MESSAGES, MAX_PROMPT_BYTES
from headwise.runtime.request import Request
from headwise.runtime.sampling_params import MAX_LOGIT_BIAS_ENTRIES, MAX_LOGPROBS, MAX_N, MAX_STOP, MAX_STOP_CHARACTERS
from headwise.runtime.server import convert
from headwise.runtime.server.auth import Tenant, Tokens
from headwise.runtime.server.errors import PermissionDeniedError, StalledError, UnavailableError, abort, code_of
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

    def __init__(self, llm: AsyncLLM, metrics: Metrics, tokens: Tokens, stall_timeout_s: float) -> None:
        """Args: ``stall_timeout_s``: how long a client may leave a stream unread before its request is ended."""
        self.llm, self.metrics, self.tokens, self.stall_timeout_s = llm, metrics, tokens, stall_timeout_s
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
        """What the engine calls a request: tenants do not see each other's ids.

        Raises:
            InvalidValueError: the client's id is too long or not printable.
        """
        if len(request_id) > MAX_REQUEST_ID or not request_id.isprintable():
            limit = f"must have at most {MAX_REQUEST_ID} printable characters"
            raise InvalidValueError("request_id", request_id, limit)
        return f"{tenant.name}/{request_id}"

    async def run(self, context: Context, tenant: Tenant, requests: list[Request]) -> AsyncGenerator[list[Delta]]:
        """The deltas of a request's samples; counts it and logs it, however it ends.

        Raises:
            UnavailableError: the server drains.
        """
        if self.draining:
            raise UnavailableError("this server drains and takes no more requests; use another")
        request_id, code = requests[0].request_id, grpc.StatusCode.OK
        if request_id in self.owners:
            raise InvalidValueError("request_id", request_id, "a request with this id still runs")
        self.owners[request_id] = tenant
        self._empty.clear()
        try:
            async with aclosing(self.llm.stream(requests)) as stream:
                async for deltas in stream:
                    yield deltas
        except (asyncio.CancelledError, GeneratorExit):
            code = grpc.StatusCode.CANCELLED
            raise
        except BaseException as error:
            code = code_of(error)
            raise
        finally:
            del self.owners[request_id]
            if not self.owners:
                self._empty.set()
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
        """Counts a request that was refused before it ran."""
        self.metrics.requests.labels(code_of(error).name).inc()

    def _account(self, tenant: Tenant, requests: list[Request], code: grpc.StatusCode) -> None:
        self.metrics.requests.labels(code.name).inc()
        self.metrics.observe(requests)
        first = requests[0].metrics
        line = {
            "request": requests[0].request_id.removeprefix(f"{tenant.name}/"),
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
            structured = request.sampling_params.HasField("structured_outputs")
            requests = await self._llm.off_loop(partial(self._requests, request, tenant), structured)
            with_text = self._llm.inputs.tokenizer is not None
            admitted = True
            async with aclosing(sessions.run(context, tenant, requests)) as stream:
                async for deltas in stream if requests[0].streamed else _whole(stream):
                    for increment in convert.increments(deltas, with_text):
                        await sessions.write(context, pb.GenerateResponse(increment=increment))
            result = convert.result(requests)
            result.request_id = result.request_id.removeprefix(f"{tenant.name}/")
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
            return pb.TokenizeResponse(token_ids=await asyncio.to_thread(tokenize))
        except Exception as error:
            await abort(context, error)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        try:
            self._sessions.tenant(context)
            text = await asyncio.to_thread(self._llm.inputs.decode, list(request.token_ids), skip)
            return pb.DetokenizeResponse(text=text)
        except Exception as error:
            await abort(context, error)

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        try:
            tenant = self._sessions.tenant(context)
            for engine_id, owner in list(self._sessions.owners.items()):
                mine = owner.name == tenant.name or tenant.admin
                if mine and engine_id.removeprefix(f"{owner.name}/") in request.request_ids:
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
                max_grammar_bytes=MAX_GRAMMAR_BYTES if inputs.takes_grammars else 0,
                max_choices=MAX_CHOICES if inputs.takes_grammars else 0,
            ),
        )

    async def GetStats(self, request: pb.GetStatsRequest, context: Context) -> pb.GetStatsResponse:
        try:
            self._sessions.tenant(context)
            stats = await self._llm.stats()
        except Exception as error:
            await abort(context, error)
        return pb.GetStatsResponse(json=json.dumps(stats), **{name: stats[name] for name in _STATS})

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
        name = self._sessions.engine_id(tenant, request.request_id or f"request-{number}")
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
