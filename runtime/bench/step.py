"""``headwise bench step``: where the time of a step goes, on the engine and on its shards, against the bound."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from tqdm import tqdm

from headwise.runtime.bench import figures, report
from headwise.runtime.bench.bounds import bounds_of_run, chunks
from headwise.runtime.bench.workload import UnsteadyError, greedy, prompts, steady_rows
from headwise.runtime.config import engine_config
from headwise.runtime.heap import frozen_heap
from headwise.runtime.llm import LLM
from headwise.runtime.models import resolve
from headwise.workers.model.model_config import load_model_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Stats = Mapping[str, Any]
WARM_UP_STEPS = 4


@dataclass(frozen=True, slots=True)
class Sample:
    """What one step took, or all steps of one prompt; everything in seconds.

    Attributes:
        seconds: wall time.
        tokens: computed by it.
        steps: how many the parts were read over.
        engine: by part of the engine's loop; ``collect`` waits for the shards.
        engine_cpu: processor time of the engine's thread.
        shard: by part of the shard's step, the mean of the ranks.
    """

    seconds: float
    tokens: int
    steps: int
    engine: dict[str, float]
    engine_cpu: float
    shard: dict[str, float]


def run(
    model: str,
    batches: Sequence[int],
    context: int,
    steps: int,
    prompt_tokens: int,
    repeats: int,
    settings: dict[str, Any],
    *,
    bound: bool,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Measures steady decode steps of each batch, and the prefill of one prompt; prints the median of ``repeats``.

    Args:
        context: tokens of each decoding row's prompt.
        steps: decode steps of one reading.
        prompt_tokens: of the prompt whose prefill is measured.
    """
    figures.check_plot(plot)
    settings = {"max_num_seqs": max(128, *batches)} | settings
    budget = engine_config(model=model, **settings).max_num_batched_tokens
    config = load_model_config(resolve(model))
    cases = {f"decode {batch}": [(batch, batch)] for batch in batches}
    cases[f"prefill {prompt_tokens}"] = chunks(prompt_tokens, budget)
    bounds = bounds_of_run(config, settings, [one for case in cases.values() for one in case]) if bound else {}
    rows = iter(prompts(sum(batches) + repeats + 1, max(context, prompt_tokens), config.vocab_size))
    samples: dict[str, Sample] = {}
    with (
        LLM(model, **settings) as llm,
        frozen_heap(),  # as a server has it
        tqdm(total=len(cases) * repeats, desc="measuring", unit="reading", file=sys.stderr) as bar,
    ):
        for batch in batches:
            decoding = [row[:context] for row in islice(rows, batch)]
            samples[f"decode {batch}"] = _median(measure_decode(llm, decoding, steps, repeats, bar))
        prefilled = [row[:prompt_tokens] for row in rows]
        samples[f"prefill {prompt_tokens}"] = _median(measure_prefill(llm, prefilled, bar))
    limits = {name: sum(bounds[case].seconds for case in cases[name]) for name in cases if bounds}
    reached = {name: round(limit / samples[name].seconds, 3) for name, limit in limits.items()}
    report.emit(
        "step",
        model,
        settings | {"context": context, "steps": steps, "repeats": repeats},
        [_result(name, sample, limits.get(name)) for name, sample in samples.items()],
        [_summary(samples, limits), _parts(samples)],
        as_json=as_json,
        fraction_of_bound=reached or None,
    )
    if plot is not None:
        _draw(samples, limits).savefig(plot)


def measure_decode(llm: LLM, rows: list[list[int]], steps: int, repeats: int, bar: tqdm[Any]) -> list[Sample]:
    """Readings of steps in which every row decodes, and nothing else happens.

    Raises:
        UnsteadyError: the model's length or the KV memory was too short.
    """
    samples = []
    with steady_rows(llm, rows) as streams:
        *_, last = streams  # a token of one row is a step of all
        _advance(last, WARM_UP_STEPS)
        before, started = llm.stats(), time.perf_counter()
        for _ in range(repeats):
            _advance(last, steps)
            after, ended = llm.stats(), time.perf_counter()
            # Tokens of steps before the reading may have waited in the stream, and were counted above.
            while after["num_steps"] - before["num_steps"] < steps and _advance(last, 1):
                after, ended = llm.stats(), time.perf_counter()
            samples.append(_decode_sample(before, after, ended - started, len(rows), steps))
            before, started = after, ended
            bar.update()
    return samples


def measure_prefill(llm: LLM, rows: list[list[int]], bar: tqdm[Any]) -> list[Sample]:
    """A reading of each prompt but the first, which warms up: all its chunks, up to its first token."""
    samples = []
    for index, prompt in enumerate(rows):
        before, started = llm.stats(), time.perf_counter()
        llm.generate([prompt], greedy(1), use_tqdm=False)
        seconds, after = time.perf_counter() - started, llm.stats()
        if index:
            samples.append(split(before, after, seconds, len(prompt), per_step=False))
            bar.update()
    return samples


