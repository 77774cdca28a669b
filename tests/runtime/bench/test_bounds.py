"""The machine's bound: what is multiplied, how it is counted, and which reading is taken."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from headwise.runtime.bench import bounds
from headwise.runtime.bench.bounds import bounds_of_run, chunks, step_bounds, weight_shapes
from headwise.runtime.bench.products import Chain, Factory, products
from headwise.workers.model.model_config import ModelConfig, load_model_config
from headwise.workers.model.safetensors_index import read_index


@pytest.fixture
def config(checkpoint: Callable[..., Path]) -> ModelConfig:
    return load_model_config(checkpoint("uneven"))


@pytest.fixture(autouse=True)
def same_threads_after() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", products())
def test_products_multiply(name: str) -> None:
    first_OI, last_OI = torch.randn(56, 83), torch.randn(200, 96)
    multiply = products()[name]([first_OI, last_OI])
    for rows in (1, 7, 64, 300):  # one packing for all of them
        x_TI, z_TI = torch.randn(rows, 83), torch.randn(rows, 96)
        torch.testing.assert_close(multiply([x_TI, z_TI]), z_TI @ last_OI.T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(multiply([x_TI]), x_TI @ first_OI.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_all_weights_of_the_model_are_counted(checkpoint: Callable[..., Path], tied: bool) -> None:
    directory = checkpoint("uneven", tie_word_embeddings=tied)
    config = load_model_config(directory)
    layers = config.num_layers * sum(a * b for a, b in weight_shapes(config).values())
    vocabulary = config.vocab_size * config.hidden_size
    stored = [math.prod(tensor.shape) for tensor in read_index(directory).tensors.values() if len(tensor.shape) == 2]
    assert layers + vocabulary * (1 if tied else 2) == sum(stored)


def test_a_step_multiplies_every_weight_once(config: ModelConfig) -> None:
    weights: list[Tensor] = []
    calls: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def record(given: Sequence[Tensor]) -> Chain:
        weights.extend(given)

        def multiply(inputs: Sequence[Tensor]) -> Tensor:
            calls.extend((tuple(w.shape), tuple(x.shape)) for w, x in zip(given, inputs, strict=False))
            return inputs[-1]

        return multiply

    found = step_bounds(config, [(5, 2), (3, 0), (5, 2)], threads=1, repeats=2, factories={"fake": record})
    shapes = [*weight_shapes(config).values()] * config.num_layers
    head = (config.vocab_size, config.hidden_size)
    assert [tuple(weight.shape) for weight in weights] == [*shapes, head]
    assert len({weight.data_ptr() for weight in weights}) == len(weights)
    with_logits = [(shape, (5, shape[1])) for shape in shapes] + [(head, (2, head[1]))]
    without = [(shape, (3, shape[1])) for shape in shapes]
    assert calls == with_logits * 3 + without * 3
    layers = sum(a * b for a, b in shapes)
    assert found.keys() == {(5, 2), (3, 0)}
    assert found[5, 2].nbytes == 4 * (layers + head[0] * head[1])
    assert found[5, 2].flops == 2 * (5 * layers + 2 * head[0] * head[1])
    assert (found[3, 0].nbytes, found[3, 0].flops) == (4 * layers, 2 * 3 * layers)


def test_the_bound_is_the_fastest_run_of_the_fastest_product(config: ModelConfig) -> None:
    calls = 0

    def slow(weights: Sequence[Tensor]) -> Chain:
        def multiply(inputs: Sequence[Tensor]) -> Tensor:
            nonlocal calls
            calls += 1
            time.sleep(0.01 if calls % 2 else 0.02)
            return inputs[-1]

        return multiply

    fakes: dict[str, Factory] = {"slow": slow, "fast": lambda _: lambda inputs: inputs[-1]}
    bound = step_bounds(config, [(4, 4)], threads=1, repeats=3, factories=fakes)[4, 4]
    assert bound.product == "fast" and bound.seconds == bound.seconds_by_product["fast"]
    assert bound.seconds <= bound.median_seconds < bound.seconds_by_product["slow"]
    assert bound.gb_per_s == pytest.approx(bound.nbytes / bound.seconds / 1e9)
    assert bound.gflop_per_s == pytest.approx(bound.flops / bound.seconds / 1e9)
    assert bound.tokens_per_s == pytest.approx(4 / bound.seconds)


@given(st.integers(1, 5000), st.integers(1, 1100), st.integers(1, 64))
def test_chunks_cover_the_prompt(prompt_tokens: int, budget: int, logit_rows: int) -> None:
    steps = chunks(prompt_tokens, budget, logit_rows)
    assert sum(rows for rows, _ in steps) == prompt_tokens
    assert all(rows == budget for rows, _ in steps[:-1]) and 1 <= steps[-1][0] <= budget
    assert [logits for _, logits in steps] == [0] * (len(steps) - 1) + [logit_rows]


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16", "device": "cpu"}, {"dtype": "auto", "device": "cuda"}])
def test_no_bound_where_the_engine_computes_otherwise(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    monkeypatch.setattr(bounds, "measure_bounds", lambda *_: pytest.fail("measured"))
    assert bounds_of_run(config, settings, [(1, 1)]) == {}


def test_a_checkpoint_of_16_bits_has_the_bound_of_float32_on_a_cpu(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "measure_bounds", lambda *_: {(1, 1): "measured"})
    stored = replace(config, dtype="bfloat16")
    assert bounds_of_run(stored, {"dtype": "auto", "device": "cpu"}, [(1, 1)]) == {(1, 1): "measured"}


@pytest.mark.thorough
def test_the_bound_of_a_run_is_measured_in_another_process(config: ModelConfig) -> None:
    threads = torch.get_num_threads()
    found = bounds_of_run(config, {"dtype": "auto", "device": "cpu"}, [(1, 1), (2, 2)])
    assert found.keys() == {(1, 1), (2, 2)} and all(bound.seconds > 0 for bound in found.values())
    assert torch.get_num_threads() == threads
