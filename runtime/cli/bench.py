"""``headwise bench``: the benchmarks as commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headwise.runtime.cli.options import (
    Address,
    AsJson,
    CpusPerRank,
    Device,
    Dtype,
    Executor,
    KvMemory,
    MaxModelLen,
    MaxNumBatchedTokens,
    Model,
    PipelineDepth,
    Tp,
    engine_settings,
)
from headwise.workers.errors import InvalidValueError

# Each command imports what it runs, so that none waits for the imports of another.

bench = typer.Typer(help="Measure this machine's throughput and latency.", no_args_is_help=True)

Batches = Annotated[str, typer.Option(help="Batch sizes, separated by commas.")]
Plot = Annotated[Path | None, typer.Option(help="Also draw a picture: a .png, .svg or .pdf; needs 'headwise\\[plot]'.")]
Bound = Annotated[bool, typer.Option(help="First measure what the machine allows, to say how much of it is reached.")]


@bench.command()
def throughput(
    model: Model,
    tp: Tp = 1,
    batches: Batches = "1,8,32",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 42,
    repeats: Annotated[int, typer.Option(min=1, help="Runs a batch size; reported: the best and the median.")] = 3,
    dtype: Dtype = "auto",
    device: Device = "auto",
    executor: Executor = "ray",
    max_model_len: MaxModelLen = 2048,
    kv_memory: KvMemory = None,
    cpus_per_rank: CpusPerRank = None,
    address: Address = None,
    pipeline_depth: PipelineDepth = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    bound: Bound = True,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Decode throughput, prefill included: greedy, end-of-sequence ignored, random prompts without a shared prefix."""
    from headwise.runtime.bench import throughput as measure

    sizes = _sizes("--batches", batches)
    settings = engine_settings(
        tp, dtype, device, executor, max_model_len, kv_memory, cpus_per_rank, address,
        pipeline_depth, max_num_batched_tokens,
    )  # fmt: skip
    measure.run(model, sizes, tokens, prompt_tokens, repeats, settings, bound=bound, as_json=as_json, plot=plot)