def split(before: Stats, after: Stats, seconds: float, tokens: int, *, per_step: bool) -> Sample:
    """What happened between two readings of ``LLM.stats``. ``per_step``: divided by the steps in between."""
    steps = after["num_steps"] - before["num_steps"]
    parts = steps if per_step else 1
    shards = [_subtract(a["seconds"], b["seconds"]) for a, b in zip(after["shards"], before["shards"], strict=True)]
    return Sample(
        seconds / parts,
        tokens,
        steps,
        {name: s / parts for name, s in _subtract(after["engine_seconds"], before["engine_seconds"]).items()},
        (after["engine_cpu_seconds"] - before["engine_cpu_seconds"]) / parts,
        {name: sum(shard[name] for shard in shards) / len(shards) / parts for name in shards[0]},
    )


def _decode_sample(before: Stats, after: Stats, seconds: float, batch: int, steps: int) -> Sample:
    sample = split(before, after, seconds, batch, per_step=True)
    generated = after["num_generated_tokens"] - before["num_generated_tokens"]
    if sample.steps < steps or generated != batch * sample.steps:
        raise UnsteadyError(
            f"{batch} rows gave {generated} tokens in {sample.steps} steps of {steps} asked for: rows ended, or were "
            "preempted; raise --max-model-len or --kv-memory, or ask for fewer --steps or --repeats"
        )
    return sample


def _subtract(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    return {name: seconds - before.get(name, 0.0) for name, seconds in after.items()}


def _advance(stream: Any, tokens: int) -> int:
    """Takes so many increments; returns how many there were."""
    return sum(1 for _ in islice(stream, tokens))


def _median(samples: Sequence[Sample]) -> Sample:
    """The reading in the middle; of an even number the slower one."""
    return sorted(samples, key=lambda sample: sample.seconds)[len(samples) // 2]


def _result(name: str, sample: Sample, limit: float | None) -> dict[str, Any]:
    result: dict[str, Any] = {
        "case": name,
        "tokens": sample.tokens,
        "steps": sample.steps,
        "ms": _ms(sample.seconds),
        "tok_s": round(sample.tokens / sample.seconds, 1),
        "engine_cpu_ms": _ms(sample.engine_cpu),
        "engine_ms": {part: _ms(seconds) for part, seconds in sample.engine.items()},
        "shard_ms": {part: _ms(seconds) for part, seconds in sample.shard.items()},
    }
    return result | ({"bound_ms": _ms(limit)} if limit is not None else {})


def _summary(samples: Mapping[str, Sample], limits: Mapping[str, float]) -> Table:
    cells = []
    for name, sample in samples.items():
        limit = limits.get(name)
        bound = f"{limit * 1e3:.1f}" if limit else "-"
        reached = report.percent(limit / sample.seconds if limit else None)
        rate, cpu = sample.tokens / sample.seconds, sample.engine_cpu * 1e3
        cells.append([name, f"{sample.seconds * 1e3:.2f}", bound, reached, f"{rate:.1f}", f"{cpu:.2f}"])
    return report.table(
        "a decode step of so many rows, and one prompt",
        ("case", "ms", "bound ms", "reached", "tokens/s", "engine CPU ms"),
        cells,
    )


def _parts(samples: Mapping[str, Sample]) -> Table:
    """A row for each part, a column for each case."""
    columns = [
        {("engine", part): seconds for part, seconds in sample.engine.items()}
        | {("shard", part): seconds for part, seconds in sample.shard.items()}
        for sample in samples.values()
    ]
    parts = dict.fromkeys(part for column in columns for part in column)
    rows = [
        [f"{where}: {part}", *(f"{column.get((where, part), 0.0) * 1e3:.2f}" for column in columns)]
        for where, part in parts
    ]
    return report.table(
        "milliseconds by part; collect waits for the shards, whose mean this is", ("part", *samples), rows
    )


def _draw(samples: Mapping[str, Sample], limits: Mapping[str, float]) -> Figure:
    """A panel a case, each with a scale of its own: the engine's wall time beside the shards'."""
    from matplotlib.patches import Patch

    subtitle = "the engine's collect waits for the shards; prefill: all chunks of one prompt"
    figure, panels = figures.new_figure("Time of a step by part", subtitle, len(samples))
    bars = {name: [_fold(sample.engine), _fold(sample.shard)] for name, sample in samples.items()}
    shown = dict.fromkeys(part for pair in bars.values() for parts in pair for part in parts)
    fills = figures.fills_of(shown)
    for axes, (name, sample) in zip(panels, samples.items(), strict=True):
        for x, parts in enumerate(bars[name]):
            figures.stacked_bar(axes, x, {part: seconds * 1e3 for part, seconds in parts.items()}, fills)
        if name in limits:
            axes.axhline(limits[name] * 1e3, color=figures.BOUND_COLOR, linestyle="--", label="bound of the products")
        axes.set(title=f"{name}: {figures.short(sample.seconds * 1e3)} ms", ylabel="milliseconds", xlim=(-0.6, 1.6))
        axes.set_xticks([0, 1], ["engine", "shards"])
        axes.grid(visible=False, axis="x")
    handles: list[Any] = [Patch(color=fill, label=part) for part, fill in reversed(fills.items())]
    figure.legend(handles=panels[0].get_lines() + handles, loc="outside right center")
    return figure


def _fold(parts: Mapping[str, float]) -> dict[str, float]:
    """The parts that can be seen in a picture, and all others as one."""
    least = 0.01 * sum(parts.values())
    large = {part: s for part, s in parts.items() if s >= least}
    rest = sum(parts.values()) - sum(large.values())
    return large | ({"other": rest} if rest > 0 else {})


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
