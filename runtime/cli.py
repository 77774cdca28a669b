"""The command line: ``headwise generate | chat | warmup | bench``.

Exit codes: 0 done; 1 the run failed; 2 bad input, flag or model; 3 a shard died; 130 interrupted.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

import typer

from headwise.runtime.bench.cli import bench
from headwise.runtime.options import (
    Address,
    AsJson,
    CpusPerRank,
    Device,
    Dtype,
    Executor,
    KvMemory,
    MaxModelLen,
    Model,
    Tp,
    engine_settings,
)
from headwise.workers.errors import CheckpointError, HeadwiseError, InvalidValueError, UnsupportedModelError

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


def main() -> None:
    """The entry point: runs a command and turns its errors into a line on stderr and an exit code."""
    with _exit_codes():
        app()


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to complete; - reads it from standard input.")],
    model: Model,
    tp: Tp = 1,
    chat: Annotated[bool, typer.Option("--chat", help="Ask it as a chat message, by the model's template.")] = False,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    stop: Stop = None,
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
    from headwise.runtime import LLM, SamplingParams

    text = sys.stdin.read() if prompt == "-" else prompt
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, stop=stop, seed=seed
    )
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
