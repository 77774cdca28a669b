"""``headwise bench prefix``: what the prefix cache saves where it hits, and what it costs where it does not."""

from __future__ import annotations

import gc
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.table import Table
from tqdm import tqdm

from headwise.runtime.bench import figures, report
from headwise.runtime.bench.kv_cache import model_directory
from headwise.runtime.bench.workload import greedy, prompts
from headwise.runtime.config import engine_config
from headwise.runtime.engine.block_tables import BlockTables
from headwise.runtime.engine.request import Request
from headwise.runtime.kv.blocks import BlockPool
from headwise.runtime.kv.events import KvEvents
from headwise.runtime.kv.identity import TokenBlocks
from headwise.runtime.kv.prefix_cache import PrefixCache
from headwise.runtime.llm import LLM
from headwise.runtime.output import RequestOutput
from headwise.runtime.sampling_params import SamplingParams
from headwise.workers.errors import HeadwiseError, InvalidValueError
from headwise.workers.kv.sizes import parse_memory
from headwise.workers.model.model_config import load_model_config
from headwise.workers.plan import RowSampling

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the prompt that is in the cache, in whole blocks; the last block of a prompt is always computed."""
COST_PROMPT_TOKENS, COST_TOKENS = 42, 64
"""Of the requests that find nothing in the cache: those of ``bench throughput``."""
MANAGER_TOKENS = 100_000


class UnexpectedHitError(HeadwiseError):
    """A request did not find in the prefix cache what was put there for it, or found more."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent.

    Attributes:
        prompt_tokens: of the prompt whose time to first token is measured.
        repeats: readings of each case, each of a prompt of its own; reported: the median.
        host: what host memory may hold, such as ``1GiB``; None measures no restore.
        batch, pairs: prompts at once where nothing hits, and how often they run with the cache and without.
    """

    prompt_tokens: int
    repeats: int
    host: str | None
    batch: int
    pairs: int


@dataclass(frozen=True, slots=True)
class Restores:
    """Seconds to the first token of the same prompts, restored from host memory and computed.

    Attributes:
        tokens: that are restored, where they are.
        restored: of those the engine restored; it computes them where it expects that to be faster.
    """

    tokens: int
    restored: list[float]
    computed: list[float]


@dataclass(frozen=True, slots=True)
class MissRun:
    """A batch of prompts of which the cache holds nothing.

    Attributes:
        seconds: wall time, of the engine's own work (all but waiting for its shards) ``engine_s``.
    """

    seconds: float
    engine_s: float


@dataclass(frozen=True, slots=True)
class MissCosts:
    """Runs of the same batch in pairs: with the cache, without."""

    pairs: list[tuple[MissRun, MissRun]]

    @property
    def ratio(self) -> float:
        """Throughput with the cache over that without, of the pair in the middle."""
        return median(off.seconds / on.seconds for on, off in self.pairs)

    @property
    def engine_share(self) -> float:
        """What the cache adds to the engine's own work, as a share of a run."""
        return median((on.engine_s - off.engine_s) / off.seconds for on, off in self.pairs)


