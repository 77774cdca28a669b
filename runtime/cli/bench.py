"""``headwise bench``: the benchmarks as commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from headwise.runtime.cli.options import (
    MODEL_HELP,
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
    Model,
    PipelineDepth,
    StreamingHeads,
    Tp,
    engine_settings,
    option,
)
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.format import KV_DTYPES

# Each command imports what it runs, so that none waits for the imports of another.

bench = typer.Typer(help="Measure this machine's throughput and latency.", no_args_is_help=True)

Batches = Annotated[str, option("sizes", "Batch sizes: numbers of prompts, separated by commas.")]
Threads = Annotated[int | None, option("n", "Threads to compute with; default: all cores.", min=1)]
Plot = Annotated[Path | None, option("file", "Also draw a picture: a .png, .svg or .pdf; needs 'headwise[plot]'.")]
ModelOrTiny = Annotated[str, option("path", "As --model of generate, or tiny: a small random model.", "--model", "-m")]
Bound = Annotated[bool, typer.Option(help="First measure what the machine allows; report how much of that is reached.")]


@bench.command()
def throughput(
    model: Model,
    tp: Tp = 1,
    batches: Batches = "1,8,32",
    tokens: Annotated[int, option("n", "Tokens to generate for each prompt.", min=1)] = 64,
    prompt_tokens: Annotated[int, option("n", "Tokens of each prompt.", min=1)] = 42,
    repeats: Annotated[int, option("n", "Runs of each batch size; reported: the best and the median.", min=1)] = 3,
    dtype: Dtype = "auto",
    device: Device = "auto",
    executor: Executor = "ray",
    max_model_len: MaxModelLen = 2048,
    kv_memory: KvMemory = None,
    cpus_per_rank: CpusPerRank = None,
    address: Address = None,
    pipeline_depth: PipelineDepth = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    kv_policy: KvPolicy = "dense",
    kv_dtype: KvDtype = None,
    bound: Bound = True,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Generated tokens a second, by batch size.

    Prompts are random, without a shared beginning. The time of their prefill counts. Tokens are the most likely ones;
    end-of-sequence is ignored.
    """
    from headwise.runtime.bench import throughput as measure

    sizes = _sizes("--batches", batches)
    settings = engine_settings(
        tp, dtype, device, executor, max_model_len, kv_memory, cpus_per_rank, address,
        pipeline_depth, max_num_batched_tokens, kv_policy=kv_policy, kv_dtype=kv_dtype,
    )  # fmt: skip
    measure.run(model, sizes, tokens, prompt_tokens, repeats, settings, bound=bound, as_json=as_json, plot=plot)


