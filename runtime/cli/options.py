"""The options that commands share, and from them to an engine's settings."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Annotated, Any

import typer

from headwise.workers.errors import HeadwiseError

MODEL_HELP = "A Hugging Face directory, a .gguf file, or smollm2."
Model = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)]
Tp = Annotated[int, typer.Option("--tp", help="Ranks the model is split over.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Executor = Annotated[str, typer.Option(help="ray: an actor a rank; local: one rank in this process.")]
MaxModelLen = Annotated[int | None, typer.Option(help="Most tokens of a request, prompt and output.")]
KvMemory = Annotated[str | None, typer.Option(help="KV memory of each rank: 2GiB, 512MiB, or a fraction such as 0.5.")]
CpusPerRank = Annotated[float | None, typer.Option(help="CPUs each rank asks Ray for; default: cores / ranks.")]
Address = Annotated[str | None, typer.Option(help="The Ray to join; default: RAY_ADDRESS, or start one here.")]
PipelineDepth = Annotated[int | None, typer.Option(help="Steps in flight at once: 1 or 2.")]
MaxNumBatchedTokens = Annotated[int | None, typer.Option(help="Most tokens of a step; longer prompts go in chunks.")]
HostKvMemory = Annotated[str | None, typer.Option(help="Host memory of each rank for KV blocks evicted: 4GiB.")]
DiskKvPath = Annotated[str | None, typer.Option(help="A folder where each rank keeps KV blocks evicted from memory.")]
DiskKvLimit = Annotated[str | None, typer.Option(help="The most that each rank keeps there; default: 16GiB.")]
PrefixCaching = Annotated[bool, typer.Option(help="Share KV blocks between requests with equal beginnings.")]
CacheQuota = Annotated[float | None, typer.Option(help="Share of the prefix cache that one tenant may fill.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option(help="0 always takes the most likely token.")]
TopP = Annotated[float, typer.Option(help="Sample from the most likely tokens that together reach this probability.")]
TopK = Annotated[int, typer.Option(help="Sample from so many of the most likely tokens; 0 is all.")]
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
) -> dict[str, Any]:
    """What ``LLM`` takes; an option that was not given is left to its default there."""
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
    }
    return {name: value for name, value in settings.items() if value is not None}


ENGINE_PARAMETERS = ("model", *inspect.signature(engine_settings).parameters)
"""Of commands: what is for an engine in this process."""


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
