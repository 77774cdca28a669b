"""``headwise bench handoff``: what it costs to have prompts computed by another engine, and their KV handed over."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.table import Table
from tqdm import tqdm

from headwise.runtime.bench import figures, report
from headwise.runtime.bench.handoff_bytes import BARE, GRPC, SHARED_MEMORY, WAYS, Shape, rates
from headwise.runtime.bench.handoff_bytes import measure as measure_bytes
from headwise.runtime.bench.handoff_engine import Beside, FirstTokens, beside_streams, first_tokens
from headwise.runtime.bench.workload import prompts
from headwise.runtime.config import engine_config
from headwise.runtime.llm import LLM
from headwise.runtime.models import resolve
from headwise.workers.model.model_config import load_model_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTEXT = 42
"""Prompt tokens of a stream."""
PACES = ("paced", "back to back")
"""One transfer for each time that a prompt takes to be computed and handed over, and one after another."""

Settings = dict[str, Any]
ByWay = Mapping[str, Sequence[float]]
Streams = Mapping[tuple[str, str], Beside]
"""By way and pace."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is measured.

    Attributes:
        prompt_tokens: of the prompts that are handed over.
        pairs: readings of each case.
        streams: that decode while transfers run.
        window_s: seconds for which those are watched, with and without transfers.
    """

    prompt_tokens: int
    pairs: int
    streams: int
    window_s: float


def run(model: str, load: Load, settings: Settings, *, as_json: bool, plot: Path | None) -> None:
    """Measures and prints.

    Raises:
        LostBytesError, NotHandedOverError: a transfer failed.
        UnsteadyError: a stream came to its end.
    """
    figures.check_plot(plot)
    engine_config(model=model, **settings)
    config = load_model_config(resolve(model))
    shape = Shape(load.prompt_tokens, config.num_layers, config.num_kv_heads, config.head_dim)
    firsts: dict[str, FirstTokens] = {}
    streams: dict[tuple[str, str], Beside] = {}
    total = load.pairs * (len(WAYS) + 2 * (2 + 2 * len(PACES)))
    with tqdm(total=total, desc="measuring", unit="reading", file=sys.stderr) as bar:
        num_bytes, seconds = measure_bytes(shape, load.pairs, bar)
        for way in (GRPC, SHARED_MEMORY):
            rows = prompts(2 * load.pairs + 2 + load.streams, load.prompt_tokens, config.vocab_size)
            decoding, rows = [row[:CONTEXT] for row in rows[: load.streams]], rows[load.streams :]
            handing: Settings = {"prefill": {}, "decode": {}, "handoff_min_tokens": load.prompt_tokens}
            with LLM(model, **settings, **handing, handoff_shared_memory=way == SHARED_MEMORY) as llm:
                firsts[way] = first_tokens(llm, rows, bar)
                for pace, period_s in zip(PACES, (median(firsts[way].handed), 0.0), strict=True):
                    streams[way, pace] = beside_streams(
                        llm, decoding, rows[0], period_s, load.pairs, load.window_s, bar
                    )
    report.emit(
        "handoff",
        model,
        settings | asdict(load),
        [*_byte_results(num_bytes, seconds), *_first_results(firsts), *_stream_results(streams)],
        [_byte_table(num_bytes, seconds), _first_table(firsts, load), _stream_table(streams, load)],
        as_json=as_json,
    )
    if plot is not None:
        _draw(num_bytes, seconds, firsts, streams, load).savefig(plot)


def _byte_results(num_bytes: int, seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    found = rates(num_bytes, seconds)
    return [
        {
            "part": "bytes",
            "way": way,
            "bytes": num_bytes,
            "gb_per_s": round(found[way], 3),
            "of_bare": round(found[way] / found[BARE], 3),
            "seconds_readings": [round(one, 5) for one in seconds[way]],
        }
        for way in WAYS
    ]


def _first_results(firsts: Mapping[str, FirstTokens]) -> list[dict[str, Any]]:
    return [
        {
            "part": "first token",
            "way": way,
            "handed_s": round(median(one.handed), 5),
            "here_s": round(median(one.here), 5),
            "ratio": round(one.ratio, 4),
            "handoff_s": round(one.handoff, 5),
            "push_s": round(one.push, 5),
            "hidden_s": round(one.hidden, 5),
            "handed_s_readings": [round(each, 5) for each in one.handed],
            "here_s_readings": [round(each, 5) for each in one.here],
        }
        for way, one in firsts.items()
    ]


def _stream_results(streams: Streams) -> list[dict[str, Any]]:
    return [
        {
            "part": "streams",
            "way": way,
            "pace": pace,
            "tok_s": round(median(one.tok_s), 2),
            "quiet_tok_s": round(median(one.quiet_tok_s), 2),
            "ratio": round(one.ratio, 4),
            "gb_per_s": round(one.gb_per_s, 4),
            "transfers_per_s": round(one.transfers_per_s, 3),
            "tok_s_readings": [round(each, 2) for each in one.tok_s],
            "quiet_tok_s_readings": [round(each, 2) for each in one.quiet_tok_s],
        }
        for (way, pace), one in streams.items()
    ]


def _byte_table(num_bytes: int, seconds: dict[str, list[float]]) -> Table:
    found = rates(num_bytes, seconds)
    rows = [[way, f"{found[way]:.2f}", f"{found[way] / found[BARE]:.2f}"] for way in WAYS]
    caption = "bare: a stream of grpcio and nothing else; the others gather, verify and scatter"
    return report.table(f"{num_bytes / 1e6:.0f} MB to another process", ("way", "GB/s", "of bare"), rows, caption)


def _first_table(firsts: Mapping[str, FirstTokens], load: Load) -> Table:
    rows = [
        [way, *(f"{1000 * each:.0f}" for each in (median(one.here), median(one.handed))), f"{one.ratio:.3f}"]
        + [f"{1000 * each:.0f}" for each in (one.handoff, one.push, one.hidden)]
        for way, one in firsts.items()
    ]
    columns = ("way", "computed here", "handed over", "ratio", "handoff", "pushes", "hidden")
    caption = "handoff: from its start until its blocks could be read; hidden: pushes beside the computing"
    title = f"ms to the first token of {load.prompt_tokens} tokens"
    return report.table(title, columns, rows, caption)


def _stream_table(streams: Streams, load: Load) -> Table:
    rows = [
        [
            f"{way}, {pace}",
            *(f"{median(each):.1f}" for each in (one.quiet_tok_s, one.tok_s)),
            f"{one.ratio:.3f}",
            f"{one.gb_per_s:.3f}",
        ]
        for (way, pace), one in streams.items()
    ]
    title = f"tokens a second of {load.streams} streams while transfers run"
    caption = "paced: one for each time to the first token of a prompt that is handed over"
    return report.table(title, ("transfers", "none", "running", "ratio", "GB/s"), rows, caption)


def _draw(
    num_bytes: int, seconds: ByWay, firsts: Mapping[str, FirstTokens], streams: Streams, load: Load
) -> Figure:  # fmt: skip
    title = f"{load.prompt_tokens} tokens, {num_bytes / 1e6:.0f} MB; {load.streams} streams"
    figure, panels = figures.new_figure("Handoff", title, 3)
    _bars(panels[0], "GB/s to another process", {way: [num_bytes / s / 1e9 for s in seconds[way]] for way in WAYS})
    ttft = {"computed\nhere": firsts[GRPC].here} | {f"handed over,\n{way}": one.handed for way, one in firsts.items()}
    _bars(panels[1], "seconds to the first token", ttft)
    shares = {
        f"{way},\n{pace}": [a / b for a, b in zip(one.tok_s, one.quiet_tok_s, strict=True)]
        for (way, pace), one in streams.items()
    }
    _bars(panels[2], "streams' tokens/s over those without transfers", shares)
    return figure


def _bars(axes: Any, label: str, values: Mapping[str, Sequence[float]]) -> None:
    bars = axes.bar(range(len(values)), [median(each) for each in values.values()], 0.6, color=figures.FILLS[0])
    axes.bar_label(bars, fmt=figures.short, label_type="center")
    for x, each in enumerate(values.values()):
        axes.plot([x] * len(each), each, "o", color=figures.COLORS[1], markersize=3)
    axes.set_xticks(range(len(values)), [*values], fontsize=7)
    axes.set(ylabel=label, ylim=(0, None))
