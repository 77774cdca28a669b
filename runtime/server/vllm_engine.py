"""The service that the gateway ``smg`` asks, so that OpenAI's clients reach this engine.

It is ``vllm.grpc.engine.VllmEngine`` of the package smg-grpc-proto. The gateway turns chats into tokens and tokens into
text. A proto3 field that is zero counts as not set. After INTERNAL the gateway asks another engine, so a request that
would fail there too is refused with INVALID_ARGUMENT.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import time
import zipfile
from collections.abc import Sequence
from contextlib import aclosing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import grpc
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2, vllm_engine_pb2_grpc

from headwise.runtime.addresses import leads_to_loopback
from headwise.runtime.engine.request import Request
from headwise.runtime.engine.text import Delta
from headwise.runtime.output import FinishReason
from headwise.runtime.sampling_params import MAX_LOGIT_BIAS_ENTRIES, MAX_STOP, MAX_STOP_TOKEN_IDS, SamplingParams
from headwise.runtime.server.errors import PermissionDeniedError, UnavailableError, abort
from headwise.runtime.server.health import HealthMonitor
from headwise.runtime.server.service import lane_of
from headwise.runtime.server.sessions import Call, Context, Sessions
from headwise.runtime.server.vllm_kv_events import kv_batches
from headwise.runtime.structured_outputs import MAX_CHOICES, StructuredOutputsParams
from headwise.workers.errors import InvalidValueError

SERVICE = vllm_engine_pb2.DESCRIPTOR.services_by_name["VllmEngine"].full_name
MAX_TOKENIZER_BYTES = 256 << 20
"""Of the tokenizer's files, before they are zipped."""
_CHUNK_BYTES = 1 << 20
_NOT_SERVED = ("kv_transfer_params", "kv_transfer_params_json", "mm_inputs", "media_refs")
_TOKENIZER_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
)


