"""``headwise generate``: completes a prompt, or a file of prompts, with a model loaded here, or by asking a server."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwise.runtime.cli.batch import answer_by_server, answer_here, run_batch
from headwise.runtime.cli.form import given_form, structured_outputs, told_in_flags
from headwise.runtime.cli.options import (
    ENGINE_PARAMETERS,
    MODEL_HELP,
    Address,
    AsJson,
    Attention,
    CpusPerRank,
    Device,
    Dtype,
    Executor,
    FlagError,
    KvDtype,
    KvMemory,
    KvPolicy,
    MaxModelLen,
    MaxNumBatchedTokens,
    MaxTokens,
    Seed,
    StreamingHeads,
    Temperature,
    TopK,
    TopP,
    Tp,
    engine_settings,
    option,
    refuse_flags,
)
from headwise.runtime.cli.printing import print_json, raise_if_failed, take, write
from headwise.runtime.cli.server import CONNECTION_PARAMETERS, TlsCa, TlsCert, TlsKey, Token, check_token, connected

if TYPE_CHECKING:
    from headwise.runtime.batch.run import Batch
    from headwise.runtime.client import Client
    from headwise.runtime.output import RequestMetrics
    from headwise.runtime.sampling_params import SamplingParams

Stop = Annotated[list[str] | None, option("text", "Stop at this text; may be given several times.")]
JsonSchema = Annotated[Path | None, option("file", "The output is JSON of the schema in this file.")]
Regex = Annotated[str | None, option("regex", "The output matches this regex.")]
Choice = Annotated[list[str] | None, option("text", "The output is this text, or that of another --choice.")]


def generate(
    ctx: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to complete; - reads it from standard input.", show_default=False)
    ] = None,
    source: Annotated[
        Path | None, option("file", "A batch: a prompt a line, as JSON; see docs/cluster.md.", "--input")
    ] = None,
    target: Annotated[
        Path | None,
        option("file", "Where the answers to --input go; what is there is not computed again.", "--output"),
    ] = None,
    model: Annotated[str | None, option("path", MODEL_HELP, "--model", "-m")] = None,
    server: Annotated[str | None, option("host:port", "A running server to ask instead of loading a model.")] = None,
    token: Token = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    timeout: Annotated[
        float | None, option("seconds", "Time that the server gets to answer; default: no limit.", min=0)
    ] = None,
    tp: Tp = 1,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a chat message, for the model's template.")
    ] = False,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    stop: Stop = None,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    choice: Choice = None,
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
    """Complete a prompt, or a file of prompts.

    The text streams to stdout, everything else goes to stderr. The model is loaded here (--model), or a running server
    is asked (--server). By default the most likely token is taken each time, and at most 128 are.

    With --chat, the prompt is answered. With --input, the flags are for lines that do not say otherwise, and the exit
    code is 1 if some lines could not be answered; the output says why.
    """
    from headwise.runtime import SamplingParams

    if server is not None:
        refuse_flags(ctx, ENGINE_PARAMETERS, "is for a model loaded here", "leave it out with --server")
    else:
        refuse_flags(
            ctx,
            (*CONNECTION_PARAMETERS, "timeout"),
            "is for a server",
            "leave it out, or give --server",
        )
    form = given_form(json_schema, regex, choice)
    with told_in_flags(form):
        structured = structured_outputs(form)
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop=stop,
        seed=seed,
        structured_outputs=structured,
    )
    if server is None and model is None:
        raise FlagError("--model", "is missing", "give a model, or --server")
    _check_batch(prompt, source, target, chat)
    files = {"ca": tls_ca, "cert": tls_cert, "key": tls_key}
    if server is not None:
        check_token(server, token, tls_ca, tls_cert, tls_key)
    settings = engine_settings(
        *(tp, dtype, device, executor, max_model_len, kv_memory, cpus_per_rank, address),
        max_num_batched_tokens=max_num_batched_tokens,
        attention=attention,
        kv_policy=kv_policy,
        kv_dtype=kv_dtype,
        streaming_heads=streaming_heads,
    )
    if source is not None and target is not None:

        def answer(batch: Batch) -> None:
            if server is not None:
                answer_by_server(batch, server, token=token, timeout=timeout, **files)
            else:
                assert model is not None
                answer_here(batch, model, settings)

        run_batch(source, target, params, answer, as_json)
    text = sys.stdin.read() if prompt == "-" else prompt
    question: Any = [{"role": "user", "content": text}] if chat else text
    if server is not None:
        with connected(server, token, tls_ca, tls_cert, tls_key, timeout) as client:
            _ask_server(client, question, params, as_json)
        return
    assert model is not None
    with told_in_flags(form):
        _generate_here(model, settings, question, params, as_json)


def _check_batch(prompt: str | None, source: Path | None, target: Path | None, chat: bool) -> None:
    """
    Raises:
        FlagError: neither a prompt nor a batch is given, or what does not go together.
    """
    if (source is None) != (target is None):
        given, other = ("--input", "--output") if target is None else ("--output", "--input")
        raise FlagError(given, f"goes with {other}", "give both")
    if source is None and prompt is None:
        raise FlagError("PROMPT", "is missing", "give one, or --input and --output")
    if source is not None and prompt is not None:
        raise FlagError("--input", "does not go with a prompt", "leave one of them out")
    if source is not None and chat:
        raise FlagError("--chat", "is for one prompt", 'write {"messages": …} in the lines of --input')


def _generate_here(model: str, settings: dict[str, Any], question: Any, params: SamplingParams, as_json: bool) -> None:
    from headwise.runtime import LLM

    with LLM(model, **settings) as llm:
        if as_json:
            run = llm.generate if isinstance(question, str) else llm.chat
            [output] = run(question, params, use_tqdm=False)
            print_json(asdict(output) | {"metrics": _metrics(output.metrics)})
            raise_if_failed(output.outputs[0].finish_reason, output.error)
        else:
            _, last = take(llm.stream(question, params), show=True)
            raise_if_failed(last.finish_reason, last.error)


def _metrics(metrics: RequestMetrics) -> dict[str, float]:
    """Durations, by the names that a server's answer has; a clock's readings mean nothing outside this process."""
    return {
        "queued_s": metrics.queued,
        "time_to_first_token_s": metrics.time_to_first_token,
        "total_s": metrics.total,
        "num_preemptions": metrics.num_preemptions,
        "num_cached_tokens": metrics.num_cached_tokens,
        "num_restored_tokens": metrics.num_restored_tokens,
    }


def _ask_server(client: Client, question: Any, params: SamplingParams, as_json: bool) -> None:
    from headwise.runtime.client import Completion

    for item in client.stream(question, params, whole=as_json):
        if as_json and isinstance(item, Completion):
            print_json(asdict(item))
        elif not as_json:
            write("\n" if isinstance(item, Completion) else item.text or "")
        if isinstance(item, Completion):
            raise_if_failed(item.samples[0].finish_reason, item.samples[0].error)
