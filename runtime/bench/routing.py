"""``headwise bench routing``: what replicas find in their caches, and how evenly they work, by the way of routing."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.table import Table
from tqdm import tqdm

from headwise.runtime.bench import figures, report
from headwise.runtime.bench.workload import greedy, prompts
from headwise.runtime.config import EngineConfig, engine_config
from headwise.runtime.deployment.model import DeployedModel, make_replicas
from headwise.runtime.deployment.options import ReplicaOptions
from headwise.runtime.models import resolve
from headwise.runtime.routing.router import Router
from headwise.workers.model.model_config import load_model_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from headwise.cluster.replica import ReplicaFactory

WAYS = ("router", "in turns", "least loaded")
SEEN_S = 30.0
"""For the router to hear that the caches are empty."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent.

    Attributes:
        replicas: that compute.
        prefixes, each: beginnings of prompts, and requests with each of them.
        prefix_tokens, own_tokens: of a beginning, and of what follows it, which no two prompts have in common.
        tokens: to generate for each.
        at_once: requests under way at the same time; when one ends, the next is sent.
        repeats: how often each way is measured, each time in another order of the requests and with empty caches.
    """

    replicas: int
    prefixes: int
    each: int
    prefix_tokens: int
    own_tokens: int
    tokens: int
    at_once: int
    repeats: int

    def optimum(self, block_size: int) -> int:
        """Prompt tokens that one replica with room for all finds in its cache, if each beginning comes once before it
        comes again."""
        return self.prefixes * (self.each - 1) * (self.prefix_tokens // block_size * block_size)


@dataclass(frozen=True, slots=True)
class Reading:
    """Of one run.

    Attributes:
        hit_tokens: prompt tokens that were found in caches.
        requests, computed_tokens: of each replica; the latter of prompts and outputs.
        ttft_s: median time to the first token.
        seconds: for all requests.
    """

    hit_tokens: int
    requests: list[int]
    computed_tokens: list[int]
    ttft_s: float
    seconds: float

    @property
    def off_mean(self) -> float:
        """By what share of the mean the replica with the most tokens to compute is above it."""
        return max(self.computed_tokens) * len(self.computed_tokens) / sum(self.computed_tokens) - 1


class SwitchRouter(Router):
    """The router, or another way of choosing a replica.

    Attributes:
        way: of WAYS.
    """

    def __init__(self, block_size: int) -> None:
        super().__init__(block_size)
        self.way, self._turn = WAYS[0], 0

    def _best(self, num_tokens: int, prefixes: Sequence[tuple[int, int]], seed: int) -> int | None:
        if self.way == "router":
            return super()._best(num_tokens, prefixes, seed)
        ready = [slot for slot, replica in sorted(self._by_slot.items()) if not replica.drains]
        if not ready:
            return None
        self._turn += 1  # of equals, too, none is always the first
        ready = ready[self._turn % len(ready) :] + ready[: self._turn % len(ready)]
        return ready[0] if self.way == "in turns" else min(ready, key=lambda slot: len(self._by_slot[slot].requests))


def run(model: str, load: Load, settings: dict[str, Any], *, as_json: bool, plot: Path | None) -> None:
    """Measures each way on the same replicas, in turns, and prints the medians."""
    figures.check_plot(plot)
    config = engine_config(model=str(resolve(model)), enable_prefix_caching=True, **settings)
    options = ReplicaOptions(load.replicas)
    readings = asyncio.run(measure(config, load, make_replicas(config, options)))
    optimum = load.optimum(config.block_size)
    results = [_result(way, readings[way], optimum) for way in WAYS]
    report.emit(
        "routing", model, settings | asdict(load), results, [_table(results, load)], as_json=as_json, optimum=optimum
    )
    if plot is not None:
        _draw(results, load).savefig(plot)


async def measure(config: EngineConfig, load: Load, factory: ReplicaFactory) -> dict[str, list[Reading]]:
    """The readings of each way. Args: ``factory``: starts the replicas; closed with them."""
    router = SwitchRouter(config.block_size)
    llm = DeployedModel(config, ReplicaOptions(load.replicas), factory, router=router)
    readings: dict[str, list[Reading]] = {way: [] for way in WAYS}
    try:
        asked = _prompts(load, load_model_config(llm.model_path).vocab_size)
        with tqdm(total=len(WAYS) * (load.repeats + 1), desc="measuring", unit="run", file=sys.stderr) as bar:
            for repeat in range(-1, load.repeats):
                order = random.Random(repeat).sample(asked, len(asked))
                for way in WAYS if repeat % 2 == 0 else reversed(WAYS):
                    await _empty(llm, router)
                    router.way = way
                    reading = await _read(llm, order, load)
                    if repeat >= 0:  # else it warms up
                        readings[way].append(reading)
                    bar.update()
    finally:
        await llm.close()
    return readings


def _prompts(load: Load, vocab_size: int) -> list[list[int]]:
    beginnings = prompts(load.prefixes, load.prefix_tokens, vocab_size)
    own = iter(prompts(load.prefixes * load.each + 1, load.own_tokens, vocab_size))
    return [beginning + next(own) for beginning in beginnings for _ in range(load.each)]


async def _empty(llm: DeployedModel, router: Router) -> None:
    """Empties the caches, and waits until the router knows.

    Raises:
        TimeoutError: it does not within SEEN_S.
    """
    await llm.reset_prefix_cache()
    async with asyncio.timeout(SEEN_S):
        while (await llm.run(lambda _: router.stats()))["blocks"]:
            await asyncio.sleep(0.01)


async def _read(llm: DeployedModel, order: list[list[int]], load: Load) -> Reading:
    waiting: Iterator[list[int]] = iter(order)
    requests: Counter[str] = Counter()
    computed: Counter[str] = Counter()
    hits, times = 0, list[float]()

    async def ask_on() -> None:
        nonlocal hits
        for prompt in waiting:
            number = llm.next_number()
            [request] = llm.inputs.requests(f"routing-{number}", prompt, greedy(load.tokens), number)
            async for _ in llm.stream([request]):
                pass
            metrics = request.metrics
            requests[metrics.replica] += 1
            computed[metrics.replica] += len(prompt) - metrics.num_cached_tokens + len(request.generated)
            hits += metrics.num_cached_tokens
            times.append(metrics.time_to_first_token)

    started = time.perf_counter()
    await asyncio.gather(*(ask_on() for _ in range(load.at_once)))
    seconds = time.perf_counter() - started
    names = sorted(replica["name"] for replica in (await asyncio.to_thread(llm.status))["replicas"])
    return Reading(hits, [requests[name] for name in names], [computed[name] for name in names], median(times), seconds)


def _result(way: str, readings: Sequence[Reading], optimum: int) -> dict[str, Any]:
    return {
        "way": way,
        "hit_share_of_optimum": round(median(one.hit_tokens for one in readings) / optimum, 3),
        "above_mean": round(median(one.off_mean for one in readings), 3),
        "ttft_ms": round(1e3 * median(one.ttft_s for one in readings), 1),
        "seconds": round(median(one.seconds for one in readings), 3),
        "readings": [asdict(one) for one in readings],
    }


def _table(results: Sequence[dict[str, Any]], load: Load) -> Table:
    title = f"{load.replicas} replicas, {load.prefixes} beginnings x {load.each} requests"
    cells = [
        [
            found["way"],
            f"{found['hit_share_of_optimum']:.2f}",
            f"{found['above_mean']:+.0%}",
            f"{found['ttft_ms']:.1f}",
            f"{found['seconds']:.2f}",
        ]
        for found in results
    ]
    head = ("way", "hits / one replica's", "busiest above mean", "TTFT ms", "seconds")
    return report.table(title, head, cells, "medians; TTFT: the median request's")


def _draw(results: Sequence[dict[str, Any]], load: Load) -> Figure:
    subtitle = f"{load.replicas} replicas, {load.prefixes} beginnings of {load.prefix_tokens} tokens x {load.each}"
    figure, panels = figures.new_figure("Routing by cached prefix", subtitle, 3)
    for axes, key, label in (
        (panels[0], "hit_share_of_optimum", "tokens found, of what one replica finds"),
        (panels[1], "above_mean", "work of the busiest replica above the mean"),
        (panels[2], "ttft_ms", "milliseconds to the first token"),
    ):
        bars = axes.bar(range(len(WAYS)), [one[key] for one in results], 0.6, color=figures.FILLS[0])
        axes.bar_label(bars, fmt=figures.short, label_type="center")
        axes.set_xticks(range(len(WAYS)), WAYS)
        axes.set(ylabel=label, ylim=(0, None))
    panels[0].axhline(0.9, color=figures.COLORS[1], linestyle="--")
    panels[1].axhline(0.25, color=figures.COLORS[1], linestyle="--")
    return figure