class VllmEngineService(vllm_engine_pb2_grpc.VllmEngineServicer):
    """The methods that the gateway uses; all others are UNIMPLEMENTED."""

    def __init__(self, sessions: Sessions, health: HealthMonitor, name: str) -> None:
        """
        Args:
            name: the model's name for clients.
        """
        self._sessions, self._llm, self._health, self._name = sessions, sessions.llm, health, name
        self._started, self._last_request = time.monotonic(), 0.0
        self._zipping: asyncio.Future[list[common_pb2.GetTokenizerChunk]] | None = None  # once somebody has asked

    async def Generate(self, request: vllm_engine_pb2.GenerateRequest, context: Context) -> None:
        self._last_request = time.time()
        async with self._sessions.call(context, request.request_id) as call:
            lane = lane_of(request, self._llm.inputs, _structured_outputs(request.sampling_params))
            await self._sessions.check(call, partial(self._requests, request, call), lane)
            async with aclosing(call.run()) as stream:
                async for deltas in stream:
                    for response in _responses(deltas, request.stream):
                        await self._sessions.write(context, response)

    async def HealthCheck(self, request: Any, context: Context) -> vllm_engine_pb2.HealthCheckResponse:
        # While other shards are started, requests wait here; the gateway would refuse them.
        problem = self._health.lasting_problem()
        return vllm_engine_pb2.HealthCheckResponse(healthy=problem is None, message=problem or "ok")

    async def Abort(self, request: vllm_engine_pb2.AbortRequest, context: Context) -> vllm_engine_pb2.AbortResponse:
        try:
            self._sessions.abort(self._sessions.tenant(context), request.request_ids)
            return vllm_engine_pb2.AbortResponse()
        except Exception as error:
            await abort(context, error)

    async def GetModelInfo(self, request: Any, context: Context) -> vllm_engine_pb2.GetModelInfoResponse:
        inputs = self._llm.inputs
        try:
            config = json.loads(await asyncio.to_thread((self._llm.model_path / "config.json").read_bytes))
        except OSError:  # gone since the model was loaded
            config = {}
        return vllm_engine_pb2.GetModelInfoResponse(
            model_path=self._name,  # the gateway has the path from its own options, and others are not told it
            is_generation=True,
            max_context_length=inputs.max_model_len,
            vocab_size=inputs.model.vocab_size,
            served_model_name=self._name,
            tokenizer_path=self._name,
            model_type=config.get("model_type", "llama"),
            architectures=config.get("architectures") or ["LlamaForCausalLM"],
            eos_token_ids=inputs.model.eos_token_ids,
            bos_token_id=config.get("bos_token_id") or 0,
            pad_token_id=config.get("pad_token_id") or 0,
            max_req_input_len=inputs.max_model_len - 1,
        )

    async def GetServerInfo(self, request: Any, context: Context) -> vllm_engine_pb2.GetServerInfoResponse:
        config = self._llm.config
        return vllm_engine_pb2.GetServerInfoResponse(
            active_requests=self._llm.num_streams,
            last_receive_timestamp=self._last_request,
            uptime_seconds=time.monotonic() - self._started,
            server_type="vllm-grpc",
            data_parallel_size=1,
            kv_cache_dtype=config.kv_dtype or "auto",
            block_size=config.block_size,
            model_dtype=self._llm.dtype,
            max_num_seqs=self._llm.max_running,
        )

    async def GetLoads(
        self, request: vllm_engine_pb2.GetLoadsRequest, context: Context
    ) -> vllm_engine_pb2.GetLoadsResponse:
        try:
            sees_blocks = self._sees_blocks(context)
            stats = await self._llm.stats()
        except Exception as error:
            await abort(context, error)
        used = stats["num_blocks"] - stats["num_free_blocks"]  # of none while other shards are started
        cache = stats["prefix_cache"]
        load = vllm_engine_pb2.SchedulerLoad(
            num_running_reqs=stats["num_running"],
            num_waiting_reqs=stats["num_waiting"],
            num_total_reqs=stats["num_running"] + stats["num_waiting"],
            token_usage=used / max(1, stats["num_blocks"]),
            cache_hit_rate=cache["hit_tokens"] / max(1, cache["queried_tokens"]) if sees_blocks else 0.0,
            max_running_requests=self._llm.max_running,
        )
        return vllm_engine_pb2.GetLoadsResponse(loads=[load])

    async def GetTokenizer(self, request: Any, context: Context) -> None:
        async with self._sessions.call(context, method="GetTokenizer"):
            for chunk in await self._zipped():
                await self._sessions.write(context, chunk)

    async def SubscribeKvEvents(self, request: common_pb2.SubscribeKvEventsRequest, context: Context) -> None:
        try:
            if not self._sees_blocks(context):
                raise PermissionDeniedError("which blocks there are is told to admins, and to this machine's programs")
            namespace = self._llm.inputs.kv_namespace(self._sessions.tenant(context).cache_salt(""))
            with self._sessions.subscriber():
                async with aclosing(kv_batches(self._llm, namespace)) as batches:
                    async for batch in batches:
                        await self._sessions.write(context, batch)
        except Exception as error:
            await abort(context, error)

    async def FlushCache(
        self, request: common_pb2.FlushCacheRequest, context: Context
    ) -> common_pb2.FlushCacheResponse:
        try:
            if not self._sessions.tenant(context).admin:
                raise PermissionDeniedError("emptying the prefix cache takes an admin's token")
            await self._llm.reset_prefix_cache()
        except Exception as error:
            await abort(context, error)
        return common_pb2.FlushCacheResponse(success=True, message="what runs goes on")

    def _sees_blocks(self, context: Context) -> bool:
        """Whether a client may know of the prompts of others, which the tokens of cached blocks are: an admin, or the
        gateway. That is a program of this machine, and nobody tells its calls from those of another."""
        return self._sessions.tenant(context).admin or leads_to_loopback(unquote(context.peer()))

    async def _zipped(self) -> list[common_pb2.GetTokenizerChunk]:
        """
        Raises:
            UnavailableError: there is no tokenizer, or it is too large.
        """
        if self._zipping is None or (self._zipping.done() and self._zipping.exception() is not None):
            zipping = asyncio.to_thread(_zipped_tokenizer, self._llm.model_path)
            self._zipping = asyncio.ensure_future(zipping)
        # Whoever leaves does not end it: the thread would go on, and the next call have another begin.
        return await asyncio.shield(self._zipping)

    def _requests(self, request: vllm_engine_pb2.GenerateRequest, call: Call) -> list[Request]:
        for name in _NOT_SERVED:
            if request.HasField(name):
                raise InvalidValueError(name, "given", "this engine serves text only, and no handoff through a gateway")
        if request.data_parallel_rank:
            raise InvalidValueError("data_parallel_rank", request.data_parallel_rank, "this engine is one rank, 0")
        inputs, number = self._llm.inputs, self._llm.next_number()
        params = sampling_params(request.sampling_params)
        tokenized = request.WhichOneof("input") == "tokenized"
        ids = inputs.token_ids(request.tokenized.input_ids if tokenized else request.text)
        requests = list(
            inputs.requests(call.engine_id, ids, params, number, call.tenant.cache_salt(""), call.tenant.name)
        )
        for one in requests:
            one.streamed = request.stream
        return requests


