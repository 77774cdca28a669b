"""The command line: ``headwise generate | chat | serve | warmup | bench``.

Exit codes: 0 done; 1 the run failed; 2 bad input, flag or model; 3 a shard died; 130 interrupted.
"""

from __future__ import annotations

import ipaddress
import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from headwise.runtime.cli.bench import bench
from headwise.runtime.cli.options import (
    ENGINE_PARAMETERS,
    MODEL_HELP,
    Address,
    AsJson,
    CacheQuota,
    CpusPerRank,
    Device,
    DiskKvLimit,
    DiskKvPath,
    Dtype,
    Executor,
    FlagError,
    HostKvMemory,
    KvMemory,
    MaxModelLen,
    Model,
    PrefixCaching,
    Tp,
    engine_settings,
    refuse_flags,
)
from headwise.workers.errors import CheckpointError, HeadwiseError, InvalidValueError, UnsupportedModelError

if TYPE_CHECKING:
    from headwise.runtime.llm import OutputDelta
    from headwise.runtime.sampling_params import SamplingParams
    from headwise.runtime.structured_outputs import StructuredOutputsParams

app = typer.Typer(
    name="headwise",
    help="Llama inference on tensor-parallel Ray shards.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(bench, name="bench")

Seed = Annotated[int | None, typer.Option(help="Same seed, same text.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option(help="0 always takes the most likely token.")]
TopP = Annotated[float, typer.Option(help="Sample from the most likely tokens that together reach this probability.")]
TopK = Annotated[int, typer.Option(help="Sample from so many of the most likely tokens; 0 is all.")]
Stop = Annotated[list[str] | None, typer.Option(help="Stop at this text; may be given several times.")]
JsonSchema = Annotated[Path | None, typer.Option(help="The output is JSON of the schema in this file.")]
Regex = Annotated[str | None, typer.Option(help="The output matches this.")]
Choice = Annotated[list[str] | None, typer.Option(help="The output is one of these; may be given several times.")]


def main() -> None:
    """The entry point: runs a command and turns its errors into a line on stderr and an exit code."""
    with _exit_codes():
        app()


@app.command()
def generate(
    ctx: typer.Context,
    prompt: Annotated[str, typer.Argument(help="The text to complete; - reads it from standard input.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help=MODEL_HELP)] = None,
    server: Annotated[str | None, typer.Option(help="host:port of a running server to ask instead.")] = None,
    token: Annotated[str | None, typer.Option(envvar="HEADWISE_TOKEN", help="The server's token for you.")] = None,
    tls_ca: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Use TLS, with servers this certificate signed.")
    ] = None,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds that the server gets to answer.")] = None,
    tp: Tp = 1,
    chat: Annotated[bool, typer.Option("--chat", help="Ask it as a chat message, by the model's template.")] = False,
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
    as_json: AsJson = False,
) -> None:
    """Complete a prompt: the text streams to stdout, everything else goes to stderr."""
    from headwise.runtime import SamplingParams

    if server is not None:
        refuse_flags(ctx, ENGINE_PARAMETERS, "is for a model loaded here", "leave it out with --server")
    else:
        refuse_flags(ctx, ("token", "tls_ca", "timeout"), "is for a server", "leave it out, or give --server")
    form = _form(json_schema, regex, choice)
    with _told_in_flags(form):
        structured = _structured_outputs(form)
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
    text = sys.stdin.read() if prompt == "-" else prompt
    question: Any = [{"role": "user", "content": text}] if chat else text
    if server is not None:
        _ask_server(server, token, tls_ca, timeout, question, params, as_json)
        return
    assert model is not None
    settings = engine_settings(tp, dtype, device, executor, max_model_len, kv_memory, cpus_per_rank, address)
    with _told_in_flags(form):
        _generate_here(model, settings, question, params, as_json)


@app.command()
def chat(
    model: Model,
    tp: Tp = 1,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
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
    as_json: AsJson = False,
) -> None:
    """Talk with a model: one line a message, an empty line or end of input leaves."""
    from headwise.runtime import LLM, SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    messages = [{"role": "system", "content": system}] if system else []
    settings = engine_settings(tp, dtype, device, executor, max_model_len, kv_memory, cpus_per_rank, address)
    with LLM(model, **settings) as llm:
        while line := _ask():
            messages.append({"role": "user", "content": line})
            answer, last = _take(llm.stream(messages, params), show=not as_json)
            messages.append({"role": "assistant", "content": answer})
            if as_json:
                _print_json(messages[-1])
            _check(last.finish_reason, last.error)


@app.command()
def serve(
    model: Model,
    tp: Tp = 1,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 50051,
    metrics_port: Annotated[int | None, typer.Option(min=0, max=65535, help="Serve Prometheus metrics there.")] = None,
    metrics_host: Annotated[str, typer.Option(help="The address for it.")] = "127.0.0.1",
    openai_port: Annotated[int | None, typer.Option(min=0, max=65535, help="Serve OpenAI's API there.")] = None,
    name: Annotated[str | None, typer.Option(help="The model's name for clients; default: --model.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="The server's certificate, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="Let in only clients that this certificate signed.")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help='Lines of "TENANT TOKEN \\[admin]".')] = None,
    insecure: Annotated[bool, typer.Option(help="Serve anybody who reaches a host that is not loopback.")] = False,
    max_queued_requests: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = 1024,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests that are computed at once.")] = 128,
    drain_timeout: Annotated[float, typer.Option(min=0, help="Seconds that requests get to end on SIGTERM.")] = 30.0,
    stall_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds a client may leave a stream unread.")] = 30.0,
    max_request_time: Annotated[
        float, typer.Option(min=0.1, help="Seconds a request may take, queued or not.")
    ] = 3600.0,
    step_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a step may take in good health.")] = 8.0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    executor: Executor = "ray",
    max_model_len: MaxModelLen = None,
    kv_memory: KvMemory = None,
    prefix_caching: PrefixCaching = True,
    cache_quota: CacheQuota = None,
    host_kv_memory: HostKvMemory = None,
    disk_kv_path: DiskKvPath = None,
    disk_kv_limit: DiskKvLimit = None,
    cpus_per_rank: CpusPerRank = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Serve a model by gRPC until SIGTERM: then finish what runs. Prints one line when it is ready."""
    from headwise.runtime.config import engine_config
    from headwise.runtime.server.serve import ServeOptions
    from headwise.runtime.server.serve import serve as run

    settings = engine_settings(tp, dtype, device, executor, max_model_len, kv_memory, cpus_per_rank, address)
    tiers = {
        "cache_quota": cache_quota,
        "host_kv_memory": host_kv_memory,
        "disk_kv_path": disk_kv_path,
        "disk_kv_limit": disk_kv_limit,
    }
    settings |= {key: value for key, value in tiers.items() if value is not None}
    config = engine_config(model=model, enable_prefix_caching=prefix_caching, max_num_seqs=max_num_seqs, **settings)
    options = ServeOptions(
        name=name or model,
        host=host,
        port=port,
        metrics_port=metrics_port,
        metrics_host=metrics_host,
        openai_port=openai_port,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_client_ca=tls_client_ca,
        token_file=token_file,
        insecure=insecure,
        max_queued_requests=max_queued_requests,
        drain_timeout_s=drain_timeout,
        stall_timeout_s=stall_timeout,
        max_request_s=max_request_time,
        step_timeout_s=step_timeout,
        as_json=as_json,
    )
    sys.exit(run(config, options))


@app.command()
def warmup(as_json: AsJson = False) -> None:
    """Compile the CPU kernels of this machine now, so that no start waits for it."""
    from headwise.runtime.warmup import compile_kernels
    from headwise.workers.jit.kernel_cache import kernel_folder

    started = time.perf_counter()
    compiled, folder = compile_kernels(), str(kernel_folder())
    seconds = time.perf_counter() - started
    if as_json:
        _print_json({"folder": folder, "compiled": compiled, "seconds": round(seconds, 3)})
    else:
        print(f"{folder}: {f'compiled in {seconds:.1f} s' if compiled else 'ready'}")


Form = tuple[str, Path | str | list[str]]
"""What the output has to be: the flag, and what was given with it."""


def _form(json_schema: Path | None, regex: str | None, choice: list[str] | None) -> Form | None:
    """
    Raises:
        FlagError: several are given.
    """
    forms = {"--json-schema": json_schema, "--regex": regex, "--choice": choice or None}
    given: list[Form] = [(flag, value) for flag, value in forms.items() if value is not None]
    if len(given) > 1:
        raise FlagError(
            " and ".join(flag for flag, _ in given), "do not go together", f"give one of {', '.join(forms)}"
        )
    return given[0] if given else None


def _structured_outputs(form: Form | None) -> StructuredOutputsParams | None:
    from headwise.runtime.structured_outputs import MAX_GRAMMAR_BYTES, StructuredOutputsParams

    match form:
        case ("--json-schema", Path() as path):
            try:
                schema = path.read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise InvalidValueError("--json-schema", str(path), f"cannot be read: {error}") from None
            if (size := len(schema.encode())) > MAX_GRAMMAR_BYTES:
                raise InvalidValueError("--json-schema", str(path), f"has {size} bytes, more than {MAX_GRAMMAR_BYTES}")
            return StructuredOutputsParams(json=schema)
        case ("--regex", str() as regex):
            return StructuredOutputsParams(regex=regex)
        case (_, list() as choice):
            return StructuredOutputsParams(choice=choice)
    return None


@contextmanager
def _told_in_flags(form: Form | None) -> Iterator[None]:
    """Has errors name the flag and the file of the output's form, where they name the API's fields."""
    try:
        yield
    except InvalidValueError as error:
        if form is None or error.field.partition(".")[0] != "structured_outputs":
            raise
        flag, given = form
        # Of choices, it is one, or how many they are, that is wrong.
        value = error.value if error.field == "structured_outputs.choice" else given
        raise InvalidValueError(
            flag, str(value) if isinstance(value, Path) else value, error.limit, error.fix
        ) from None


def _generate_here(model: str, settings: dict[str, Any], question: Any, params: SamplingParams, as_json: bool) -> None:
    from headwise.runtime import LLM

    with LLM(model, **settings) as llm:
        if as_json:
            run = llm.generate if isinstance(question, str) else llm.chat
            [output] = run(question, params, use_tqdm=False)
            _print_json(asdict(output))
            _check(output.outputs[0].finish_reason, output.error)
        else:
            _, last = _take(llm.stream(question, params), show=True)
            _check(last.finish_reason, last.error)


def _take(deltas: Iterable[OutputDelta], show: bool) -> tuple[str, OutputDelta]:
    """The text of a stream of one sample, shown as it comes, and its last increment."""
    text = ""
    for delta in deltas:
        text += delta.text or ""
        if show:
            _write(delta.text or "")
    if show:
        _write("\n")
    return text, delta


def _check(finish_reason: str | None, error: str | None) -> None:
    """
    Raises:
        HeadwiseError: the request failed.
    """
    if finish_reason == "error":
        raise HeadwiseError(error or "the request failed")


def _ask_server(
    server: str,
    token: str | None,
    ca: Path | None,
    timeout: float | None,
    question: Any,
    params: SamplingParams,
    as_json: bool,
) -> None:
    from grpc import StatusCode

    from headwise.runtime.client import Client, Completion, ServerError

    if token and ca is None and not _is_loopback(server):
        limit = f"would go in clear text to {server}, which is not loopback"
        raise InvalidValueError("--token", "...", limit, "use TLS: give --tls-ca")
    try:
        with Client(server, token=token, ca=ca, timeout=timeout) as client:
            for item in client.stream(question, params, whole=as_json):
                if as_json and isinstance(item, Completion):
                    _print_json(asdict(item))
                elif not as_json:
                    _write("\n" if isinstance(item, Completion) else item.text or "")
                if isinstance(item, Completion):
                    _check(item.samples[0].finish_reason, item.samples[0].error)
    except ServerError as error:
        if error.code is not StatusCode.INVALID_ARGUMENT:
            raise
        print(f"headwise: {error}", file=sys.stderr)
        sys.exit(2)


def _is_loopback(address: str) -> bool:
    try:
        host = urlsplit(f"//{address}").hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _ask() -> str:
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, default=str))


@contextmanager
def _exit_codes() -> Iterator[None]:
    from headwise.cluster.group import ShardGroupDied

    codes: list[tuple[type[BaseException] | tuple[type[BaseException], ...], int]] = [
        ((FlagError, InvalidValueError, UnsupportedModelError, CheckpointError), 2),
        (ShardGroupDied, 3),
        (HeadwiseError, 1),
    ]
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except HeadwiseError as error:
        print(f"headwise: {error}", file=sys.stderr)
        sys.exit(next(code for kinds, code in codes if isinstance(error, kinds)))
