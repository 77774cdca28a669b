"""``headwise bench limits``: what this machine allows for a model, no engine involved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from headwise.runtime.bench import figures, report
from headwise.runtime.bench.bounds import Case, StepBound, measure_bounds
from headwise.runtime.models import resolve
from headwise.workers.machine import usable_cores
from headwise.workers.model.model_config import load_model_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run(
    model: str,
    batches: Sequence[int],
    chunks: Sequence[int],
    threads: int | None,
    repeats: int,
    *,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Measures the products of decode steps and of prefill chunks, and prints the bounds they are."""
    figures.check_plot(plot)
    config = load_model_config(resolve(model))
    decodes: list[Case] = [(batch, batch) for batch in batches]
    # Of a whole chunk one row at most needs logits, the prompt's last.
    prefills: list[Case] = [(chunk, 1) for chunk in chunks]
    read: Case = (1, 1)
    bounds = measure_bounds(config, [read, *decodes, *prefills], threads, repeats)
    named = {f"decode {rows}": bounds[rows, logits] for rows, logits in decodes}
    named |= {f"prefill {rows}": bounds[rows, logits] for rows, logits in prefills}
    threads = threads or usable_cores()
    report.emit(
        "limits",
        model,
        {"threads": threads},
        [{"case": name, **_result(bound)} for name, bound in named.items()],
        [_table(named, threads)],
        as_json=as_json,
        read_gb_per_s=round(bounds[read].gb_per_s, 2),
        gflop_per_s=round(max(bound.gflop_per_s for bound in named.values()), 1),
    )
    if plot is not None:
        _draw(named, bounds[read], threads).savefig(plot)


def _result(bound: StepBound) -> dict[str, Any]:
    return {
        "rows": bound.rows,
        "logit_rows": bound.logit_rows,
        "product": bound.product,
        "step_ms": round(bound.seconds * 1e3, 3),
        "median_step_ms": round(bound.median_seconds * 1e3, 3),
        "gb_per_s": round(bound.gb_per_s, 2),
        "gflop_per_s": round(bound.gflop_per_s, 1),
        "tok_s": round(bound.tokens_per_s, 1),
        "step_ms_by_product": {name: round(seconds * 1e3, 3) for name, seconds in bound.seconds_by_product.items()},
    }


def _table(named: dict[str, StepBound], threads: int) -> Table:
    rows = [
        [
            name,
            bound.product,
            f"{bound.seconds * 1e3:.1f}",
            f"{bound.median_seconds * 1e3:.1f}",
            f"{bound.gb_per_s:.1f}",
            f"{bound.gflop_per_s:.0f}",
            f"{bound.tokens_per_s:.0f}",
        ]
        for name, bound in named.items()
    ]
    return report.table(
        f"the matrix products of one step, {threads} threads, float32",
        ("step", "product", "ms", "median", "GB/s", "GFLOP/s", "tokens/s"),
        rows,
        "ms: the fastest run of the fastest product; no step with these products takes less",
    )


def _draw(named: dict[str, StepBound], read: StepBound, threads: int) -> Figure:
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, (times, rates) = figures.new_figure("Limits of this machine", f"{threads} threads, float32", 2)
    products = figures.fills_of(read.seconds_by_product)
    width = 0.8 / len(products)
    for index, (product, fill) in enumerate(products.items()):
        x = [position + (index - (len(products) - 1) / 2) * width for position in range(len(named))]
        seconds = [bound.seconds_by_product[product] for bound in named.values()]
        gflop = [bound.flops / s / 1e9 for bound, s in zip(named.values(), seconds, strict=True)]
        for axes, values in ((times, [s * 1e3 for s in seconds]), (rates, gflop)):
            bars = axes.bar(x, values, width, label=product, color=fill)
            axes.bar_label(bars, labels=[figures.short(value) for value in values], fontsize=7, rotation=90, padding=3)
    label = f"read all weights once: {read.gb_per_s:.1f} GB/s"
    times.axhline(read.seconds * 1e3, color=figures.BOUND_COLOR, linestyle="--", linewidth=1, label=label)
    times.set(title="Products of one step", ylabel="milliseconds (log scale)", yscale="log")
    times.set_ylim(read.seconds * 1e3 / 2, times.get_ylim()[1] * 2)
    times.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    times.yaxis.set_major_formatter("{x:g}")
    times.yaxis.set_minor_formatter(NullFormatter())
    rates.set(title="Arithmetic reached", ylabel="GFLOP/s")
    rates.margins(y=0.12)
    for axes in (times, rates):
        axes.set_xticks(range(len(named)), list(named), rotation=30, ha="right")
        axes.set_xlabel("step and its rows")
        axes.legend(loc="upper left", fontsize=8)
    return figure
