"""The router at work without a model: what it finds in the replicas' caches, how long requests queue, what it costs.

    python benchmarks/router.py [--replicas 8 64 1000] [--requests 2000] [--load 0.5] [--json] [--plot router.png]

The router is the real one (runtime/routing/), and so are KV events and load reports; the replicas are queues with a
clock of their own. Requests arrive at random. A prompt is one of ``16 * replicas`` beginnings of 1,024 tokens, the
popular ones more often (Zipf), and 64 to 448 tokens of its own. A replica computes one prompt after another, keeps the
blocks that were used last, and generates 64 tokens beside that.

Four ways of routing see the same requests: this router; in turns; the least loaded, where fewest requests are; and the
optimum, which no routing reaches: one queue for all replicas, and one cache as large as all of theirs, in which a block
is found as soon as the request that brings it has arrived. A load of 1 is what the replicas can just compute if only
prompts' own tokens are missing.

What a decision takes is processor time of ``route()``. The index's bytes are the sizes of all its objects at the end,
with each replica's digests as objects of their own, as decoded messages have them.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import random
import statistics
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from headwise.runtime.bench.figures import COLORS, check_plot, new_figure
from headwise.runtime.bench.report import machine, table, versions
from headwise.runtime.kv.events import TIERS, KvEvent, KvMessage, KvSnapshot, Removed, Stored
from headwise.runtime.routing.load import LoadReport
from headwise.runtime.routing.router import Router

# Of SmolLM2-135M on 2 cores, from docs/performance.md, "Against the machine" and "The prefix cache".
TOKEN_S = 0.816 / 1024
"""Prefill of one prompt of 1,024 tokens, one chunk."""
STEP_S, ROW_S = 0.0187, (0.0419 - 0.0187) / 31
"""A decode step of one row, and each row more (of 32 rows: 41.9 ms)."""
CAPACITY = (2 << 30) // 737_000
"""Blocks of a replica: 2 GiB of KV memory, a block of 737 KB."""

BLOCK_SIZE = 16
BEGINNING, OWN, GENERATED = 1024, (64, 448), 64  # tokens
BEGINNINGS = 16  # for each replica
REPORT_S, EVENT_S = 1.0, 0.005
"""Between two load reports of a replica; from a replica's KV event to the router."""

WAYS = ("router", "in turns", "least loaded")


@dataclass(frozen=True, slots=True)
class Request:
    id: str
    arrives_s: float
    digests: list[bytes]
    tokens: int


class Cache:
    """The blocks that were used last."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def prefix(self, digests: Sequence[bytes]) -> int:
        """Leading blocks that are there."""
        return next((count for count, digest in enumerate(digests) if digest not in self._blocks), len(digests))

    def use(self, digests: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
        """Puts a prompt's blocks there. Returns those that are new, and those that had to go."""
        blocks = self._blocks
        new = [digest for digest in digests if digest not in blocks]
        for digest in reversed(digests):  # the end of a chain goes before its beginning
            blocks[digest] = None
            blocks.move_to_end(digest)
        gone = [blocks.popitem(last=False)[0] for _ in range(len(blocks) - self._capacity)]
        return new, gone


@dataclass(slots=True)
class Replica:
    name: str
    cache: Cache
    queue: deque[Request] = field(default_factory=deque)
    computing: Request | None = None
    done_s: float = 0.0
    running: int = 0
    received: int = 0
    sequence: int = 0
    computed_tokens: int = 0


@dataclass(slots=True)
class Outcome:
    hit_tokens: int = 0
    queue_s: list[float] = field(default_factory=list)
    decision_s: list[float] = field(default_factory=list)
    computed_tokens: list[int] = field(default_factory=list)  # by replica
    index_bytes: int = 0
    held: int = 0


