"""LLM: a model in a Python program, called directly; runtime/client.py asks a server instead."""

from __future__ import annotations

import atexit
import itertools
import queue
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from headwise.runtime.config import EngineConfig, engine_config
from headwise.runtime.engine.engine import Engine
from headwise.runtime.engine.loop import EngineLoop
from headwise.runtime.engine.request import Request
from headwise.runtime.engine.text import Delta
from headwise.runtime.inputs.batches import as_params, as_prompts
from headwise.runtime.inputs.processor import InputProcessor, Messages, Prompt, check_request_id
from headwise.runtime.kv.events import KvEvents, Subscription
from headwise.runtime.output import CompletionOutput, FinishReason, Logprob, OutputDelta, RequestOutput
from headwise.runtime.sampling_params import SamplingParams
from headwise.runtime.sides import handoff_settings
from headwise.runtime.start import Started, run_engine, start_engine
from headwise.workers.errors import InvalidValueError
from headwise.workers.plan import TokenLogprobs


class LLM:
    """A model that is loaded and ready to generate.

    Close it, or use it as a context manager::

        with LLM("smollm2") as llm:
            [output] = llm.generate("The sky is", SamplingParams(temperature=0, max_tokens=64))
            print(output.outputs[0].text)

    Without SamplingParams a request samples at temperature 1.0 and ends after 16 tokens. Methods may be called from any
    thread, and run side by side.

    Attributes:
        model_path: the model's directory; of a .gguf file, the directory with its conversion.
        config: the settings it was built with.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        device: str = "auto",
        executor: str = "ray",
        max_model_len: int | None = None,
        block_size: int = 16,
        kv_memory: str | int | float | None = None,
        num_blocks: int | None = None,
        max_num_batched_tokens: int = 1024,
        max_mixed_prefill_tokens: int | None = None,
        max_num_seqs: int = 128,
        pipeline_depth: int = 2,
        attention: str | None = None,
        kv_policy: str = "dense",
        kv_dtype: str | None = None,
        streaming_heads: str | Path | None = None,
        enable_prefix_caching: bool = True,
        prefix_eviction: str = "lru",
        cache_quota: float | None = None,
        host_kv_memory: str | int | None = None,
        disk_kv_path: str | Path | None = None,
        disk_kv_limit: str | int = "16GiB",
        seed: int = 0,
        address: str | None = None,
        cpus_per_rank: float | None = None,
        start_timeout: float = 120.0,
        step_timeout: float | None = None,
        on_shard_death: str = "recover",
        warm_spare: bool = False,
        prefill: Mapping[str, Any] | None = None,
        decode: Mapping[str, Any] | None = None,
        handoff_min_tokens: int | None = None,
        on_handoff_failure: str = "recompute",
        handoff_shared_memory: bool = True,
        quiet: bool = False,
    ) -> None:
        """Loads a model.

        Args:
            model: the path of a directory with config.json and safetensors files, or of a .gguf file; or ``"smollm2"``,
                the demo model. The name of a model on a hub is not a path: nothing is downloaded.
            prefill: settings of an engine of its own that computes the prompts, in which it differs from this one, such
                as ``{"tensor_parallel_size": 1}``. The KV of the prompts is handed over.
            decode: settings of the engine that goes on from them; as if they were given to ``LLM`` itself.
            handoff_min_tokens, on_handoff_failure, handoff_shared_memory: which prompts are handed over, what becomes
                of a request if that fails, and how the bytes travel: ``min_tokens``, ``on_failure`` and
                ``shared_memory`` of :class:`~headwise.runtime.config.HandoffConfig`.
            quiet: print nothing on stderr; by default progress and the size of the KV cache are shown there.

        The other arguments are the fields of :class:`~headwise.runtime.config.EngineConfig`, which says what they mean.

        Raises:
            InvalidValueError: a setting is out of its limits, or nothing is at ``model``.
            UnsupportedModelError: the model is not a Llama that Headwise can serve.
            CheckpointError: the model's files are damaged or incomplete.
            GroupStartError, ShardGroupDied: the shards did not start.
        """
        settings: dict[str, Any] = {
            "tensor_parallel_size": tensor_parallel_size,
            "dtype": dtype,
            "device": device,
            "executor": executor,
            "max_model_len": max_model_len,
            "block_size": block_size,
            "kv_memory": kv_memory,
            "num_blocks": num_blocks,
            "max_num_batched_tokens": max_num_batched_tokens,
            "max_mixed_prefill_tokens": max_mixed_prefill_tokens,
            "max_num_seqs": max_num_seqs,
            "pipeline_depth": pipeline_depth,
            "attention": attention,
            "kv_policy": kv_policy,
            "kv_dtype": kv_dtype,
            "streaming_heads": str(streaming_heads) if streaming_heads is not None else None,
            "enable_prefix_caching": enable_prefix_caching,
            "prefix_eviction": prefix_eviction,
            "cache_quota": cache_quota,
            "host_kv_memory": host_kv_memory,
            "disk_kv_path": str(disk_kv_path) if disk_kv_path is not None else None,
            "disk_kv_limit": disk_kv_limit,
            "seed": seed,
            "address": address,
            "cpus_per_rank": cpus_per_rank,
            "start_timeout": start_timeout,
            "step_timeout": step_timeout,
            "on_shard_death": on_shard_death,
            "warm_spare": warm_spare,
        }
        handoff = handoff_settings(prefill, decode, handoff_min_tokens, on_handoff_failure, handoff_shared_memory)
        self.config: EngineConfig = engine_config(model=str(model), **settings | handoff)
        started = start_engine(self.config, quiet)
        self.model_path = started.model_path
        self._inputs: InputProcessor = started.inputs
        self._quiet = quiet
        self._numbers = itertools.count()
        self._queues: set[queue.SimpleQueue[list[Delta] | BaseException]] = set()
        self._prefill = started.prefill
        self._loop = run_engine(started, _FailAll(self._queues, started.engine.events))
        self._finalizer = weakref.finalize(self, _close, self._loop, started)
        # At exit before Ray's own shutdown, which was registered when the group imported Ray. weakref's hook may have
        # been registered long ago, and would find Ray gone.
        self._finalizer.atexit = False
        atexit.register(self._finalizer)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str = "",
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes prompts, and returns once all are done.

        Args:
            prompts: a text, a list of texts, a list of token ids, or a list of lists of token ids.
            sampling_params: one for all prompts, or a list with one for each. None is ``SamplingParams()``: temperature
                1.0, at most 16 tokens.
            cache_salt: requests share the prefix cache only with requests that have the same salt.
            use_tqdm: show a progress bar on stderr.

        Returns:
            The outputs in the order of the prompts. A request that failed alone, such as one whose logits were not
            finite, is among them, with the finish_reason ``error``.

        Raises:
            InvalidValueError: a prompt or a parameter is wrong; names the first such one. Nothing is computed then.
            ShardGroupDied: a shard died; no output of this call is returned.
        """
        listed = as_prompts(prompts)
        return self._run([self._inputs.token_ids(p) for p in listed], listed, sampling_params, cache_salt, use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str = "",
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers conversations, by the model's chat template, and returns once all are done.

        Args:
            messages: a conversation, which is a list of ``{"role": …, "content": …}``, or a list of conversations.

        The other arguments, the result and the errors are those of :meth:`generate`.
        """
        single = not isinstance(messages, Sequence) or not messages or isinstance(messages[0], Mapping)
        listed: Sequence[Any] = [messages] if single else messages
        ids = [self._inputs.chat_token_ids(conversation) for conversation in listed]
        ids = [self._inputs.token_ids(tokens) for tokens in ids]
        return self._run(ids, [None] * len(ids), sampling_params, cache_salt, use_tqdm)

    def stream(
        self,
        prompt: Prompt | Messages,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        cache_salt: str = "",
    ) -> Iterator[OutputDelta]:
        """Completes one prompt, or answers one conversation, and yields the output while it is generated.

        Leaving the iterator before its end aborts the request. A sample that fails alone ends with the finish_reason
        ``error``.

        Args:
            sampling_params: None is ``SamplingParams()``: temperature 1.0, at most 16 tokens.
            request_id: a name for :meth:`abort`, which no other request has while both run; None makes one up.
            cache_salt: as in :meth:`generate`.

        Raises:
            InvalidValueError: the prompt or a parameter is wrong. Of a request_id that is taken, only the first
                increment raises it.
            ShardGroupDied: a shard died.
        """
        params = sampling_params or SamplingParams()
        number = next(self._numbers)
        name = request_id if request_id is not None else f"request-{number}"
        return self._stream(list(self._inputs.requests(name, self._token_ids(prompt), params, number, cache_salt)))

    def abort(self, request_id: str) -> None:
        """Ends a request that another thread waits for; that thread gets the output so far, with the finish_reason
        ``abort``. Does nothing if no such request runs.

        Raises:
            InvalidValueError: request_id is no string.
        """
        check_request_id(request_id)
        self._loop.run(lambda engine: engine.abort(request_id))

    def pin_prefix(self, prompt: Prompt | Messages, ttl: float, *, cache_salt: str = "") -> int:
        """Computes a prompt, or the start of a conversation, and keeps its KV blocks in the prefix cache for a time.

        Args:
            ttl: how long the blocks are kept, in seconds.
            cache_salt: the salt of the requests that will use them.

        Returns:
            How many tokens are kept: those of the prompt's full blocks.

        Raises:
            InvalidValueError: the prompt or ttl is wrong, prefix caching is off, or too many blocks would be pinned.
            ShardGroupDied: a shard died.
        """
        if not self.config.enable_prefix_caching:
            raise InvalidValueError("enable_prefix_caching", False, "a prefix can only be pinned in a prefix cache")
        if not isinstance(ttl, (int, float)) or isinstance(ttl, bool) or not 0 < ttl <= sys.float_info.max:
            raise InvalidValueError("ttl", ttl, "must be a number of seconds above 0")
        number, ids = next(self._numbers), self._token_ids(prompt)
        params = SamplingParams(temperature=0, max_tokens=1)
        [request] = self._inputs.requests(f"request-{number}", ids, params, number, cache_salt)
        pinned: list[int | InvalidValueError] = []

        def pin(new: list[Delta]) -> list[Delta]:
            """On the engine's thread, as soon as the prompt is computed: nothing can take its blocks in between."""
            blocks = request.token_blocks
            if request.finish_reason is not FinishReason.ERROR and blocks is not None:
                try:
                    pinned.append(self._loop.engine.pin(blocks, len(ids), ttl))
                except InvalidValueError as error:
                    pinned.append(error)
            return new

        for _ in self._deltas([request], pin):
            pass
        if not pinned:
            raise InvalidValueError("prompt", f"{len(ids)} tokens", request.error or "was aborted")
        if isinstance(pinned[0], InvalidValueError):
            raise pinned[0]
        return pinned[0]

    def reset_prefix_cache(self) -> None:
        """Empties the prefix cache, and that of a prefill engine: on the device, in host memory, on disk. Pinned blocks
        go, too; running requests go on."""
        self._loop.run(Engine.reset_prefix_cache)
        if self._prefill is not None:
            self._prefill.reset_prefix_cache()

    def subscribe_kv_events(self, capacity: int = 1024) -> Subscription:
        """Subscribes to the changes of the prefix cache: msgpack messages for routers, described in
        ``headwise.runtime.kv.events``.

        Args:
            capacity: messages that may wait unread. A reader that falls further behind is told to take a snapshot.
        """
        return self._loop.run(lambda engine: engine.events.subscribe(capacity))

    def kv_snapshot(self) -> bytes:
        """The blocks that the prefix cache holds now, as msgpack, described in ``headwise.runtime.kv.events``."""
        return self._loop.run(lambda engine: engine.events.snapshot())

    def stats(self) -> dict[str, Any]:
        """What the engine and its shards hold and have done: the entries of
        :meth:`Engine.stats <headwise.runtime.engine.engine.Engine.stats>`, and by rank ``shards``, ``shard_pids`` and
        ``kv_bytes_per_rank``. With a prefill engine, ``prefill`` are that one's; it has none once it has ended."""

        def read(engine: Engine) -> dict[str, Any]:
            shards = engine.query_shards("stats")  # first: it processes the steps in flight
            return engine.stats() | {"shards": shards}

        stats = self._loop.run(read)
        stats["shard_pids"] = [shard["pid"] for shard in stats["shards"]]
        stats["kv_bytes_per_rank"] = [shard["kv_bytes"] for shard in stats["shards"]]
        if self._prefill is not None:
            stats["prefill"] = self._prefill.stats()
        return stats

    def close(self) -> None:
        """Ends the requests that run, the shards, and a Ray that was started for them. Idempotent."""
        self._finalizer()
        atexit.unregister(self._finalizer)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _token_ids(self, prompt: Prompt | Messages) -> list[int]:
        chat = isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        ids = self._inputs.chat_token_ids(prompt) if chat else prompt  # type: ignore[arg-type]
        return self._inputs.token_ids(ids)  # type: ignore[arg-type]

    def _run(
        self,
        token_ids: list[list[int]],
        prompts: Sequence[Prompt | None],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        cache_salt: str,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        params = as_params(sampling_params, len(token_ids))
        groups: list[list[Request]] = []
        for ids, param in zip(token_ids, params, strict=True):
            number = next(self._numbers)
            groups.append(list(self._inputs.requests(f"request-{number}", ids, param, number, cache_salt)))
        texts: dict[str, list[str]] = {request.key: [] for group in groups for request in group}
        requests = [request for group in groups for request in group]
        for request in requests:
            request.streamed = False

        def keep_text(new: list[Delta]) -> list[Delta]:
            """On the engine's thread, so that this one need not wake, and take a core from the shards, at each step."""
            for delta in new:
                if delta.text:
                    texts[delta.request.key].append(delta.text)
            return [delta for delta in new if delta.finished]

        with tqdm(total=len(requests), desc="generating", unit="seq", disable=self._quiet or not use_tqdm) as bar:
            for _ in self._deltas(requests, keep_text):
                bar.update()
        return [self._output(prompt, group, texts) for prompt, group in zip(prompts, groups, strict=True)]

    def _stream(self, requests: list[Request]) -> Iterator[OutputDelta]:
        for delta in self._deltas(requests):
            request = delta.request
            yield OutputDelta(
                request.request_id,
                request.index,
                delta.text,
                delta.token_ids,
                self._logprobs(delta.logprobs, delta.token_ids[0]) if delta.logprobs else None,
                request.finish_reason if delta.finished else None,
                request.error if delta.finished else None,
            )

    def _deltas(
        self, requests: list[Request], sift: Callable[[list[Delta]], list[Delta]] | None = None
    ) -> Iterator[Delta]:
        """Runs requests; leaving early, by an exception or Ctrl-C too, aborts those that still run.

        Args:
            sift: called on the engine's thread, picks what is wanted of what is new, the last of each request at least.
                None wants all of it.
        """
        deltas: queue.SimpleQueue[list[Delta] | BaseException] = queue.SimpleQueue()
        self._queues.add(deltas)
        ids = {request.request_id for request in requests}

        def put_some(new: list[Delta]) -> None:
            if sift is not None and (wanted := sift(new)):
                deltas.put(wanted)

        def add(engine: Engine) -> None:
            if taken := ids & engine.request_ids:
                raise InvalidValueError("request_id", min(taken), "a request with this id still runs")
            for request in requests:
                sink = deltas.put if sift is None else put_some
                engine.add(request, self._inputs.text_stream(request.params), sink)

        running = len(requests)
        try:
            try:
                self._loop.run(add)
            except InvalidValueError:
                running = 0
                raise
            while running:
                new = deltas.get()
                if isinstance(new, BaseException):
                    running = 0
                    raise new
                for delta in new:
                    running -= delta.finished
                    yield delta
        finally:
            self._queues.discard(deltas)
            if running:
                self._loop.post(lambda engine: _abort_all(engine, ids))

    def _output(self, prompt: Prompt | None, group: list[Request], texts: dict[str, list[str]]) -> RequestOutput:
        first = group[0]
        output = RequestOutput(
            first.request_id,
            prompt if isinstance(prompt, str) else None,
            first.prompt_token_ids,
            finished=True,
            num_cached_tokens=first.metrics.num_cached_tokens,
            metrics=first.metrics,
            error=next((request.error for request in group if request.error), None),
        )
        for request in group:
            logprobs = [self._logprobs(lp, t) for lp, t in zip(request.logprobs, request.generated, strict=False)]
            completion = CompletionOutput(
                request.index,
                "".join(texts[request.key]) if self._inputs.tokenizer is not None else None,
                request.generated,
                logprobs if request.params.logprobs is not None else None,
                request.finish_reason,
                request.stop_reason,
            )
            output.outputs.append(completion)
        return output

    def _logprobs(self, logprobs: TokenLogprobs, token: int) -> dict[int, Logprob]:
        tokenizer = self._inputs.tokenizer

        def entry(value: float, rank: int, token_id: int) -> Logprob:
            return Logprob(value, rank, tokenizer.decode([token_id]) if tokenizer is not None else None)

        table = {token: entry(logprobs.chosen, logprobs.rank, token)}
        for rank, (token_id, value) in enumerate(zip(logprobs.top_ids, logprobs.top, strict=True), start=1):
            table.setdefault(token_id, entry(value, rank, token_id))
        return table


class _FailAll:
    """Tells every caller that waits that the engine is gone. Holds no LLM, so that one can be collected."""

    def __init__(self, queues: set[queue.SimpleQueue[list[Delta] | BaseException]], events: KvEvents) -> None:
        self._queues, self._events = queues, events

    def __call__(self, error: BaseException) -> None:
        for deltas in list(self._queues):
            deltas.put(error)
        self._events.close()


def _abort_all(engine: Engine, request_ids: set[str]) -> None:
    for request_id in request_ids:
        engine.abort(request_id)


def _close(loop: EngineLoop, started: Started) -> None:
    try:
        loop.close()
    finally:
        started.close()
