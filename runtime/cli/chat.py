"""``headwise chat``: a conversation with a model."""

from __future__ import annotations

import sys
from typing import Annotated

from headwise.runtime.cli.options import (
    Address,
    AsJson,
    Attention,
    CpusPerRank,
    Device,
    Dtype,
    Executor,
    KvDtype,
    KvMemory,
    KvPolicy,
    MaxModelLen,
    MaxNumBatchedTokens,
    MaxTokens,
    Model,
    Seed,
    StreamingHeads,
    Temperature,
    TopK,
    TopP,
    Tp,
    engine_settings,
    option,
)
from headwise.runtime.cli.printing import print_json, raise_if_failed, take


def chat(
    model: Model,
    tp: Tp = 1,
    system: Annotated[str | None, option("text", "The system message; default: none.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    executor: Executor = "ray",
    max_model_len: MaxModelLen = None,
    kv_memory: KvMemory = None,
    cpus_per_rank: CpusPerRank = None,
    address: Address = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    attention: Attention = None,
    kv_policy: KvPolicy = "dense",
    kv_dtype: KvDtype = None,
    streaming_heads: StreamingHeads = None,
    as_json: AsJson = False,
) -> None:
    """Talk with a model.

    Each line is a message; an empty line or the end of input ends the conversation. By default the most likely token is
    taken each time.
    """
    from headwise.runtime import LLM, SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    messages = [{"role": "system", "content": system}] if system else []
    settings = engine_settings(
        *(tp, dtype, device, executor, max_model_len, kv_memory, cpus_per_rank, address),
        max_num_batched_tokens=max_num_batched_tokens,
        attention=attention,
        kv_policy=kv_policy,
        kv_dtype=kv_dtype,
        streaming_heads=streaming_heads,
    )
    with LLM(model, **settings) as llm:
        while line := _ask():
            messages.append({"role": "user", "content": line})
            answer, last = take(llm.stream(messages, params), show=not as_json)
            messages.append({"role": "assistant", "content": answer})
            if as_json:
                print_json(messages[-1])
            raise_if_failed(last.finish_reason, last.error)


def _ask() -> str:
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()
