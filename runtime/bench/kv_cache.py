"""``headwise bench kv-cache``: what a KV cache saves, measured by generating the same tokens with one and without."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.table import Table
from tqdm import tqdm

from headwise.runtime.bench import figures, report
from headwise.runtime.bench.workload import greedy, prompts
from headwise.runtime.llm import LLM
from headwise.runtime.models import resolve
from headwise.workers.errors import HeadwiseError
from headwise.workers.model.model_config import load_model_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TINY = "tiny"
PROMPT_TOKENS = 8


class OutputsDifferError(HeadwiseError):
    """The tokens computed with and without a KV cache are not the same."""


def run(model: str, tokens: int, settings: dict[str, Any], *, as_json: bool, plot: Path | None) -> None:
    """Generates ``tokens`` tokens twice, prints both costs, and insists on the same tokens.

    Args:
        model: any, or ``tiny``: a small random Llama that is made for this and removed afterwards.

    Raises:
        OutputsDifferError: they are not.
    """
    figures.check_plot(plot)
    # A prefix cache would find what is to be computed again.
    settings = {"max_model_len": PROMPT_TOKENS + tokens, "enable_prefix_caching": False} | settings
    with ExitStack() as stack:
        path = stack.enter_context(model_directory(model))
        [prompt] = prompts(1, PROMPT_TOKENS, load_model_config(path).vocab_size)
        llm = stack.enter_context(LLM(path, **settings))
        llm.generate([prompt], greedy(2), use_tqdm=False)  # warms up
        with tqdm(total=2 * tokens, desc="measuring", unit="token", file=sys.stderr) as bar:
            cached_tokens, cached = with_cache(llm, prompt, tokens, bar)
            plain = without_cache(llm, prompt, cached_tokens, bar)
    results = costs(cached, plain)
    report.emit(
        "kv-cache",
        model,
        settings | {"tokens": tokens},
        results,
        [_table(model, results)],
        as_json=as_json,
        identical_outputs=True,
    )
    if plot is not None:
        _draw(model, cached, plain).savefig(plot)


@contextmanager
def model_directory(model: str) -> Iterator[Path]:
    """Where a model is; ``tiny`` is made now, and removed when this is left."""
    if model != TINY:
        yield resolve(model)
        return
    with tempfile.TemporaryDirectory() as directory:
        yield write_tiny(Path(directory))


def write_tiny(directory: Path) -> Path:
    """Writes a random Llama of 3.6 million parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]  # of saving, which is done in no time
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        vocab_size=512,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        initializer_range=0.2,  # wide enough that the best tokens are not nearly ties
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def with_cache(llm: LLM, prompt: list[int], tokens: int, bar: tqdm[Any]) -> tuple[list[int], list[float]]:
    """One request: its tokens, and the seconds each took."""
    ids: list[int] = []
    seconds: list[float] = []
    last = time.perf_counter()
    for delta in llm.stream(prompt, greedy(tokens)):
        now = time.perf_counter()
        ids += delta.token_ids
        seconds.append(now - last)
        last = now
        bar.update()
    return ids, seconds


def without_cache(llm: LLM, prompt: list[int], expected: Sequence[int], bar: tqdm[Any]) -> list[float]:
    """A new request for every token, which computes the prompt and all tokens so far again: the seconds each took.

    Raises:
        OutputsDifferError: a token is not the expected one.
    """
    ids = list(prompt)
    seconds: list[float] = []
    for position, token in enumerate(expected):
        started = time.perf_counter()
        [output] = llm.generate([ids], greedy(1), use_tqdm=False)
        seconds.append(time.perf_counter() - started)
        [again] = output.outputs[0].token_ids
        if again != token:
            raise OutputsDifferError(
                f"token {position} is {token} with a KV cache and {again} without: an error in one of the two"
            )
        ids.append(again)
        bar.update()
    return seconds


def costs(cached: Sequence[float], plain: Sequence[float]) -> list[dict[str, Any]]:
    """Both costs at n = 1, 2, 4, … and the last; the milliseconds a token are the median over the second half."""
    points = [1 << power for power in range(len(cached).bit_length())]
    points += [len(cached)] * (points[-1] != len(cached))
    return [
        {
            "n": n,
            "cached_token_ms": round(median(cached[n // 2 : n]) * 1e3, 3),
            "uncached_token_ms": round(median(plain[n // 2 : n]) * 1e3, 3),
            "cached_total_s": round(sum(cached[:n]), 4),
            "uncached_total_s": round(sum(plain[:n]), 4),
            "times": round(sum(plain[:n]) / sum(cached[:n]), 2),
        }
        for n in points
    ]


def _table(model: str, results: Sequence[dict[str, Any]]) -> Table:
    rows = [
        [
            str(row["n"]),
            f"{row['cached_token_ms']:.2f}",
            f"{row['uncached_token_ms']:.2f}",
            f"{row['cached_total_s']:.2f}",
            f"{row['uncached_total_s']:.2f}",
            f"{row['times']:.1f}",
        ]
        for row in results
    ]
    last = results[-1]
    explained = (
        "Without a KV cache every new token computes all tokens before it again, so the n-th costs about n times the "
        "work; with one, their keys and values are kept, and it costs the work of one token and a look at what is "
        f"kept. The {last['n']} tokens are the same either way, and took {last['times']:.1f} times as long without."
    )
    columns = ("n", "ms, with", "ms, without", "s, with", "s, without", "times")
    title = f"KV cache, {model}: ms for the n-th token, s for all n"
    return report.table(title, columns, rows, explained)


def _draw(model: str, cached: Sequence[float], plain: Sequence[float]) -> Figure:
    subtitle = f"{model}, {PROMPT_TOKENS} prompt tokens, the same {len(cached)} tokens either way"
    figure, (each, total) = figures.new_figure("What a KV cache saves", subtitle, 2)
    n = range(1, len(cached) + 1)
    for seconds, label, color in (
        (plain, "without", figures.COLORS[1]),
        (cached, "with a KV cache", figures.COLORS[0]),
    ):
        each.plot(n, [s * 1e3 for s in seconds], label=label, color=color, linewidth=1)
        total.plot(n, list(accumulate(seconds)), label=label, color=color)
    each.set(title="The n-th token", xlabel="n, tokens generated", ylabel="milliseconds")
    total.set(title="All n tokens", xlabel="n, tokens generated", ylabel="seconds", ylim=(0, None))
    # A token that waited for another program may be off the scale: the curve is what the picture is for.
    each.set_ylim(0, 1.5e3 * sorted(plain)[int(0.98 * len(plain))])
    each.legend()
    total.legend()
    return figure
