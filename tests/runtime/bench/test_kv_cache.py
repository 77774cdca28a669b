"""What a KV cache saves: the arithmetic of the table, and the same tokens either way."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from tqdm import tqdm

from headwise.runtime import LLM
from headwise.runtime.bench.kv_cache import OutputsDifferError, costs, with_cache, without_cache, write_tiny
from headwise.workers.model.checkpoint import verify_checkpoint
from headwise.workers.model.model_config import load_model_config


def test_both_ways_give_the_same_tokens(llm: LLM) -> None:
    bar = tqdm(file=io.StringIO())
    tokens, cached = with_cache(llm, [7, 8, 9], 6, bar)
    plain = without_cache(llm, [7, 8, 9], tokens, bar)
    assert len(tokens) == len(cached) == len(plain) == 6 and bar.n == 12 and min(*cached, *plain) > 0


def test_other_tokens_are_an_error_that_names_the_first(llm: LLM) -> None:
    bar = tqdm(file=io.StringIO())
    tokens, _ = with_cache(llm, [7, 8, 9], 4, bar)
    wrong = [*tokens[:2], (tokens[2] + 1) % 256, tokens[3]]
    with pytest.raises(OutputsDifferError, match=f"token 2 is {wrong[2]} with a KV cache and {tokens[2]} without"):
        without_cache(llm, [7, 8, 9], wrong, bar)


def test_costs_at_powers_of_two_and_the_last() -> None:
    found = costs([0.001] * 6, [0.001, 0.002, 0.003, 0.004, 0.005, 0.006])
    assert [row["n"] for row in found] == [1, 2, 4, 6]
    assert [row["cached_token_ms"] for row in found] == [1, 1, 1, 1]
    assert [row["uncached_token_ms"] for row in found] == [1, 2, 3.5, 5]
    assert [row["uncached_total_s"] for row in found] == pytest.approx([0.001, 0.003, 0.01, 0.021])
    assert [row["times"] for row in found] == [1, 1.5, 2.5, 3.5]
    assert [row["n"] for row in costs([1.0] * 8, [1.0] * 8)] == [1, 2, 4, 8]


def test_the_tiny_model_can_be_loaded(tmp_path: Path) -> None:
    config = load_model_config(write_tiny(tmp_path))
    verify_checkpoint(tmp_path, config)
    assert config.max_position_embeddings >= 1024
