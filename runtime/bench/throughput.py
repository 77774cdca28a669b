"""Decode throughput at several batch sizes, on prompts that every engine can be given alike."""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from headwise.runtime.llm import LLM
from headwise.runtime.sampling_params import SamplingParams
from headwise.workers.model_config import load_model_config


def prompts(batch: int, length: int, vocab_size: int) -> list[list[int]]:
    """``batch`` prompts of ``length`` random token ids, the same on every machine, with no shared prefix."""
    rng = random.Random(20260101 + batch)
    return [[rng.randrange(100, vocab_size - 100) for _ in range(length)] for _ in range(batch)]


def run(
    model: str,
    batches: list[int],
    tokens: int,
    prompt_tokens: int,
    repeats: int,
    settings: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    """Measures and prints: a JSON line a batch size, or a table.

    ``tok_s`` counts generated tokens over the best call, prefill included; ``startup_s`` is the time from nothing to
    a loaded engine.
    """
    started = time.perf_counter()
    with LLM(model, **settings) as llm:
        startup_s = time.perf_counter() - started
        vocab_size = load_model_config(llm.model_path).vocab_size
        rows = []
        with tqdm(total=len(batches) * repeats, desc="measuring", unit="run", file=sys.stderr) as bar:
            for batch in batches:
                row = _measure(llm, prompts(batch, prompt_tokens, vocab_size), tokens, repeats, bar)
                rows.append({"engine": "headwise", "batch": batch, **row, "startup_s": round(startup_s, 1)})
    if as_json:
        for row in rows:
            print(json.dumps(row), flush=True)
    else:
        _print_table(rows)


def _measure(llm: LLM, batch: list[list[int]], tokens: int, repeats: int, bar: tqdm[Any]) -> dict[str, Any]:
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    rates = []
    for _ in range(repeats):
        started = time.perf_counter()
        outputs = llm.generate(batch, params, use_tqdm=False)
        rates.append(len(batch) * tokens / (time.perf_counter() - started))
        bar.update()
    return {
        "tok_s": round(max(rates), 2),
        "median_tok_s": round(statistics.median(rates), 2),
        "first_ids": outputs[0].outputs[0].token_ids[:8],
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(title="decode throughput, tokens a second")
    for name in ("batch", "best", "median"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(str(row["batch"]), f"{row['tok_s']:.1f}", f"{row['median_tok_s']:.1f}")
    Console().print(table)
