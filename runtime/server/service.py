"""InferenceService: Headwise's gRPC API. Thin: it converts messages, and calls the sessions and the engine."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from google.protobuf.message import Message

from headwise.runtime.async_model import Lane
from headwise.runtime.engine.request import Request
from headwise.runtime.engine.text import Delta
from headwise.runtime.inputs.processor import MAX_MESSAGES, MAX_PROMPT_BYTES, InputProcessor
from headwise.runtime.sampling_params import MAX_LOGIT_BIAS_ENTRIES, MAX_LOGPROBS, MAX_N, MAX_STOP, MAX_STOP_CHARACTERS
from headwise.runtime.server import convert
from headwise.runtime.server.errors import PermissionDeniedError, abort
from headwise.runtime.server.kv_messages import CAPACITY, kv_messages
from headwise.runtime.server.sessions import Call, Context, Sessions
from headwise.runtime.structured_outputs import MAX_CHOICES, MAX_GRAMMAR_BYTES, StructuredOutputsParams
from headwise.v1 import inference_pb2 as pb
from headwise.v1.inference_pb2_grpc import InferenceServiceServicer
from headwise.workers.errors import InvalidValueError

_LARGE_BYTES = 32 << 10
"""Requests of more are checked on a thread of their own: 10,000 tokens as text, some 10 ms."""

_STATS = (
    *("num_running", "num_waiting", "num_blocks", "num_free_blocks"),
    *("num_steps", "num_generated_tokens", "num_preemptions"),
)


def lane_of(request: Message, inputs: InputProcessor, structured: StructuredOutputsParams | None = None) -> Lane | None:
    """The lane to check a request on: :meth:`~headwise.runtime.async_model.AsyncModel.off_loop`."""
    if structured is not None and not inputs.knows_grammar(structured):
        return "grammar"
    return "text" if request.ByteSize() > _LARGE_BYTES else None


class InferenceService(InferenceServiceServicer):
    """The service of proto/headwise/v1/inference.proto."""

    def __init__(self, sessions: Sessions, name: str) -> None:
        """
        Args:
            name: the model's name for clients.
        """
        self._sessions, self._llm, self._name = sessions, sessions.llm, name

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        async with self._sessions.call(context, request.request_id) as call:
            lane = lane_of(request, self._llm.inputs, convert.structured_outputs(request.sampling_params))
            requests = await self._sessions.check(call, partial(self._requests, request, call), lane)
            with_text = self._llm.inputs.tokenizer is not None
            async with aclosing(call.run()) as stream:
                async for deltas in stream if requests[0].streamed else _whole(stream):
                    for increment in convert.increments(deltas, with_text):
                        await self._sessions.write(context, pb.GenerateResponse(increment=increment))
            result = convert.result(requests)
            result.request_id = call.request_id
            await self._sessions.write(context, pb.GenerateResponse(result=result))

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        def tokenize() -> list[int]:
            inputs = self._llm.inputs
            if request.WhichOneof("input") == "messages":
                return inputs.chat_token_ids(convert.messages(request.messages))
            if request.WhichOneof("input") != "text":
                raise InvalidValueError("input", None, "must be one of text and messages")
            return inputs.encode(request.text)

        async with self._sessions.call(context, method="Tokenize") as call:
            token_ids = await self._sessions.off_loop(call, tokenize, lane_of(request, self._llm.inputs))
        return pb.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        decode = partial(self._llm.inputs.decode, request.token_ids, skip)
        async with self._sessions.call(context, method="Detokenize") as call:
            text = await self._sessions.off_loop(call, decode, lane_of(request, self._llm.inputs))
        return pb.DetokenizeResponse(text=text)

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        try:
            self._sessions.abort(self._sessions.tenant(context), request.request_ids)
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
            kv_policy=inputs.kv_policy,
            kv_dtype=llm.config.kv_dtype or llm.dtype,
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
            tenant = self._sessions.tenant(context)
            if not (tenant.admin or tenant.peer):
                limit = "which blocks tenants have is told to admins, such as a router, and to peers alone"
                raise PermissionDeniedError(limit)
            if capacity > 1 << 16:
                raise InvalidValueError("capacity", capacity, f"must be at most {1 << 16}")
            with self._sessions.subscriber():
                async with aclosing(kv_messages(self._llm, capacity)) as messages:
                    async for kind, data in messages:
                        await self._sessions.write(context, pb.SubscribeKvEventsResponse(**{kind: data}))
        except Exception as error:
            await abort(context, error)

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        try:
            if not self._sessions.tenant(context).admin:
                raise PermissionDeniedError("draining takes an admin's token")
            self._sessions.drain()
            await self._sessions.idle()
            return pb.DrainResponse()
        except Exception as error:
            await abort(context, error)

    def _requests(self, request: pb.GenerateRequest, call: Call) -> list[Request]:
        inputs, number = self._llm.inputs, self._llm.next_number()
        params = convert.sampling_params(request.sampling_params)
        ids = convert.prompt_ids(inputs, request)
        salt = call.tenant.cache_salt(request.cache_salt)
        requests = list(inputs.requests(call.engine_id, ids, params, number, salt, call.tenant.name))
        for one in requests:
            one.streamed = request.stream or not request.HasField("stream")
        return requests


async def _whole(stream: AsyncGenerator[list[Delta]]) -> AsyncGenerator[list[Delta]]:
    """Holds back the deltas of each sample until it has ended."""
    kept: dict[int, list[Delta]] = {}
    async for deltas in stream:
        for delta in deltas:
            kept.setdefault(delta.request.index, []).append(delta)
            if delta.finished:
                yield kept.pop(delta.request.index)
