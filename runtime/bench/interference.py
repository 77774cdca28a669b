"""``headwise bench interference``: what streams feel of others' long prompts, with a prefill engine and without."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from headwise.runtime.bench import figures, report
from headwise.runtime.bench.latency import STEADY_CONTEXT, Timeline, arrival_times, summary, timelines_of
from headwise.runtime.bench.workload import greedy, prompts
from headwise.runtime.config import engine_config
from headwise.runtime.llm import LLM
from headwise.runtime.models import resolve
from headwise.workers.machine import usable_cores
from headwise.workers.model.model_config import load_model_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPLIT, CHUNKED, WHOLE = CASES = ("prefill and decode", "one engine", "one engine, no limit")
"""Two engines, each on its own half of the cores; one on all cores, with its default of ``max_mixed_prefill_tokens``,
and with none: a step takes as many tokens of prompts along as a step may have."""

Settings = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent.

    Attributes:
        streams: that decode all the while.
        rate: long prompts a second, on average.
        requests: long prompts in all, of ``prompt_tokens`` each; ``tokens`` are generated for each.
        seed: of the arrivals.
    """

    streams: int
    rate: float
    requests: int
    prompt_tokens: int
    tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of a case.

    Attributes:
        gaps: between a stream's tokens: (seconds from the first arrival to the second token, seconds between both).
        first_s: of each long prompt from when it was due to its first token.
        tok_s: tokens a second from the first arrival to the end of the last request: those of the streams, and those of
            the long prompts, which count with their outputs.
        num_handed: long prompts whose KV was handed over.
        pinned: whether the ranks of each engine were kept on cores of their own.
    """

    gaps: list[tuple[float, float]]
    first_s: list[float]
    tok_s: tuple[float, float]
    num_handed: int = 0
    pinned: bool = False


def run(model: str, load: Load, settings: Settings, *, as_json: bool, plot: Path | None) -> None:
    """Measures the cases one after another, with the same arrivals, and prints.

    Raises:
        UnsteadyError: a stream came to its end.
    """
    figures.check_plot(plot)
    limit = engine_config(model=model, **settings).max_num_batched_tokens
    vocab_size = load_model_config(resolve(model)).vocab_size
    differs: dict[str, Settings] = {
        SPLIT: {"prefill": {}, "decode": {}, "handoff_min_tokens": load.prompt_tokens},
        CHUNKED: {},
        WHOLE: {"max_mixed_prefill_tokens": limit},
    }
    seen = {}
    for case in CASES:
        print(f"headwise: {case}", file=sys.stderr)
        seen[case] = _measure(model, load, settings | differs[case], vocab_size)
    results = [_result(case, one) for case, one in seen.items()]
    report.emit("interference", model, settings | asdict(load), results, [_table(results, load)], as_json=as_json)
    if plot is not None:
        _draw(seen, load).savefig(plot)


def seen_of(
    timelines: Sequence[Timeline], watched: Sequence[Sequence[float]], prompt_tokens: int, **handoff: Any
) -> Seen:
    """
    Args:
        watched: when each token of each stream came.
        handoff: the fields of :class:`Seen` that tell of handoffs.
    """
    start, end = timelines[0].arrival, max(timeline.tokens[-1] for timeline in timelines)
    gaps = [(b - start, b - a) for times in watched for a, b in pairwise(times) if start <= a and b <= end]
    long_tokens = sum(prompt_tokens + len(timeline.tokens) for timeline in timelines)
    return Seen(
        sorted(gaps),
        [timeline.tokens[0] - timeline.arrival for timeline in timelines],
        (len(gaps) / (end - start), long_tokens / (end - start)),
        **handoff,
    )


def pin(llm: LLM) -> bool:
    """Gives the ranks of decode the first half of the cores, and those of prefill the others; returns whether they are
    processes, of which that can be said, and there are cores for both."""
    cores, here = sorted(os.sched_getaffinity(0)), os.getpid()
    prefill = llm._prefill
    assert prefill is not None
    pids = [
        [int(shard["pid"]) for shard in run(lambda engine: engine.query_shards("stats"))]
        for run in (llm._loop.run, prefill.loop.run)
    ]
    if here in (*pids[0], *pids[1]) or min(len(cores), usable_cores()) < 2:
        return False
    half = len(cores) // 2
    for processes, own in zip(pids, (cores[:half], cores[half:]), strict=True):
        for thread in _threads(processes):
            os.sched_setaffinity(thread, own)
    return True


def _threads(pids: Sequence[int]) -> Iterator[int]:
    """Each has an affinity of its own; those that start later have that of the thread that starts them."""
    for pid in pids:
        yield from (int(thread) for thread in os.listdir(f"/proc/{pid}/task"))


def _measure(model: str, load: Load, settings: Settings, vocab_size: int) -> Seen:
    longest = max(load.prompt_tokens, STEADY_CONTEXT)
    rows = prompts(load.streams + load.requests + 1, longest, vocab_size)
    decoding = [row[:STEADY_CONTEXT] for row in rows[: load.streams]]
    warm_up, *arriving = [row[: load.prompt_tokens] for row in rows[load.streams :]]
    due = arrival_times(load.rate, load.requests, load.seed)
    # The engine closes before the consumers are waited for: after an error it ends their streams.
    with ThreadPoolExecutor(load.requests + load.streams) as consumers, LLM(model, **settings) as llm:
        pinned = "prefill" in settings and pin(llm)
        llm.generate([warm_up], greedy(load.tokens), use_tqdm=False)
        before = _num_committed(llm)
        timelines, watched = timelines_of(llm, consumers, arriving, load.tokens, due, decoding)
        num_handed = _num_committed(llm) - before
    return seen_of(timelines, watched, load.prompt_tokens, num_handed=num_handed, pinned=pinned)


def _num_committed(llm: LLM) -> int:
    return int(llm.stats()["handoff"].get("committed", 0))


def _result(case: str, seen: Seen) -> dict[str, Any]:
    return {
        "case": case,
        "gaps": summary([gap for _, gap in seen.gaps]),
        "first_token": summary(seen.first_s),
        "stream_tok_s": round(seen.tok_s[0], 2),
        "prompt_tok_s": round(seen.tok_s[1], 2),
        "handed_over": seen.num_handed,
        "pinned": seen.pinned,
    }


def _table(results: Sequence[dict[str, Any]], load: Load) -> Table:
    rows = [
        [
            result["case"],
            *(f"{result['gaps'][key]:.1f}" for key in ("p50_ms", "p99_ms", "max_ms")),
            *(f"{result['first_token'][key]:.0f}" for key in ("p50_ms", "max_ms")),
            *(f"{result[key]:.0f}" for key in ("stream_tok_s", "prompt_tok_s")),
        ]
        for result in results
    ]
    columns = ("", "p50", "p99", "max", "TTFT p50", "TTFT max", "streams' tokens/s", "prompts' tokens/s")
    caption = "ms between a stream's tokens; ms to the first token of a long prompt, from when it was due"
    if not results[0]["pinned"]:
        caption += "; prefill and decode were not kept on cores of their own"
    return report.table(_describe(load), columns, rows, caption)


def _describe(load: Load) -> str:
    prompt = f"{load.requests} prompts of {load.prompt_tokens} tokens at {load.rate:g} a second"
    return f"{load.streams} streams while {prompt} arrive"


def _draw(seen: dict[str, Seen], load: Load) -> Figure:
    figure, panels = figures.new_figure("Interference", _describe(load), 2 * len(CASES))
    highest = 1.05e3 * max(gap for one in seen.values() for _, gap in one.gaps)
    for axes, (case, one), color in zip(panels[::2], seen.items(), figures.COLORS, strict=False):
        axes.plot([at for at, _ in one.gaps], [1e3 * gap for _, gap in one.gaps], ".", color=color, markersize=3)
        axes.set(title=case, xlabel="seconds", ylabel="ms between a stream's tokens", ylim=(0, highest))
    gaps = [summary([gap for _, gap in one.gaps]) for one in seen.values()]
    waits = [summary(one.first_s) for one in seen.values()]
    first, second, third = panels[1::2]
    _bars(first, "ms between a stream's tokens", {p: [one[f"{p}_ms"] for one in gaps] for p in ("p50", "p99")})
    _bars(second, "ms to a long prompt's first token", {p: [one[f"{p}_ms"] for one in waits] for p in ("p50", "max")})
    rates = {
        name: [one.tok_s[index] for one in seen.values()] for index, name in enumerate(("streams", "long prompts"))
    }
    _bars(third, "tokens a second", rates)
    return figure


def _bars(axes: Any, label: str, values: dict[str, list[float]]) -> None:
    """A group of bars for each case."""
    width = 0.8 / len(values)
    for index, (name, each) in enumerate(values.items()):
        places = [x + (index - (len(values) - 1) / 2) * width for x in range(len(each))]
        bars = axes.bar(places, each, width, color=figures.FILLS[index], label=name)
        axes.bar_label(bars, fmt=figures.short, fontsize=8)
    axes.set_xticks(range(len(CASES)), [case.replace(" ", "\n", 2) for case in CASES], fontsize=8)
    axes.set(ylabel=label)
    axes.legend(fontsize=8)
