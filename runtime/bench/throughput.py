"""``headwise bench throughput``: decode throughput at several batch sizes, on prompts any engine can be given."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from tqdm import tqdm

from headwise.runtime.bench import figures, report
from headwise.runtime.bench.bounds import Case, StepBound, bounds_of_run, chunks
from headwise.runtime.bench.workload import greedy, prompts
from headwise.runtime.config import EngineConfig, engine_config
from headwise.runtime.llm import LLM
from headwise.runtime.models import resolve
from headwise.workers.model.model_config import load_model_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run(
    model: str,
    batches: Sequence[int],
    tokens: int,
    prompt_tokens: int,
    repeats: int,
    settings: dict[str, Any],
    *,
    bound: bool,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Measures and prints a result a batch size.

    ``tok_s`` counts generated tokens over the best call, prefill included; ``startup_s`` is the time from nothing to
    a loaded engine. The bound is the time of all products of such a call.
    """
    figures.check_plot(plot)
    settings = settings | {"enable_prefix_caching": False}  # every run of a batch has the same prompts
    engine = engine_config(model=model, **settings)
    config = load_model_config(resolve(model))
    steps = {batch: call_steps(batch, tokens, prompt_tokens, engine) for batch in batches}
    cases = [case for counts in steps.values() for case in counts]
    bounds = bounds_of_run(config, settings, cases) if bound else {}
    started = time.perf_counter()
    with LLM(model, **settings) as llm:
        startup_s = time.perf_counter() - started
        rows = []
        with tqdm(total=len(batches) * repeats, desc="measuring", unit="run", file=sys.stderr) as bar:
            for batch in batches:
                row = _measure(llm, prompts(batch, prompt_tokens, config.vocab_size), tokens, repeats, bar)
                rows.append({"engine": "headwise", "batch": batch, **row, "startup_s": round(startup_s, 1)})
    limits = {batch: batch * tokens / call_bound(counts, bounds) for batch, counts in steps.items() if bounds}
    reached = {str(row["batch"]): round(row["tok_s"] / limits[row["batch"]], 3) for row in rows if limits}
    report.emit(
        "throughput",
        model,
        settings | {"tokens": tokens, "prompt_tokens": prompt_tokens, "repeats": repeats},
        rows,
        [_table(rows, limits)],
        as_json=as_json,
        fraction_of_bound=reached or None,
    )
    if plot is not None:
        _draw(rows, limits, tokens, prompt_tokens).savefig(plot)


def call_steps(batch: int, tokens: int, prompt_tokens: int, engine: EngineConfig) -> dict[Case, int]:
    """The fewest steps a call can take, with how many there are of each."""
    steps: dict[Case, int] = {}
    for case in chunks(batch * prompt_tokens, engine.max_num_batched_tokens, batch):
        steps[case] = steps.get(case, 0) + 1
    if tokens > 1:
        steps[batch, batch] = steps.get((batch, batch), 0) + tokens - 1
    return steps


def call_bound(steps: Mapping[Case, int], bounds: Mapping[Case, StepBound]) -> float:
    """Seconds of all products of these steps."""
    return sum(count * bounds[case].seconds for case, count in steps.items())


def _measure(llm: LLM, batch: list[list[int]], tokens: int, repeats: int, bar: tqdm[Any]) -> dict[str, Any]:
    rates = []
    for _ in range(repeats):
        started = time.perf_counter()
        outputs = llm.generate(batch, greedy(tokens), use_tqdm=False)
        rates.append(len(batch) * tokens / (time.perf_counter() - started))
        bar.update()
    return {
        "tok_s": round(max(rates), 2),
        "median_tok_s": round(statistics.median(rates), 2),
        "first_ids": outputs[0].outputs[0].token_ids[:8],
    }


def _table(rows: Sequence[dict[str, Any]], limits: Mapping[int, float]) -> Table:
    cells = []
    for row in rows:
        limit = limits.get(row["batch"])
        reached = report.percent(row["tok_s"] / limit if limit else None)
        bound = f"{limit:.1f}" if limit else "-"
        cells.append([str(row["batch"]), f"{row['tok_s']:.1f}", f"{row['median_tok_s']:.1f}", bound, reached])
    title = "throughput in generated tokens a second, prefill included"
    return report.table(title, ("batch", "best", "median", "bound", "best of bound"), cells)


def _draw(rows: Sequence[dict[str, Any]], limits: Mapping[int, float], tokens: int, prompt_tokens: int) -> Figure:
    figure, [axes] = figures.new_figure("Throughput", f"{prompt_tokens} prompt tokens, {tokens} generated", 1)
    x = range(len(rows))
    bars = axes.bar(x, [row["tok_s"] for row in rows], 0.6, color=figures.FILLS[0], label="best call")
    axes.bar_label(bars, fmt="%.1f", label_type="center")
    axes.plot(x, [row["median_tok_s"] for row in rows], "o", color=figures.COLORS[1], label="median call")
    if limits:
        bound = [limits[row["batch"]] for row in rows]
        axes.hlines(bound, [i - 0.4 for i in x], [i + 0.4 for i in x], color=figures.BOUND_COLOR, label="bound")
    axes.set_xticks(x, [str(row["batch"]) for row in rows])
    axes.set(xlabel="batch (prompts at once)", ylabel="generated tokens a second, prefill included")
    axes.margins(y=0.12)
    axes.legend(loc="upper left")
    return figure