def run(model: str, load: Load, settings: dict[str, Any], *, as_json: bool, plot: Path | None) -> None:
    """Measures and prints.

    Args:
        model: any, or ``tiny``.

    Raises:
        UnexpectedHitError: the cache held something else than it should.
    """
    figures.check_plot(plot)
    with ExitStack() as stack:
        path = stack.enter_context(model_directory(model))
        block_size = engine_config(model=str(path), **settings).block_size
        _check_host(load.host)
        hits = hit_lengths(load.prompt_tokens, block_size)
        vocab_size = load_model_config(path).vocab_size
        total = load.repeats * (len(hits) + (load.host is not None)) + 2 * load.pairs
        bar = stack.enter_context(tqdm(total=total, desc="measuring", unit="reading", file=sys.stderr))
        sized: dict[str, Any] = settings | {"max_model_len": load.prompt_tokens + 1}
        rows = prompts(load.repeats * len(hits) + 1, load.prompt_tokens, vocab_size)
        with LLM(path, **sized) as llm:
            seconds = measure_hits(llm, rows, hits, bar)
        restores = misses = None
        if load.host is not None:
            rows = prompts(2 * load.repeats + 2, load.prompt_tokens, vocab_size)
            few: dict[str, Any] = {
                "num_blocks": -(-(load.prompt_tokens + 1) // block_size),
                "host_kv_memory": load.host,
            }
            with LLM(path, **sized, **few) as llm:
                restores = measure_restore(llm, rows, hits[-1], bar)
        if load.pairs:
            rows = prompts(load.batch * (load.pairs + 2), COST_PROMPT_TOKENS, vocab_size)
            misses = measure_misses(path, settings, rows, load.batch, bar)
    manager = manager_cost(block_size=block_size)
    _emit(model, load, settings, seconds, restores, misses, manager, as_json)
    if plot is not None:
        _draw(model, load, seconds, restores).savefig(plot)


def hit_lengths(prompt_tokens: int, block_size: int) -> list[int]:
    """How much of a prompt is found: nothing, so many whole blocks as come to each share of it, and all it can be.

    Raises:
        InvalidValueError: the prompt is not longer than a block.
    """
    longest = (prompt_tokens - 1) // block_size * block_size
    if not longest:
        raise InvalidValueError("--prompt-tokens", prompt_tokens, f"must be more than a block of {block_size}")
    found = {min(longest, int(share * prompt_tokens) // block_size * block_size) for share in SHARES}
    return sorted(found)


def measure_hits(llm: LLM, rows: Sequence[list[int]], hits: Sequence[int], bar: tqdm[Any]) -> dict[int, list[float]]:
    """Seconds to the first token by hit length, lengths by turns. A prompt for each, and one that warms up.

    Raises:
        UnexpectedHitError: another length was found.
    """
    warm_up, *measured = rows
    llm.generate([warm_up], greedy(1), use_tqdm=False)
    seconds: dict[int, list[float]] = {hit: [] for hit in hits}
    for index, prompt in enumerate(measured):
        hit = hits[index % len(hits)]
        llm.reset_prefix_cache()
        if hit:
            _first_token(llm, prompt[:hit])
            llm.stats()  # waits until the engine is as idle as it is for a prompt of which nothing is there
        output = _first_token(llm, prompt)
        _expect(output, hit)
        seconds[hit].append(output.metrics.time_to_first_token)
        bar.update()
    return seconds


def measure_restore(llm: LLM, rows: Sequence[list[int]], hit: int, bar: tqdm[Any]) -> Restores:
    """Computes a prompt, and another that takes all the device's memory, and then the first again. Two prompts a
    reading; the first two warm up, and tell the engine what restoring and computing take.

    Args:
        hit: tokens that can be restored.

    Raises:
        UnexpectedHitError: something was on the device, or only a part was restored.
    """
    restores = Restores(hit, [], [])
    for index in range(0, len(rows), 2):
        prompt, other = rows[index : index + 2]
        llm.reset_prefix_cache()
        first = _first_token(llm, prompt)
        _expect(first, 0)
        _expect(_first_token(llm, other), 0)
        llm.stats()
        again = _first_token(llm, prompt)
        restored = again.metrics.num_restored_tokens
        if restored != again.num_cached_tokens:
            found = again.num_cached_tokens - restored
            raise UnexpectedHitError(f"{found} tokens were still on the device, which another prompt should have taken")
        if restored:
            _expect(again, hit)
        if index:
            restores.computed.append(first.metrics.time_to_first_token)
            if restored:
                restores.restored.append(again.metrics.time_to_first_token)
            bar.update()
    return restores


def measure_misses(
    path: Path, settings: dict[str, Any], rows: Sequence[list[int]], batch: int, bar: tqdm[Any]
) -> MissCosts:
    """Runs batches of prompts that share nothing, each with the cache and without. The first batch warms up each
    engine, and the second both of them.

    What is measured minutes apart may differ by more than the cache costs, so the two take turns, and in who is first.
    In this process both engines are there all the time, since one that idles sleeps; with Ray, where one would hold
    the cores that the other asks for, an engine is started for every run.

    Raises:
        UnexpectedHitError: something was found in the cache.
    """
    warm_up, *measured = [list(rows[at : at + batch]) for at in range(0, len(rows), batch)]
    costs = MissCosts([])
    with ExitStack() as stack:
        kept = {}
        if settings["executor"] == "local":
            kept = {on: stack.enter_context(_engine(path, settings, on, warm_up)) for on in (True, False)}
        for index, rows_of_pair in enumerate(measured):  # of which the first pair does not count
            runs = {}
            for on in (True, False) if index % 2 else (False, True):
                with nullcontext(kept[on]) if kept else _engine(path, settings, on, warm_up) as llm:
                    runs[on] = _run_batch(llm, rows_of_pair)
                bar.update(index > 0)
            if index:
                costs.pairs.append((runs[True], runs[False]))
    return costs


def manager_cost(tokens: int = MANAGER_TOKENS, block_size: int = 16, repeats: int = 3) -> dict[str, float]:
    """Microseconds a token that the cache itself takes for one long prompt, no model involved; the best of each part.

    Returns:
        By part: ``digests`` of the prompt's blocks; ``match`` of a prompt that is not there; ``insert`` of its blocks;
        ``hit``, the match of one that is there; ``release`` of its blocks.
    """
    seconds: dict[str, list[float]] = {}
    rng = random.Random(0)
    for _ in range(repeats):
        pool = BlockPool(tokens // block_size + 2)
        tables = BlockTables(PrefixCache(pool, block_size, events=KvEvents(0)))
        prompt = [rng.randrange(1 << 17) for _ in range(tokens)]
        for again in (False, True):
            gc.collect()
            clock = [time.perf_counter()]
            request = Request("0", prompt, SamplingParams(), RowSampling(), 1)
            request.token_blocks = TokenBlocks(bytes(32), block_size, prompt)
            clock.append(time.perf_counter())
            tables.admit(request, 0)
            clock.append(time.perf_counter())
            tables.publish(request, tokens)
            clock.append(time.perf_counter())
            tables.leave(request)
            clock.append(time.perf_counter())
            took = [after - before for before, after in pairwise(clock)]
            for name, part in zip(("", "hit", "", "") if again else _PARTS, took, strict=True):
                seconds.setdefault(name, []).append(part)
    return {name: 1e6 * min(seconds[name]) / tokens for name in (*_PARTS, "hit")}


_PARTS = ("digests", "match", "insert", "release")


def _check_host(host: str | None) -> None:
    """
    Raises:
        InvalidValueError: it is no size.
    """
    try:
        if host is not None:
            parse_memory(host, 0)
    except InvalidValueError:
        raise InvalidValueError("--host", host, 'must be a size such as "1GiB", or none') from None


@contextmanager
def _engine(path: Path, settings: dict[str, Any], caching: bool, warm_up: list[list[int]]) -> Iterator[LLM]:
    about = {"max_model_len": COST_PROMPT_TOKENS + COST_TOKENS, "enable_prefix_caching": caching}
    with LLM(path, **settings | about) as llm:
        llm.generate(warm_up, greedy(COST_TOKENS), use_tqdm=False)
        yield llm


def _run_batch(llm: LLM, rows: list[list[int]]) -> MissRun:
    before, started = llm.stats()["engine_seconds"], time.perf_counter()
    outputs = llm.generate(rows, greedy(COST_TOKENS), use_tqdm=False)
    seconds, after = time.perf_counter() - started, llm.stats()["engine_seconds"]
    for output in outputs:
        _expect(output, 0)
    return MissRun(seconds, sum(after[part] - before[part] for part in after if part != "collect"))


def _first_token(llm: LLM, prompt: list[int]) -> RequestOutput:
    [output] = llm.generate([prompt], greedy(1), use_tqdm=False)
    return output


def _expect(output: RequestOutput, hit: int) -> None:
    found = output.num_cached_tokens
    if found != hit:
        raise UnexpectedHitError(
            f"{found} tokens of {len(output.prompt_token_ids)} were found in the prefix cache where {hit} should be; "
            "if it is less, raise --kv-memory or --host, or lower --prompt-tokens"
        )


def _emit(
    model: str,
    load: Load,
    settings: dict[str, Any],
    hits: dict[int, list[float]],
    restores: Restores | None,
    misses: MissCosts | None,
    manager: dict[str, float],
    as_json: bool,
) -> None:
    found = [_found("device", hit, seconds, hits[0]) for hit, seconds in hits.items()]
    summary: dict[str, Any] = {"ttft_times": found[-1]["times"]}
    if restores is not None:
        found.append(_found("host", restores.tokens, restores.restored, restores.computed))
        computed = median(restores.computed)
        summary |= {"restore_s": found[-1]["ttft_s"], "recompute_s": round(computed, 5)}
    results, tables = list(found), [_hit_table(load, found)]
    if misses is not None:
        results.append(_missed(misses, load.batch))
        tables.append(_miss_table(results[-1]))
        summary["miss_ratio"] = results[-1]["ratio"]
    parts = {part: round(us, 4) for part, us in manager.items()}
    summary["manager_us_per_token"] = round(sum(manager[part] for part in ("digests", "match", "insert")), 4)
    results.append({"case": "manager", "tokens": MANAGER_TOKENS, "us_per_token": parts})
    tables.append(_manager_table(parts, summary["manager_us_per_token"]))
    about = settings | asdict(load)
    report.emit("prefix", model, about, results, tables, as_json=as_json, **summary)


def _found(where: str, hit: int, seconds: Sequence[float], cold: Sequence[float]) -> dict[str, Any]:
    """``ttft_s`` and ``times`` are None where the engine never restored, but computed."""
    ttft = median(seconds) if seconds else None
    return {
        "case": where,
        "hit_tokens": hit,
        "ttft_s": round(ttft, 5) if ttft else None,
        "times": round(median(cold) / ttft, 2) if ttft else None,
        "readings_s": [round(one, 5) for one in seconds],
    }


def _missed(misses: MissCosts, batch: int) -> dict[str, Any]:
    with_cache, without = zip(*misses.pairs, strict=True)
    rates = {
        name: round(batch * COST_TOKENS / median(run.seconds for run in runs), 2)
        for name, runs in (("tok_s_with", with_cache), ("tok_s_without", without))
    }
    ratios = [round(off.seconds / on.seconds, 4) for on, off in misses.pairs]
    shares = {"ratio": round(misses.ratio, 4), "ratios": ratios, "engine_share": round(misses.engine_share, 5)}
    return {"case": "no hits", "batch": batch, **rates, **shares}


def _hit_table(load: Load, found: Sequence[dict[str, Any]]) -> Table:
    cells = []
    for row in found:
        place = "nothing" if not row["hit_tokens"] else f"on the {row['case']}".replace("on the host", "in host memory")
        ms, times = (f"{row['ttft_s'] * 1e3:.1f}", f"{row['times']:.1f}") if row["times"] else ("computed", "-")
        share = report.percent(row["hit_tokens"] / load.prompt_tokens)
        cells.append([place, str(row["hit_tokens"]), share, ms, times])
    title = f"time to first token of {load.prompt_tokens} prompt tokens, the median of {load.repeats}"
    caption = None
    if found[-1]["case"] == "host":
        caption = "in host memory: another prompt had taken the device's memory; times: of computing it in that engine"
    return report.table(title, ("found", "tokens", "share", "ms", "times faster"), cells, caption)


def _miss_table(row: dict[str, Any]) -> Table:
    cells = [
        f"{row['batch']} x {COST_PROMPT_TOKENS} + {COST_TOKENS}",
        f"{row['tok_s_with']:.1f}",
        f"{row['tok_s_without']:.1f}",
        f"{row['ratio']:.3f}",
        f"{min(row['ratios']):.3f}-{max(row['ratios']):.3f}",
        f"{row['engine_share']:.2%}",
    ]
    columns = ("prompts x tokens", "with cache", "without", "ratio", "of pairs", "added engine work")
    caption = "ratio: of the pair in the middle; added engine work: what the cache adds to the engine's, of a run"
    return report.table("generated tokens a second where nothing is found", columns, [cells], caption)


def _manager_table(parts: dict[str, float], total: float) -> Table:
    caption = "hit: the match of a prompt that is there"
    cells = [f"{MANAGER_TOKENS:,}", *(f"{us:.3f}" for us in parts.values()), f"{total:.3f}"]
    columns = ("prompt tokens", *parts, "digests + match + insert")
    return report.table("the cache alone, microseconds a token", columns, [cells], caption)


def _draw(model: str, load: Load, hits: dict[int, list[float]], restores: Restores | None) -> Figure:
    subtitle = f"{model}, {load.prompt_tokens} prompt tokens"
    figure, [axes] = figures.new_figure("Time to first token by tokens found in the cache", subtitle, 1)
    ms = {hit: [s * 1e3 for s in seconds] for hit, seconds in hits.items()}
    middle = {hit: median(values) for hit, values in ms.items()}
    cold = middle[0]
    label = f"nothing found: {figures.short(cold)} ms"
    axes.axhline(cold, color=figures.BOUND_COLOR, linestyle="--", linewidth=1, label=label)
    axes.plot(
        [*middle], [*middle.values()], color=figures.COLORS[0], label="found on the device, median (times faster)"
    )
    points = [(hit, value) for hit, values in ms.items() for value in values]
    axes.plot(*zip(*points, strict=True), "o", color=figures.COLORS[0], markersize=4, alpha=0.6, label="each reading")
    for hit, value in [*middle.items()][1:]:
        text = f"{figures.short(value)} ({figures.short(cold / value)}x)"
        axes.annotate(text, (hit, value), (7, 1), textcoords="offset points", fontsize=9)
    if restores is not None and restores.restored:
        back = [s * 1e3 for s in restores.restored]
        label = f"restored from host memory: {figures.short(median(back))} ms"
        axes.plot([restores.tokens] * len(back), back, "D", color=figures.COLORS[1], markersize=4, label=label)
    highest = max(value for _, value in points)
    axes.set(xlabel="prompt tokens found", ylabel="milliseconds to the first token", ylim=(0, 1.05 * highest))
    axes.set_xlim(-0.03 * load.prompt_tokens, 1.26 * load.prompt_tokens)
    axes.set_xticks([*ms])
    axes.legend(loc="lower left", fontsize=8)
    return figure