def sampling_params(message: vllm_engine_pb2.SamplingParams) -> SamplingParams:
    """
    Raises:
        InvalidValueError: a field is outside its limits, or asks for what Headwise cannot do.
    """
    if message.HasField("prompt_logprobs"):
        raise InvalidValueError("prompt_logprobs", message.prompt_logprobs, "only output tokens have logprobs here")
    if message.HasField("truncate_prompt_tokens"):
        raise InvalidValueError("truncate_prompt_tokens", message.truncate_prompt_tokens, "prompts are not truncated")
    fields: dict[str, Any] = {
        "temperature": message.temperature if message.HasField("temperature") else 1.0,
        "n": message.n or 1,
        "top_p": message.top_p or 1.0,
        "top_k": message.top_k,
        "min_p": message.min_p,
        "frequency_penalty": message.frequency_penalty,
        "presence_penalty": message.presence_penalty,
        "repetition_penalty": message.repetition_penalty or 1.0,
        "max_tokens": message.max_tokens if message.HasField("max_tokens") else None,
        "min_tokens": message.min_tokens,
        "stop": message.stop[: MAX_STOP + 1],
        "stop_token_ids": message.stop_token_ids[: MAX_STOP_TOKEN_IDS + 1],
        "ignore_eos": message.ignore_eos,
        "skip_special_tokens": message.skip_special_tokens,
        "include_stop_str_in_output": message.include_stop_str_in_output,
        "logprobs": message.logprobs if message.HasField("logprobs") else None,
        "seed": message.seed if message.HasField("seed") else None,
        "logit_bias": dict(islice(message.logit_bias.items(), MAX_LOGIT_BIAS_ENTRIES + 1)),
        "structured_outputs": _structured_outputs(message),
    }
    return SamplingParams(**fields)


_KINDS = {
    "json_schema": "json",
    "regex": "regex",
    "grammar": "grammar",
    "choice": "choice",
    "json_object": "json_object",
}


def _structured_outputs(message: vllm_engine_pb2.SamplingParams) -> StructuredOutputsParams | None:
    constraint = message.WhichOneof("constraint")
    if constraint is None or (constraint == "json_object" and not message.json_object):
        return None
    if constraint not in _KINDS:
        raise InvalidValueError(constraint, "given", f"this engine takes {', '.join(_KINDS)}")
    value = getattr(message, constraint)
    fields: dict[str, Any] = {_KINDS[constraint]: value.choices[: MAX_CHOICES + 1] if constraint == "choice" else value}
    return StructuredOutputsParams(**fields)


