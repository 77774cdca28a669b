"""What this machine allows: the time of a step's matrix products alone, with the fastest product there is.

A step of T tokens multiplies T rows by every weight of every layer, and the rows whose logits are wanted by the output
head. At one row that is reading all weights once (memory bandwidth); at many it is arithmetic. No engine can be faster
with these products, so benchmarks print what they reach of it.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from headwise.runtime.bench.products import Factory, products
from headwise.runtime.precision import resolve_dtype
from headwise.workers.errors import HeadwiseError
from headwise.workers.machine import usable_cores
from headwise.workers.model.model_config import ModelConfig

Case = tuple[int, int]
"""A step as (rows, rows whose logits are wanted)."""

REPEATS = 5


@dataclass(frozen=True, slots=True)
class StepBound:
    """The products of one step.

    Attributes:
        rows, logit_rows: the step.
        nbytes: of the weights read, float32.
        flops: multiplications and additions.
        product: the fastest.
        seconds: its fastest run, which is the bound.
        median_seconds: its median run.
        seconds_by_product: the fastest run of each.
    """

    rows: int
    logit_rows: int
    nbytes: int
    flops: int
    product: str
    seconds: float
    median_seconds: float
    seconds_by_product: dict[str, float]

    @property
    def gb_per_s(self) -> float:
        """Of weights, were each read once."""
        return self.nbytes / self.seconds / 1e9

    @property
    def gflop_per_s(self) -> float:
        return self.flops / self.seconds / 1e9

    @property
    def tokens_per_s(self) -> float:
        return self.rows / self.seconds


def step_bounds(
    config: ModelConfig,
    cases: Sequence[Case],
    threads: int | None = None,
    repeats: int = REPEATS,
    factories: Mapping[str, Factory] | None = None,
) -> dict[Case, StepBound]:
    """Measures the bound of each step, on random float32 weights of the model's shapes, every layer its own.

    In this process, whose torch then computes with ``threads``: :func:`measure_bounds` leaves it alone.

    Args:
        threads: None is all usable cores. There is one bound of a machine, however many ranks share it.
        repeats: runs after one that warms up.
        factories: of the products to try by name; None is all there are here.
    """
    torch.set_num_threads(threads or usable_cores())
    cases = list(dict.fromkeys(cases))
    factories = products() if factories is None else factories
    runs: dict[Case, dict[str, list[float]]] = {case: {} for case in cases}
    with tqdm(total=len(factories) * len(cases), desc="limits", unit="step", file=sys.stderr) as bar:
        for name, factory in factories.items():
            linears = _Linears(config, factory)
            for case in cases:
                runs[case][name] = linears.time(case, repeats)
                bar.update()
    return {case: _bound(config, case, runs[case]) for case in cases}


def measure_bounds(
    config: ModelConfig, cases: Sequence[Case], threads: int | None = None, repeats: int = REPEATS
) -> dict[Case, StepBound]:
    """:func:`step_bounds` in a process of its own, so that no thread or memory of it is left when the engine computes.

    Raises:
        HeadwiseError: the process died.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(step_bounds, config, cases, threads, repeats).result()
        except BrokenProcessPool as error:
            raise HeadwiseError(
                "the process that measures the limits died; is there memory for the weights?"
            ) from error


def bounds_of_run(config: ModelConfig, settings: Mapping[str, Any], cases: Sequence[Case]) -> dict[Case, StepBound]:
    """The bounds for an engine with these settings; none where it does not compute in float32 on this CPU."""
    cuda = settings["device"] == "cuda" or (settings["device"] == "auto" and torch.cuda.is_available())
    dtype = resolve_dtype(settings["dtype"], "cuda" if cuda else "cpu", config.dtype)
    return {} if cuda or dtype != "float32" else measure_bounds(config, cases)


def chunks(prompt_tokens: int, budget: int, logit_rows: int = 1) -> list[Case]:
    """The steps that compute a prompt, or several with ``logit_rows`` in all: logits come with the last."""
    full, rest = divmod(prompt_tokens, budget)
    sizes = [budget] * full + [rest] * (rest > 0)
    return [(size, 0) for size in sizes[:-1]] + [(sizes[-1], logit_rows)]


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of a layer's products by name, fused as the forward pass fuses them."""
    queries, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "qkv": (queries + 2 * kv, config.hidden_size),
        "o": (config.hidden_size, queries),
        "gate_up": (2 * config.intermediate_size, config.hidden_size),
        "down": (config.hidden_size, config.intermediate_size),
    }


class _Linears:
    """All products of a model, prepared by one factory."""

    def __init__(self, config: ModelConfig, factory: Factory) -> None:
        self._shapes = list(weight_shapes(config).values()) * config.num_layers
        self._shapes.append((config.vocab_size, config.hidden_size))
        self._multiply = factory([torch.rand(shape) for shape in self._shapes])

    @torch.inference_mode()
    def time(self, case: Case, repeats: int) -> list[float]:
        """Seconds of each run of one step, after one that warms up."""
        rows, logit_rows = case
        by_depth = {depth: torch.rand(rows, depth) for _, depth in self._shapes}
        inputs = [by_depth[depth] for _, depth in self._shapes[:-1]]
        inputs += [torch.rand(logit_rows, self._shapes[-1][1])] * (logit_rows > 0)
        seconds = []
        for _ in range(repeats + 1):
            started = time.perf_counter()
            self._multiply(inputs)
            seconds.append(time.perf_counter() - started)
        return seconds[1:]


def _bound(config: ModelConfig, case: Case, runs: Mapping[str, list[float]]) -> StepBound:
    rows, logit_rows = case
    layers = config.num_layers * sum(a * b for a, b in weight_shapes(config).values())
    head = config.vocab_size * config.hidden_size
    fastest = {name: min(seconds) for name, seconds in runs.items()}
    product = min(fastest, key=lambda name: fastest[name])
    return StepBound(
        rows=rows,
        logit_rows=logit_rows,
        nbytes=4 * (layers + head * (logit_rows > 0)),
        flops=2 * (rows * layers + logit_rows * head),
        product=product,
        seconds=fastest[product],
        median_seconds=statistics.median(runs[product]),
        seconds_by_product=fastest,
    )