@bench.command()
def latency(
    model: Model,
    tp: Tp = 1,
    rate: Annotated[float, typer.Option(min=1e-3, help="Requests a second, on average.")] = 1.0,
    requests: Annotated[int, typer.Option(min=1, max=4096, help="Requests to send.")] = 32,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 64,
    steady: Annotated[int, typer.Option(min=0, max=128, help="Rows that decode all the while.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the arrivals: same seed, same times.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    executor: Executor = "ray",
    max_model_len: MaxModelLen = 2048,
    kv_memory: KvMemory = None,
    cpus_per_rank: CpusPerRank = None,
    address: Address = None,
    pipeline_depth: PipelineDepth = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    bound: Bound = True,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Time to first token, between tokens and end to end, of requests that arrive at random times (open loop)."""
    from headwise.runtime.bench import latency as measure

    settings = engine_settings(
        tp, dtype, device, executor, max_model_len, kv_memory, cpus_per_rank, address,
        pipeline_depth, max_num_batched_tokens,
    )  # fmt: skip
    load = measure.Load(rate, requests, prompt_tokens, tokens, steady, seed)
    measure.run(model, load, settings, bound=bound, as_json=as_json, plot=plot)


@bench.command()
def step(
    model: Model,
    tp: Tp = 1,
    batches: Batches = "1,8,32",
    context: Annotated[int, typer.Option(min=1, help="Prompt tokens of each row that decodes.")] = 42,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps of a reading.")] = 32,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt whose prefill is measured.")] = 1024,
    repeats: Annotated[int, typer.Option(min=1, help="Readings of each; reported: the median.")] = 3,
    dtype: Dtype = "auto",
    device: Device = "auto",
    executor: Executor = "ray",
    max_model_len: MaxModelLen = 2048,
    kv_memory: KvMemory = None,
    cpus_per_rank: CpusPerRank = None,
    address: Address = None,
    pipeline_depth: PipelineDepth = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    bound: Bound = True,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Where the time of a step goes: steady decoding at each batch size, and the prefill of one prompt."""
    from headwise.runtime.bench import step as measure

    sizes = _sizes("--batches", batches)
    settings = engine_settings(
        tp, dtype, device, executor, max_model_len, kv_memory, cpus_per_rank, address,
        pipeline_depth, max_num_batched_tokens,
    )  # fmt: skip
    measure.run(model, sizes, context, steps, prompt_tokens, repeats, settings, bound=bound, as_json=as_json, plot=plot)


@bench.command()
def limits(
    model: Model,
    batches: Batches = "1,8,32",
    chunk: Annotated[str, typer.Option(help="Rows of a prefill chunk, separated by commas.")] = "256,1024",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads to compute with; default: all cores.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each; the bound is the fastest.")] = 5,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """What this machine allows: the matrix products of a step alone, in float32, no engine involved."""
    from headwise.runtime.bench import limits as measure

    sizes, chunks = _sizes("--batches", batches), _sizes("--chunk", chunk)
    measure.run(model, sizes, chunks, threads, repeats, as_json=as_json, plot=plot)


@bench.command("kv-cache")
def kv_cache(
    model: Annotated[str, typer.Option("--model", "-m", help="tiny is a random model made for this.")] = "tiny",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 512,
    executor: Executor = "local",
    kv_memory: KvMemory = None,
    cpus_per_rank: CpusPerRank = None,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """What a KV cache saves: the same tokens generated with one and without."""
    from headwise.runtime.bench import kv_cache as measure

    settings = engine_settings(1, "auto", "auto", executor, None, kv_memory, cpus_per_rank, None)
    measure.run(model, tokens, settings, as_json=as_json, plot=plot)


@bench.command()
def prefix(
    model: Annotated[str, typer.Option("--model", "-m", help="tiny is a random model made for this.")] = "tiny",
    tp: Tp = 1,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompts, parts of which are found.")] = 2048,
    repeats: Annotated[int, typer.Option(min=1, help="Readings of each; reported: the median.")] = 3,
    host: Annotated[str, typer.Option(help="Host memory to restore from, such as 1GiB; none: do not measure it.")] = (
        "1GiB"
    ),
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once where nothing is found.")] = 32,
    pairs: Annotated[int, typer.Option(min=0, help="Runs of those with the cache, and as many without.")] = 5,
    dtype: Dtype = "auto",
    device: Device = "auto",
    executor: Executor = "local",
    kv_memory: KvMemory = None,
    cpus_per_rank: CpusPerRank = None,
    address: Address = None,
    pipeline_depth: PipelineDepth = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """What the prefix cache saves: time to first token by what is found of a prompt; what it costs if nothing is."""
    from headwise.runtime.bench import prefix as measure

    settings = engine_settings(
        tp, dtype, device, executor, None, kv_memory, cpus_per_rank, address, pipeline_depth, max_num_batched_tokens
    )
    load = measure.Load(prompt_tokens, repeats, None if host == "none" else host, batch, pairs)
    measure.run(model, load, settings, as_json=as_json, plot=plot)


@bench.command()
def serve(
    model: Model,
    tp: Tp = 1,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 32,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 42,
    requests: Annotated[int, typer.Option(min=1, help="Single requests, for the time to the first token.")] = 32,
    pairs: Annotated[int, typer.Option(min=1, help="How often each way is measured, in turns.")] = 3,
    dtype: Dtype = "auto",
    device: Device = "auto",
    executor: Executor = "ray",
    max_model_len: MaxModelLen = 2048,
    kv_memory: KvMemory = None,
    cpus_per_rank: CpusPerRank = None,
    address: Address = None,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """What the gRPC service costs: throughput and time to first token through it, and through the driver."""
    from headwise.runtime.bench import serve as measure

    settings = engine_settings(tp, dtype, device, executor, max_model_len, kv_memory, cpus_per_rank, address)
    measure.run(
        model, measure.Load(batch, tokens, prompt_tokens, requests, pairs), settings, as_json=as_json, plot=plot
    )


def _sizes(flag: str, text: str) -> list[int]:
    """Numbers separated by commas, each once.

    Raises:
        InvalidValueError: one is not a whole number of at least 1.
    """
    for size in text.split(","):
        if not size.strip().isdigit() or int(size) < 1:
            raise InvalidValueError(flag, size, "must be a whole number of at least 1")
    return list(dict.fromkeys(int(size) for size in text.split(",")))
