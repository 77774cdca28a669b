"""The command line: ``headwise generate | chat | serve | warmup | bench``.

Exit codes: 0 done; 1 the run failed; 2 bad input, flag or model; 3 a shard died; 130 interrupted.
"""

from __future__ import annotations

import ipaddress
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from headwise.runtime.bench.cli import bench
from headwise.runtime.options import (
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
    HostKvMemory,
    KvMemory,
    MaxModelLen,
    Model,
    PrefixCaching,
    Tp,
    engine_settings,
)
from headwise.workers.errors import CheckpointError, HeadwiseError, InvalidValueError, UnsupportedModelError

if TYPE_CHECKING:
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

    text = sys.stdin.read() if prompt == "-" else prompt
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop=stop,
        seed=seed,
        structured_outputs=_structured_outputs(json_schema, regex, choice),
    )
    if server is not None:
        asked = [{"role": "user", "content": text}] if chat else text
        _ask_server(server, token, tls_ca, timeout, asked, params, as_json)
        return
    if model is None:
        raise InvalidValueError("--model", None, "is needed where no --server is given")
    if timeout is not None:
        raise InvalidValueError("--timeout", timeout, "is only for --server")
    from headwise.runtime import LLM

    settings = engine_settings(tp, dtype, device, executor, max_model_len, kv_memory, cpus_per_rank, address)
    with LLM(model, **settings) as llm:
        question: Any = [{"role": "user", "content": text}] if chat else text
        if as_json:
            run = llm.chat if chat else llm.generate
            [output] = run(question, params, use_tqdm=False)
            _print_json(asdict(output))
            return
        for delta in llm.stream(question, params):
            _write(delta.text or "")
        _write("\n")


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
            answer = ""
            for delta in llm.stream(messages, params):
                answer += delta.text or ""
                if not as_json:
                    _write(delta.text or "")
            messages.append({"role": "assistant", "content": answer})
            if as_json:
                _print_json(messages[-1])
            else:
                _write("\n")


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
    token_file: Annotated[Path | None, typer.Option(help='Lines of "TENANT TOKEN [admin]".')] = None,
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
    from headwise.workers.kernel_cache import kernel_folder

    started = time.perf_counter()
    compiled, folder = compile_kernels(), str(kernel_folder())
    seconds = time.perf_counter() - started
    if as_json:
        _print_json({"folder": folder, "compiled": compiled, "seconds": round(seconds, 3)})
    else:
        print(f"{folder}: {f'compiled in {seconds:.1f} s' if compiled else 'ready'}")


def _structured_outputs(
    json_schema: Path | None, regex: str | None, choice: list[str] | None
) -> StructuredOutputsParams | None:
    from headwise.runtime.structured_outputs import StructuredOutputsParams

    if json_schema is None and regex is None and not choice:
        return None
    try:
        schema = json_schema.read_text(encoding="utf-8") if json_schema is not None else None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidValueError("--json-schema", str(json_schema), f"cannot be read: {error}") from None
    return StructuredOutputsParams(json=schema, regex=regex, choice=choice or None)


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
                if isinstance(item, Completion) and item.samples[0].finish_reason == "error":
                    raise HeadwiseError(item.samples[0].error or "the request failed")
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
        ((InvalidValueError, UnsupportedModelError, CheckpointError), 2),
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


if __name__ == "__main__":
    main()