@bench.command()
def latency(
    model: Model,
    tp: Tp = 1,
    rate: Annotated[float, option("n", "Requests a second, on average.", min=1e-3)] = 1.0,
    requests: Annotated[int, option("n", "Requests to send.", min=1, max=4096)] = 32,
    prompt_tokens: Annotated[int, option("n", "Tokens of each prompt.", min=1)] = 128,
    tokens: Annotated[int, option("n", "Tokens to generate for each prompt.", min=1)] = 64,
    steady: Annotated[int, option("n", "Streams that generate all the while.", min=0, max=128)] = 0,
    seed: Annotated[int, option("n", "The same seed gives the same times of arrival.", min=0)] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    executor: Executor = "ray",
    max_model_len: MaxModelLen = 2048,
    kv_memory: KvMemory = None,
    cpus_per_rank: CpusPerRank = None,
    address: Address = None,
    pipeline_depth: PipelineDepth = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    kv_policy: KvPolicy = "dense",
    kv_dtype: KvDtype = None,
    bound: Bound = True,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Time to the first token, between tokens and to the end.

    Requests arrive at random times, whether or not earlier ones are done (an open loop).
    """
    from headwise.runtime.bench import latency as measure

    settings = engine_settings(
        tp, dtype, device, executor, max_model_len, kv_memory, cpus_per_rank, address,
        pipeline_depth, max_num_batched_tokens, kv_policy=kv_policy, kv_dtype=kv_dtype,
    )  # fmt: skip
    load = measure.Load(rate, requests, prompt_tokens, tokens, steady, seed)
    measure.run(model, load, settings, bound=bound, as_json=as_json, plot=plot)


@bench.command()
def step(
    model: Model,
    tp: Tp = 1,
    batches: Batches = "1,8,32",
    context: Annotated[int, option("n", "Prompt tokens of each stream that generates.", min=1)] = 42,
    steps: Annotated[int, option("n", "Decode steps of a reading.", min=1)] = 32,
    prompt_tokens: Annotated[int, option("n", "Tokens of the prompt whose prefill is measured.", min=1)] = 1024,
    repeats: Annotated[int, option("n", "Readings of each case; reported: the median.", min=1)] = 3,
    dtype: Dtype = "auto",
    device: Device = "auto",
    executor: Executor = "ray",
    max_model_len: MaxModelLen = 2048,
    kv_memory: KvMemory = None,
    cpus_per_rank: CpusPerRank = None,
    address: Address = None,
    pipeline_depth: PipelineDepth = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    kv_policy: KvPolicy = "dense",
    kv_dtype: KvDtype = None,
    bound: Bound = True,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Where the time of a step goes.

    Measured are steps that decode, at each batch size, and those that prefill one prompt.
    """
    from headwise.runtime.bench import step as measure

    sizes = _sizes("--batches", batches)
    settings = engine_settings(
        tp, dtype, device, executor, max_model_len, kv_memory, cpus_per_rank, address,
        pipeline_depth, max_num_batched_tokens, kv_policy=kv_policy, kv_dtype=kv_dtype,
    )  # fmt: skip
    measure.run(model, sizes, context, steps, prompt_tokens, repeats, settings, bound=bound, as_json=as_json, plot=plot)


@bench.command()
def limits(
    model: Model,
    batches: Batches = "1,8,32",
    chunk: Annotated[str, option("sizes", "Rows of a prefill chunk, separated by commas.")] = "256,1024",
    threads: Threads = None,
    repeats: Annotated[int, option("n", "Runs of each case; the bound is the fastest.", min=1)] = 5,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """What this machine allows at most.

    Measured are the matrix products of a step alone, in float32, without an engine.
    """
    from headwise.runtime.bench import limits as measure

    sizes, chunks = _sizes("--batches", batches), _sizes("--chunk", chunk)
    measure.run(model, sizes, chunks, threads, repeats, as_json=as_json, plot=plot)


@bench.command("kv-cache")
def kv_cache(
    model: ModelOrTiny = "tiny",
    tokens: Annotated[int, option("n", "Tokens to generate.", min=1)] = 512,
    executor: Executor = "local",
    kv_memory: KvMemory = None,
    cpus_per_rank: CpusPerRank = None,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """What a KV cache saves: the same tokens with and without."""
    from headwise.runtime.bench import kv_cache as measure

    settings = engine_settings(1, "auto", "auto", executor, None, kv_memory, cpus_per_rank, None)
    measure.run(model, tokens, settings, as_json=as_json, plot=plot)


@bench.command()
def prefix(
    model: ModelOrTiny = "tiny",
    tp: Tp = 1,
    prompt_tokens: Annotated[int, option("n", "Tokens of each prompt; parts of it are in the cache.", min=1)] = 2048,
    repeats: Annotated[int, option("n", "Readings of each case; reported: the median.", min=1)] = 3,
    host: Annotated[str, option("size", "Host memory to restore from, or none: restoring is not measured.")] = ("1GiB"),
    batch: Annotated[int, option("n", "Prompts at once, where nothing is in the cache.", min=1)] = 32,
    pairs: Annotated[int, option("n", "Runs of such a batch with the cache, and as many without.", min=0)] = 5,
    dtype: Dtype = "auto",
    device: Device = "auto",
    executor: Executor = "local",
    kv_memory: KvMemory = None,
    cpus_per_rank: CpusPerRank = None,
    address: Address = None,
    pipeline_depth: PipelineDepth = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    kv_policy: KvPolicy = "dense",
    kv_dtype: KvDtype = None,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """What the prefix cache saves, and what it costs.

    Saved: time to the first token, by how much of a prompt is in the cache. Cost: throughput where nothing is.
    """
    from headwise.runtime.bench import prefix as measure

    settings = engine_settings(
        tp, dtype, device, executor, None, kv_memory, cpus_per_rank, address,
        pipeline_depth, max_num_batched_tokens, kv_policy=kv_policy, kv_dtype=kv_dtype,
    )  # fmt: skip
    load = measure.Load(prompt_tokens, repeats, None if host == "none" else host, batch, pairs)
    measure.run(model, load, settings, as_json=as_json, plot=plot)


@bench.command()
def serve(
    model: Model,
    tp: Tp = 1,
    batch: Annotated[int, option("n", "Prompts at once.", min=1)] = 32,
    tokens: Annotated[int, option("n", "Tokens to generate for each prompt.", min=1)] = 64,
    prompt_tokens: Annotated[int, option("n", "Tokens of each prompt.", min=1)] = 42,
    requests: Annotated[int, option("n", "Requests one by one, for the time to the first token.", min=1)] = 32,
    pairs: Annotated[int, option("n", "Runs of each way, in turns.", min=1)] = 3,
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
    """What the gRPC service costs, compared with LLM.

    Measured are throughput and time to the first token, through the service and through LLM in this process.
    """
    from headwise.runtime.bench import serve as measure

    settings = engine_settings(tp, dtype, device, executor, max_model_len, kv_memory, cpus_per_rank, address)
    measure.run(
        model, measure.Load(batch, tokens, prompt_tokens, requests, pairs), settings, as_json=as_json, plot=plot
    )


@bench.command()
def handoff(
    model: Model,
    tp: Tp = 1,
    prompt_tokens: Annotated[int, option("n", "Tokens of each prompt that is handed over.", min=1)] = 1024,
    pairs: Annotated[int, option("n", "Readings of each case, in turns; reported: the median.", min=1)] = 5,
    streams: Annotated[int, option("n", "Streams that generate while transfers run.", min=1, max=128)] = 4,
    window: Annotated[float, option("seconds", "For which those are watched.", min=0.01)] = 3.0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    executor: Executor = "ray",
    max_model_len: MaxModelLen = 2048,
    kv_memory: KvMemory = None,
    cpus_per_rank: CpusPerRank = None,
    address: Address = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """What it costs to have prompts computed by another engine.

    Measured are the bytes on their way, the time to the first token against computing a prompt here, and what streams
    lose meanwhile. Either engine has half of the cores.
    """
    from headwise.runtime.bench import handoff as measure

    settings = engine_settings(
        tp, dtype, device, executor, max_model_len, kv_memory, cpus_per_rank, address, None, max_num_batched_tokens
    )
    load = measure.Load(prompt_tokens, pairs, streams, window)
    measure.run(model, load, settings, as_json=as_json, plot=plot)


@bench.command()
def interference(
    model: Model,
    tp: Tp = 1,
    streams: Annotated[int, option("n", "Streams that generate all the while.", min=1, max=128)] = 4,
    rate: Annotated[float, option("n", "Long prompts a second, on average.", min=1e-3)] = 0.1,
    requests: Annotated[int, option("n", "Long prompts to send.", min=1, max=4096)] = 8,
    prompt_tokens: Annotated[int, option("n", "Tokens of each long prompt.", min=32)] = 2048,
    tokens: Annotated[int, option("n", "Tokens to generate for each long prompt.", min=1)] = 16,
    seed: Annotated[int, option("n", "The same seed gives the same times of arrival.", min=0)] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    executor: Executor = "ray",
    max_model_len: MaxModelLen = None,
    kv_memory: KvMemory = None,
    cpus_per_rank: CpusPerRank = None,
    address: Address = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """What streams feel of others' long prompts.

    Three ways of using the same cores: a prefill and a decode engine, each on its half of the cores (as ranks on Ray);
    one engine that computes prompts in small parts beside streams; and one that computes them in large parts.
    """
    from headwise.runtime.bench import interference as measure

    settings = engine_settings(
        tp, dtype, device, executor, max_model_len, kv_memory, cpus_per_rank, address, None, max_num_batched_tokens
    )
    load = measure.Load(streams, rate, requests, prompt_tokens, tokens, seed)
    measure.run(model, load, settings, as_json=as_json, plot=plot)


@bench.command()
def recovery(
    model: Model,
    tp: Tp = 2,
    streams: Annotated[int, option("n", "Streams that generate all the while.", min=1, max=128)] = 16,
    tokens: Annotated[int, option("n", "Most tokens of a stream, which is then asked for again.", min=8)] = 96,
    kills: Annotated[int, option("n", "How often a rank is killed, in each case.", min=1)] = 20,
    seed: Annotated[int, option("n", "The same seed gives the same moments.", min=0)] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_model_len: MaxModelLen = None,
    kv_memory: KvMemory = None,
    cpus_per_rank: CpusPerRank = None,
    address: Address = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    as_json: AsJson = False,
) -> None:
    """What streams feel of a rank that is killed.

    Each stream has to go on with the tokens that it has without kills. Once without and once with a warm spare.
    """
    from headwise.runtime.bench import recovery as measure

    settings = engine_settings(
        tp, dtype, device, "ray", max_model_len, kv_memory, cpus_per_rank, address, None, max_num_batched_tokens
    )
    measure.run(model, measure.Load(streams, tokens, kills, seed), settings, as_json=as_json)


@bench.command()
def routing(
    model: Model,
    tp: Tp = 1,
    replicas: Annotated[int, option("n", "Replicas.", min=1)] = 2,
    prefixes: Annotated[int, option("n", "Beginnings that prompts share.", min=1)] = 8,
    each: Annotated[int, option("n", "Requests with each beginning.", min=2)] = 8,
    prefix_tokens: Annotated[int, option("n", "Tokens of each beginning.", min=16)] = 512,
    own_tokens: Annotated[int, option("n", "Tokens that follow it, which no two prompts share.", min=1)] = 64,
    tokens: Annotated[int, option("n", "Tokens to generate for each prompt.", min=1)] = 16,
    at_once: Annotated[int, option("n", "Requests under way at the same time.", min=1)] = 8,
    repeats: Annotated[int, option("n", "Runs of each way, in turns; reported: the median.", min=1)] = 3,
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_model_len: MaxModelLen = 2048,
    kv_memory: KvMemory = None,
    cpus_per_rank: CpusPerRank = None,
    address: Address = None,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """What replicas find in their caches, by the way of routing.

    And how evenly they work. Three ways see the same requests: the router of headwise serve --replicas; in turns; and
    the least loaded. Compared with what one replica with room for all would find.
    """
    from headwise.runtime.bench import routing as measure

    settings = engine_settings(tp, dtype, device, "ray", max_model_len, kv_memory, cpus_per_rank, address)
    load = measure.Load(replicas, prefixes, each, prefix_tokens, own_tokens, tokens, at_once, repeats)
    measure.run(model, load, settings, as_json=as_json, plot=plot)


@bench.command()
def policies(
    text: Annotated[Path, option("file", "A long text in UTF-8, such as tests/data/alice.txt of the source.")],
    model: Annotated[str, option("path", MODEL_HELP, "--model", "-m")] = "smollm2",
    policies: Annotated[
        str,
        option("policies", "As --kv-policy of generate, and recompute:L, slow; separated by spaces."),
    ] = "dense window:1024 sinks:4,1020 recompute:1024",
    streaming_heads: StreamingHeads = None,
    tokens: Annotated[int, option("n", "Tokens of the text to read.", min=2)] = 16384,
    stretches: Annotated[int, option("n", "Parts of the text, each with a perplexity of its own.", min=1)] = 16,
    samples: Annotated[int, option("n", "Positions of each part at which recompute:L is read.", min=1)] = 8,
    kv_dtypes: Annotated[
        str, option("types", "As --kv-dtype of generate, to compare with float32; separated by commas; or none.")
    ] = ",".join(KV_DTYPES),
    prompts: Annotated[int, option("n", "Pieces of the text to continue by 64 tokens with each.", min=0)] = 32,
    device: Device = "auto",
    attention: Attention = None,
    threads: Threads = None,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """What KV policies and dtypes cost and save.

    A text is read under each policy: perplexity, memory and the time of a token against the position in it. And in each
    form of keys and values: how far what the model expects next is from the same with float32. Bytes a token, also of
    models with more KV heads or one.
    """
    from headwise.runtime.bench import policies as measure
    from headwise.runtime.config import engine_config
    from headwise.runtime.kv_settings import heads_notes, model_policy
    from headwise.runtime.models import resolve
    from headwise.runtime.prepare import usable_device
    from headwise.workers.model.model_config import load_model_config

    config = engine_config(model=model, device=device, attention=attention, streaming_heads=streaming_heads)
    where = usable_device(config.device)
    named = policies.split()
    if streaming_heads is not None:
        path = resolve(model)
        named.append(model_policy(config, load_model_config(path)).text)
        for note in heads_notes(config, path):
            print(f"headwise: {note}", file=sys.stderr)
    dtypes = () if kv_dtypes == "none" else tuple(dict.fromkeys(kv_dtypes.split(",")))
    load = measure.Load(tuple(dict.fromkeys(named)), tokens, stretches, samples, dtypes, prompts)
    measure.run(model, text, load, where, attention, threads, as_json=as_json, plot=plot)


def _sizes(flag: str, text: str) -> list[int]:
    """Numbers separated by commas, each once.

    Raises:
        InvalidValueError: one is not a whole number of at least 1.
    """
    for size in text.split(","):
        if not size.strip().isdigit() or int(size) < 1:
            raise InvalidValueError(flag, size, "must be a whole number of at least 1")
    return list(dict.fromkeys(int(size) for size in text.split(",")))
