"""``headwise bench serve``: what the way through the gRPC service costs, over the driver in the same process."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.table import Table
from tqdm import tqdm

from headwise.runtime.bench import figures, report
from headwise.runtime.bench.workload import greedy, prompts
from headwise.runtime.client import AsyncClient
from headwise.runtime.llm import LLM
from headwise.runtime.models import resolve
from headwise.workers.errors import HeadwiseError
from headwise.workers.model.model_config import load_model_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WAYS = ("driver", "grpc", "grpc streams")
_STOP_TIMEOUT_S = 60.0


class ServerStartError(HeadwiseError):
    """``headwise serve`` ended before it was ready; what it said is on stderr."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent.

    Attributes:
        batch, tokens: prompts at once, and tokens to generate for each.
        prompt_tokens: of each prompt; all of them are different.
        requests: sent one after another, to read the time to the first token.
        pairs: how often each way is measured, with an engine of its own each time.
    """

    batch: int
    tokens: int
    prompt_tokens: int
    requests: int
    pairs: int


@dataclass(frozen=True, slots=True)
class Reading:
    """Generated tokens a second of the batch, and the median time to the first token of single requests. The driver and
    "grpc" generate the batch all at once, "grpc streams" token by token."""

    tok_s: float
    ttft_s: float


def run(model: str, load: Load, settings: dict[str, Any], *, as_json: bool, plot: Path | None) -> None:
    """Measures both ways in turns and prints the medians.

    Raises:
        ServerStartError: the server did not start.
    """
    figures.check_plot(plot)
    path = resolve(model)
    vocab_size = load_model_config(path).vocab_size
    rows = prompts(load.batch + load.requests + 1, load.prompt_tokens, vocab_size)
    readings: dict[str, list[Reading]] = {way: [] for way in WAYS}
    with tqdm(total=len(WAYS) * load.pairs, desc="measuring", unit="run", file=sys.stderr) as bar:
        for pair in range(load.pairs):
            for way in WAYS if pair % 2 == 0 else reversed(WAYS):
                readings[way].append(_read(way, path, rows, load, settings))
                bar.update()
    throughput = _ratio([reading.tok_s for reading in readings["grpc"]], [r.tok_s for r in readings["driver"]])
    added = median(r.ttft_s for r in readings["grpc"]) - median(r.ttft_s for r in readings["driver"])
    report.emit(
        "serve",
        model,
        settings | {"batch": load.batch, "tokens": load.tokens, "prompt_tokens": load.prompt_tokens},
        [_result(way, readings[way]) for way in WAYS],
        [_table(readings, throughput, added)],
        as_json=as_json,
        throughput_ratio=round(throughput, 4),
        added_ttft_s=round(added, 5),
    )
    if plot is not None:
        _draw(readings, load).savefig(plot)


def _driver(path: Path, rows: list[list[int]], load: Load, settings: dict[str, Any]) -> Reading:
    single, batch = rows[: load.requests + 1], rows[load.requests + 1 :]
    with LLM(path, quiet=True, **settings) as llm:
        times = []
        for row in single:
            started = time.perf_counter()
            for _ in llm.stream(row, greedy(1)):
                times.append(time.perf_counter() - started)
        started = time.perf_counter()
        llm.generate(batch, greedy(load.tokens), use_tqdm=False)
        return Reading(load.batch * load.tokens / (time.perf_counter() - started), median(times[1:]))


def _read(way: str, path: Path, rows: list[list[int]], load: Load, settings: dict[str, Any]) -> Reading:
    if way == "driver":
        return _driver(path, rows, load, settings)
    with _serving(path, settings) as address:
        return asyncio.run(_ask(address, rows, load, streams=way == "grpc streams"))


async def _ask(address: str, rows: list[list[int]], load: Load, *, streams: bool) -> Reading:
    single, batch = rows[: load.requests + 1], rows[load.requests + 1 :]
    async with AsyncClient(address) as client:
        times = []
        for row in single:
            started, first = time.perf_counter(), True
            async for _ in client.stream(row, greedy(1)):
                if first:
                    times.append(time.perf_counter() - started)
                first = False

        async def one(row: list[int]) -> None:
            async for _ in client.stream(row, greedy(load.tokens), whole=not streams):
                pass

        started = time.perf_counter()
        await asyncio.gather(*map(one, batch))
        return Reading(load.batch * load.tokens / (time.perf_counter() - started), median(times[1:]))


@contextmanager
def _serving(path: Path, settings: dict[str, Any]) -> Iterator[str]:
    """A server in a process of its own; gives its address, and drains it afterwards."""
    flags = {"tensor_parallel_size": "--tp"}
    options = [
        part
        for name, value in settings.items()
        if value is not None
        for part in (flags.get(name, f"--{name.replace('_', '-')}"), str(value))
    ]
    python = [sys.executable, "-P", "-m", "headwise.runtime.cli"]
    command = [*python, "serve", "--model", str(path), "--port", "0", "--json"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise ServerStartError(f"the server ended with {process.wait(_STOP_TIMEOUT_S)}: {' '.join(command)}")
        yield json.loads(line)["address"]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(_STOP_TIMEOUT_S)


def _ratio(ours: Sequence[float], base: Sequence[float]) -> float:
    """The one in the middle of the pairs' ratios."""
    return median(a / b for a, b in zip(ours, base, strict=True))


def _result(way: str, readings: Sequence[Reading]) -> dict[str, Any]:
    return {
        "way": way,
        "tok_s": round(median(reading.tok_s for reading in readings), 2),
        "ttft_s": round(median(reading.ttft_s for reading in readings), 5),
        "tok_s_readings": [round(reading.tok_s, 2) for reading in readings],
        "ttft_s_readings": [round(reading.ttft_s, 5) for reading in readings],
    }


def _table(readings: dict[str, list[Reading]], throughput: float, added_s: float) -> Table:
    cells = []
    for way in WAYS:
        result = _result(way, readings[way])
        cells.append([way, f"{result['tok_s']:.1f}", f"{1000 * result['ttft_s']:.1f}"])
    caption = (
        f"throughput by gRPC over the driver's: {throughput:.3f}; added to the first token: {1000 * added_s:.1f} ms"
    )
    return report.table("the driver and the service", ("way", "tokens/s", "TTFT ms"), cells, caption)


def _draw(readings: dict[str, list[Reading]], load: Load) -> Figure:
    title = f"batch {load.batch}, {load.prompt_tokens} prompt tokens, {load.tokens} generated"
    figure, panels = figures.new_figure("The driver and the service", title, 2)
    for axes, label, values in (
        (panels[0], "generated tokens a second", [[r.tok_s for r in readings[way]] for way in WAYS]),
        (panels[1], "milliseconds to the first token", [[1000 * r.ttft_s for r in readings[way]] for way in WAYS]),
    ):
        bars = axes.bar(range(len(WAYS)), [median(each) for each in values], 0.6, color=figures.FILLS[0])
        axes.bar_label(bars, fmt=figures.short, label_type="center")
        for x, each in enumerate(values):
            axes.plot([x] * len(each), each, "o", color=figures.COLORS[1], label="each reading" if not x else None)
        axes.set_xticks(range(len(WAYS)), WAYS)
        axes.set(ylabel=label, ylim=(0, None))
        axes.legend(loc="lower right")
    return figure