def workload(replicas: int, requests: int, load: float) -> Iterator[Request]:
    """Requests in the order of their arrival, the same at each call."""
    chance = random.Random(0)
    beginnings = [[chance.randbytes(32) for _ in range(BEGINNING // BLOCK_SIZE)] for _ in range(BEGINNINGS * replicas)]
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(beginnings) + 1)))
    between_s = statistics.mean(OWN) * TOKEN_S / (replicas * load)
    now = 0.0
    for number in range(requests):
        [beginning] = chance.choices(beginnings, cum_weights=weights)
        now += chance.expovariate(1 / between_s)
        own = chance.randint(*OWN)
        digests = beginning + [chance.randbytes(32) for _ in range(own // BLOCK_SIZE)]
        yield Request(str(number), now, digests, BEGINNING + own)


class Simulation:
    """Requests on their way through replicas; ``way`` is one of WAYS."""

    def __init__(self, way: str, replicas: int) -> None:
        self.way, self.outcome = way, Outcome()
        self.under_way, self.is_over = 0, False
        self.replicas = [Replica(f"replica-{index}", Cache(CAPACITY)) for index in range(replicas)]
        self.by_name = {replica.name: replica for replica in self.replicas}
        self.turns = itertools.cycle(self.replicas)
        self.order = itertools.count()
        self.events: list[tuple[float, int, str, Any]] = []
        self.router = Router(BLOCK_SIZE)
        self.chance = random.Random(1)
        if way == "router":
            for index, replica in enumerate(self.replicas):
                self.router.joined(replica.name)
                self.router.kv_snapshot(replica.name, KvSnapshot(1, 0, {tier: {} for tier in TIERS}))
                self.push(REPORT_S * index / replicas, "report", replica)

    def run(self, requests: Iterable[Request]) -> Outcome:
        for request in requests:
            self.until(request.arrives_s)
            self.arrive(request)
        self.is_over = True
        self.until(math.inf)
        self.outcome.computed_tokens = [replica.computed_tokens for replica in self.replicas]
        if self.way == "router":
            assert self.router.stats()["requests"] == self.router.stats()["queued_tokens"] == 0
            self.outcome.index_bytes, self.outcome.held = index_bytes(self.router), self.router.stats()["held"]
        return self.outcome

    def push(self, at_s: float, kind: str, what: Any) -> None:
        heapq.heappush(self.events, (at_s, next(self.order), kind, what))

    def until(self, now: float) -> None:
        while self.events and self.events[0][0] <= now:
            at_s, _, kind, what = heapq.heappop(self.events)
            getattr(self, f"_{kind}")(at_s, what)

    def arrive(self, request: Request) -> None:
        self.under_way += 1
        started = time.thread_time()
        if self.way == "router":
            choice = self.router.route(request.id, request.digests, request.tokens)
            assert choice is not None
            replica = self.by_name[choice.replica]
            replica.received = choice.number
        elif self.way == "in turns":
            replica = next(self.turns)
        else:
            replica = min(self.replicas, key=self.load_of)
        self.outcome.decision_s.append(time.thread_time() - started)
        replica.queue.append(request)
        if replica.computing is None:
            self.begin(request.arrives_s, replica)

    def load_of(self, replica: Replica) -> tuple[int, float]:
        requests = len(replica.queue) + (replica.computing is not None) + replica.running
        return requests, self.chance.random()

    def begin(self, now: float, replica: Replica) -> None:
        request = replica.queue.popleft()
        cached = min(replica.cache.prefix(request.digests) * BLOCK_SIZE, request.tokens - 1)
        replica.computing, replica.done_s = request, now + (request.tokens - cached) * TOKEN_S
        replica.computed_tokens += request.tokens - cached
        self.outcome.hit_tokens += cached
        self.outcome.queue_s.append(now - request.arrives_s)
        self.push(replica.done_s, "computed", replica)

    def _computed(self, now: float, replica: Replica) -> None:
        request = replica.computing
        assert request is not None
        replica.computing = None
        replica.running += 1
        new, gone = replica.cache.use(request.digests)
        self.push(now + GENERATED * (STEP_S + ROW_S * (replica.running - 1)), "finished", (replica, request.id))
        if self.way == "router":
            self.router.first_token(request.id)
            events: list[KvEvent] = [Stored("device", tuple(bytes(bytearray(digest)) for digest in new), bytes(32))]
            if gone:
                events.append(Removed("device", tuple(gone)))
            replica.sequence += 1
            self.push(now + EVENT_S, "told", (replica, KvMessage(1, replica.sequence, tuple(events))))
        if replica.queue:
            self.begin(now, replica)

    def _told(self, now: float, what: tuple[Replica, KvMessage]) -> None:
        assert self.router.kv_message(what[0].name, what[1]) == []

    def _finished(self, now: float, what: tuple[Replica, str]) -> None:
        replica, request = what
        replica.running -= 1
        self.under_way -= 1
        if self.way == "router":
            self.router.finished(request)

    def _report(self, now: float, replica: Replica) -> None:
        queued = sum(one.tokens - replica.cache.prefix(one.digests) * BLOCK_SIZE for one in replica.queue)
        if replica.computing is not None:
            queued += round((replica.done_s - now) / TOKEN_S)
        report = LoadReport(replica.received, max(0, queued), replica.running, TOKEN_S, ROW_S)
        self.router.load(replica.name, report)
        if self.under_way or not self.is_over:
            self.push(now + REPORT_S, "report", replica)


def optimum(replicas: int, requests: Iterable[Request]) -> Outcome:
    """One queue, and one cache of all replicas' size."""
    outcome, cache = Outcome(), Cache(CAPACITY * replicas)
    free_s = [0.0] * replicas
    for request in requests:
        cached = min(cache.prefix(request.digests) * BLOCK_SIZE, request.tokens - 1)
        cache.use(request.digests)
        start_s = max(request.arrives_s, free_s[0])
        heapq.heapreplace(free_s, start_s + (request.tokens - cached) * TOKEN_S)
        outcome.hit_tokens += cached
        outcome.queue_s.append(start_s - request.arrives_s)
    return outcome


def index_bytes(router: Router) -> int:
    """Of the dicts, digests and bitmaps that tell which replica holds which block."""
    index = router._index._slots
    parts = [replica.blocks._held for replica in router._replicas.values()]
    total = sys.getsizeof(index) + sum(map(sys.getsizeof, parts))
    total += sum(map(sys.getsizeof, {id(slots): slots for slots in index.values()}.values()))
    digests = {id(digest): digest for digest in itertools.chain(index, *parts)}
    return total + sum(map(sys.getsizeof, digests.values()))


def quantile(values: Sequence[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def measure(replicas: int, count: int, load: float) -> list[dict[str, Any]]:
    """A result for each way of routing."""

    def requests(way: str) -> Iterable[Request]:
        made = workload(replicas, count, load)
        return tqdm(made, total=count, unit="request", desc=f"{replicas} replicas, {way}", file=sys.stderr)

    tokens = sum(request.tokens for request in workload(replicas, count, load))
    outcomes = {way: Simulation(way, replicas).run(requests(way)) for way in WAYS}
    best = optimum(replicas, requests("optimum"))
    results = []
    for way, outcome in (outcomes | {"optimum": best}).items():
        result = {"replicas": replicas, "requests": count, "way": way, "hit_rate": outcome.hit_tokens / tokens}
        result["hit_over_optimum"] = outcome.hit_tokens / best.hit_tokens
        result |= {f"queue_p{part}_s": quantile(outcome.queue_s, part / 100) for part in (50, 99)}
        if outcome.computed_tokens:
            result["most_over_mean"] = max(outcome.computed_tokens) / statistics.mean(outcome.computed_tokens)
        if way == "router":
            result |= {f"decision_p{part}_us": 1e6 * quantile(outcome.decision_s, part / 100) for part in (50, 90, 99)}
            result |= {"index_bytes": outcome.index_bytes, "held_blocks": outcome.held}
            result["bytes_per_held_block"] = outcome.index_bytes / max(1, outcome.held)
        results.append(result)
    return results


def draw(results: Sequence[dict[str, Any]], path: Path, subtitle: str) -> None:
    figure, axes = new_figure("Routing by cached prefix", subtitle, 4)
    mine = [result for result in results if result["way"] == "router"]
    replicas = [result["replicas"] for result in mine]
    for part, color in zip((50, 90, 99), COLORS, strict=False):
        values = [result[f"decision_p{part}_us"] for result in mine]
        axes[0].plot(replicas, values, marker="o", color=color, label=f"p{part}")
    axes[0].axhline(100, color="#222222", linestyle="--", linewidth=1, label="limit")
    axes[0].set(title="What a decision takes", ylabel="µs", ylim=(0, None))
    axes[1].plot(replicas, [result["index_bytes"] / 2**20 for result in mine], marker="o", color=COLORS[0])
    axes[1].set(title="The index", ylabel="MiB", yscale="log")
    for way, color in zip((*WAYS, "optimum"), COLORS, strict=True):
        rows = [result for result in results if result["way"] == way]
        axes[2].plot(replicas, [row["hit_rate"] for row in rows], marker="o", color=color, label=way)
        axes[3].plot(replicas, [max(row["queue_p99_s"], 1e-3) for row in rows], marker="o", color=color, label=way)
    axes[2].set(title="Prompt tokens found", ylim=(0, 1))
    axes[3].set(title="Queue, p99", ylabel="s", yscale="log")
    for one in axes:
        one.set(xscale="log", xlabel="replicas")
    for one in (axes[0], axes[2], axes[3]):
        one.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[8, 64, 1000])
    parser.add_argument("--requests", type=int, default=2000, help="of each number of replicas")
    parser.add_argument("--load", type=float, default=0.5)
    parser.add_argument("--json", action="store_true", help="a line a result, and one about the run")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    options = parser.parse_args()
    check_plot(options.plot)
    results = [result for replicas in options.replicas for result in measure(replicas, options.requests, options.load)]
    settings = {"requests": options.requests, "load": options.load}
    if options.plot:
        draw(results, options.plot, f"{options.requests:,} requests, load {options.load}")
    if options.json:
        closing = {"benchmark": "router", "settings": settings, "machine": machine(), "versions": versions()}
        for line in (*results, closing):
            print(json.dumps(line))
        return
    for made in tables(results, f"{options.requests:,} requests, load {options.load}"):
        Console().print(made)


def tables(results: Sequence[dict[str, Any]], title: str) -> list[Table]:
    found = [
        [
            *(str(result["replicas"]), result["way"], f"{result['hit_rate']:.3f}", f"{result['hit_over_optimum']:.2f}"),
            *(f"{result['queue_p50_s']:.2f} s", f"{result['queue_p99_s']:.2f} s"),
            f"{result['most_over_mean']:.2f}" if "most_over_mean" in result else "-",
        ]
        for result in results
    ]
    costs = [
        [
            *(str(result["replicas"]), *(f"{result[f'decision_p{part}_us']:.0f} µs" for part in (50, 90, 99))),
            *(f"{result['held_blocks']:,}", f"{result['index_bytes'] / 2**20:.1f} MiB"),
            f"{result['bytes_per_held_block']:.0f}",
        ]
        for result in results
        if result["way"] == "router"
    ]
    columns = ("replicas", "way", "tokens found", "of optimum", "queue p50", "p99", "most / mean")
    cost_columns = ("replicas", "decision p50", "p90", "p99", "blocks held", "index", "bytes / block")
    caption = "most / mean: tokens that the busiest replica computed, over the mean"
    return [
        table(f"routing, {title}", columns, found, caption),
        table("what the router costs, processor time", cost_columns, costs),
    ]


if __name__ == "__main__":
    main()
