"""The options that commands share, and from them to an engine's settings."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Annotated, Any

import typer

from headwise.workers.errors import HeadwiseError


def option(metavar: str, text: str, *names: str, **limits: Any) -> Any:
    """A typer.Option whose help reads ``--name <metavar>  text``."""
    return typer.Option(*names, metavar=f"<{metavar}>", help=text, **limits)


MODEL_HELP = "A directory with config.json and safetensors files, a .gguf file, or smollm2; nothing is downloaded."
Model = Annotated[str, option("path", MODEL_HELP, "--model", "-m")]
Tp = Annotated[int, option("n", "Ranks: processes that the model is split over.", "--tp")]
Dtype = Annotated[
    str, option("type", "float32, bfloat16, float16, or auto: float32 on cpu, as in the checkpoint on cuda.")
]
Device = Annotated[str, option("device", "cpu, cuda, or auto: cuda where there is one.")]
Executor = Annotated[
    str, option("name", "ray: each rank is a Ray actor; local: one rank, in this process, without Ray.")
]
MaxModelLen = Annotated[
    int | None, option("n", "Most tokens of a request, prompt and output together; default: the model's own limit.")
]
KvMemory = Annotated[
    str | None,
    option(
        "size", "KV cache of each rank: 512MiB, or 0.5 for half of what is free; default: 2GiB on cpu, 0.9 on cuda."
    ),
]
CpusPerRank = Annotated[
    float | None, option("n", "CPUs that each rank computes with; default: the cores divided by the ranks.")
]
Address = Annotated[
    str | None, option("address", "The Ray cluster to join; default: RAY_ADDRESS, or a Ray started for this run.")
]
PipelineDepth = Annotated[int | None, option("n", "Steps in flight at the same time, 1 or 2; default: 2.")]
MaxNumBatchedTokens = Annotated[
    int | None, option("n", "Most tokens of a step, longer prompts are split; default: 1024.")
]
Attention = Annotated[
    str | None,
    option("backend", "cpu, cuda (Triton), flashinfer, or reference (plain torch, slow); default: the fastest."),
]
KvPolicy = Annotated[
    str,
    option("policy", "Which earlier tokens are kept: dense, all; window:L, the last L; sinks:S,L, the first S, too."),
]
KvDtype = Annotated[
    str | None,
    option("type", "Of keys and values: float32, bfloat16, float16, int8, int4, or int8/int4; default: --dtype."),
]
StreamingHeads = Annotated[
    str | None, option("file", "Heads with a policy of their own, as headwise calibrate names them; default: none.")
]
HostKvMemory = Annotated[
    str | None, option("size", "Host memory of each rank for KV blocks that left the device: 4GiB; default: none.")
]
DiskKvPath = Annotated[
    str | None, option("folder", "Where each rank keeps KV blocks that left its memory; default: nowhere.")
]
DiskKvLimit = Annotated[str | None, option("size", "Most that the files of each rank there may take; default: 16GiB.")]
PrefixCaching = Annotated[bool, typer.Option(help="Requests with equal beginnings share what is computed of them.")]
CacheQuota = Annotated[float | None, option("share", "Of the prefix cache, for each tenant: 0.5; default: no limit.")]
OnShardDeath = Annotated[
    str,
    option("what", "recover: start the shards again, and go on with the requests that run; fail: end the engine."),
]
WarmSpare = Annotated[
    bool,
    typer.Option(
        "--warm-spare", help="Keep shards with their weights loaded, to take the place of those that die at once."
    ),
]
MaxTokens = Annotated[int, option("n", "Most tokens to generate.")]
Temperature = Annotated[float, option("number", "0 takes the most likely token each time; more is more random.")]
TopP = Annotated[
    float, option("number", "Sample only from the most likely tokens that together reach this probability.")
]
TopK = Annotated[int, option("n", "Sample only from this many of the most likely tokens; 0: from all.")]
Seed = Annotated[int | None, option("n", "The same seed gives the same text.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def engine_settings(
    tp: int,
    dtype: str,
    device: str,
    executor: str,
    max_model_len: int | None,
    kv_memory: str | None,
    cpus_per_rank: float | None,
    address: str | None,
    pipeline_depth: int | None = None,
    max_num_batched_tokens: int | None = None,
    attention: str | None = None,
    kv_policy: str | None = None,
    kv_dtype: str | None = None,
    streaming_heads: str | None = None,
) -> dict[str, Any]:
    """The arguments of ``LLM``; an option that is None is left out, so that ``LLM``'s own default holds."""
    settings = {
        "tensor_parallel_size": tp,
        "dtype": dtype,
        "device": device,
        "executor": executor,
        "max_model_len": max_model_len,
        "kv_memory": kv_memory,
        "cpus_per_rank": cpus_per_rank,
        "address": address,
        "pipeline_depth": pipeline_depth,
        "max_num_batched_tokens": max_num_batched_tokens,
        "attention": attention,
        "kv_policy": kv_policy,
        "kv_dtype": kv_dtype,
        "streaming_heads": streaming_heads,
    }
    return {name: value for name, value in settings.items() if value is not None}


ENGINE_PARAMETERS = ("model", *inspect.signature(engine_settings).parameters)
"""Names of the commands' parameters that are for an engine in this process."""


class FlagError(HeadwiseError):
    """A flag is missing, or does not go with the others. Says nothing of its value, which may be secret."""

    def __init__(self, flag: str, limit: str, fix: str) -> None:
        super().__init__(f"{flag}: {limit}; {fix}")


def refuse_flags(ctx: typer.Context, parameters: Collection[str], limit: str, fix: str) -> None:
    """
    Args:
        parameters: names of the command's, which the command line must not give. Defaults do not count, nor does what
            the environment holds for other runs.

    Raises:
        FlagError: of the first that is given.
    """
    for parameter in ctx.command.params:
        name = parameter.name or ""
        source = ctx.get_parameter_source(name)
        if name in parameters and source is not None and source.name == "COMMANDLINE":
            raise FlagError(parameter.opts[0], limit, fix)