def _responses(deltas: Sequence[Delta], streaming: bool) -> list[vllm_engine_pb2.GenerateResponse]:
    """The messages for new deltas. In a stream: a chunk for each sample with new tokens. For each sample that has
    ended, a last message: with its last tokens again in a stream, else with all its tokens.

    Raises:
        InvalidValueError: a sample failed.
    """
    new: dict[int, list[Delta]] = {}
    for delta in deltas:
        new.setdefault(delta.request.index, []).append(delta)
    found: list[vllm_engine_pb2.GenerateResponse] = []
    for sample in new.values():
        request, tokens = sample[-1].request, [token for delta in sample for token in delta.token_ids]
        if request.finish_reason is FinishReason.ERROR:
            # Whoever computes this prompt gets the same; see the module's docstring.
            raise InvalidValueError("prompt", f"{len(request.prompt_token_ids)} tokens", request.error or "failed")
        if streaming and tokens:
            found.append(vllm_engine_pb2.GenerateResponse(chunk=_chunk(request, sample, tokens)))
        if sample[-1].finished:
            ended = _complete(request, sample if streaming else None, tokens if streaming else request.generated)
            found.append(vllm_engine_pb2.GenerateResponse(complete=ended))
    return found


def _chunk(request: Request, sample: Sequence[Delta], tokens: list[int]) -> vllm_engine_pb2.GenerateStreamChunk:
    return vllm_engine_pb2.GenerateStreamChunk(
        token_ids=tokens,
        prompt_tokens=len(request.prompt_token_ids),
        completion_tokens=len(tokens),
        cached_tokens=request.metrics.num_cached_tokens,
        output_logprobs=_logprobs(tokens, [delta.logprobs for delta in sample if delta.logprobs is not None]),
        index=request.index,
    )


def _complete(request: Request, sample: Sequence[Delta] | None, tokens: list[int]) -> vllm_engine_pb2.GenerateComplete:
    found = request.logprobs if sample is None else [delta.logprobs for delta in sample if delta.logprobs is not None]
    complete = vllm_engine_pb2.GenerateComplete(
        output_ids=tokens,
        finish_reason=request.finish_reason.value if request.finish_reason else "",
        prompt_tokens=len(request.prompt_token_ids),
        completion_tokens=len(tokens),
        cached_tokens=request.metrics.num_cached_tokens,
        output_logprobs=_logprobs(tokens, found),
        index=request.index,
    )
    if isinstance(request.stop_reason, str):
        complete.matched_stop_str = request.stop_reason
    elif request.stop_reason is not None:
        complete.matched_token_id = request.stop_reason
    return complete


def _logprobs(tokens: Sequence[int], found: Sequence[Any]) -> vllm_engine_pb2.OutputLogProbs | None:
    if not found:
        return None
    return vllm_engine_pb2.OutputLogProbs(
        token_logprobs=[one.chosen for one in found],
        token_ids=tokens,
        top_logprobs=[vllm_engine_pb2.TopLogProbs(values=one.top, token_ids=one.top_ids) for one in found],
    )


def _zipped_tokenizer(folder: Path) -> list[common_pb2.GetTokenizerChunk]:
    """The tokenizer's files of a model's directory, as a zip file in pieces.

    Raises:
        UnavailableError: the directory has none, or they are too large.
    """
    names = [name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not any(name.startswith("tokenizer.") for name in names):
        raise UnavailableError("the model has no tokenizer")
    size = sum((folder / name).stat().st_size for name in names)
    if size > MAX_TOKENIZER_BYTES:
        raise UnavailableError(f"the tokenizer's files have {size} bytes, and at most {MAX_TOKENIZER_BYTES} are sent")
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.write(folder / name, name)
    zipped = data.getvalue()
    chunks = [
        common_pb2.GetTokenizerChunk(data=zipped[at : at + _CHUNK_BYTES]) for at in range(0, len(zipped), _CHUNK_BYTES)
    ]
    chunks[-1].sha256 = hashlib.sha256(zipped).hexdigest()
    return chunks


def add_to(server: grpc.aio.Server, service: VllmEngineService) -> None:
    vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(service, server)
