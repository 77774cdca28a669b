"""The benchmark of handoffs: bytes between processes, first tokens in pairs, transfers beside streams."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tqdm import tqdm

from headwise.runtime import LLM
from headwise.runtime.bench.handoff_bytes import WAYS, Shape, measure, rates
from headwise.runtime.bench.handoff_engine import Beside, FirstTokens, NotHandedOverError, beside_streams, first_tokens
from headwise.runtime.bench.workload import UnsteadyError, prompts

PROMPT_TOKENS = 48


@pytest.fixture(scope="module")
def llm(checkpoint: Callable[..., Path]) -> Iterator[LLM]:
    """Hands over prompts of 48 tokens, and computes shorter ones."""
    model, settings = checkpoint("gqa", max_position_embeddings=4096), {"kv_memory": "16MiB", "cpus_per_rank": 1.0}
    handing = {"prefill": {}, "handoff_min_tokens": PROMPT_TOKENS, "handoff_shared_memory": False}
    with LLM(model, executor="local", quiet=True, **settings, **handing) as made:
        yield made


@pytest.fixture
def bar() -> Iterator[tqdm]:
    with tqdm(file=sys.stderr) as made:
        yield made


@pytest.mark.thorough
def test_every_way_carries_all_bytes(bar: tqdm) -> None:
    num_bytes, seconds = measure(Shape(tokens=64, layers=2, kv_heads=3, head_dim=8), 2, bar)
    assert num_bytes == 64 * 2 * 2 * 3 * 8 * 4
    assert [len(seconds[way]) for way in WAYS] == [2, 2, 2] and bar.n == 6
    assert all(rate > 0 for rate in rates(num_bytes, seconds).values())


def test_one_prompt_of_each_pair_is_handed_over(llm: LLM, bar: tqdm) -> None:
    before = llm.stats()["handoff"]
    found = first_tokens(llm, prompts(6, PROMPT_TOKENS, 256), bar)
    after = llm.stats()["handoff"]
    assert after["committed"] - before["committed"] == 3 and after["tokens"] - before["tokens"] == 3 * 32
    assert len(found.handed) == len(found.here) == 2 and min(*found.handed, *found.here) > 0
    assert found.handoff > found.push >= found.hidden >= 0 and bar.n == 4


def test_prompts_that_the_engine_computes_itself_are_an_error(llm: LLM, bar: tqdm) -> None:
    with pytest.raises(NotHandedOverError, match="of 1 handoffs"):
        first_tokens(llm, prompts(4, PROMPT_TOKENS - 1, 256), bar)


def test_transfers_run_beside_streams(llm: LLM, bar: tqdm) -> None:
    before = llm.stats()["handoff"]
    decoding, [prompt] = prompts(2, 20, 256), prompts(1, PROMPT_TOKENS, 256)
    found = beside_streams(llm, decoding, prompt, 0.0, 2, 0.05, bar)
    after = llm.stats()["handoff"]
    assert len(found.tok_s) == len(found.quiet_tok_s) == 2 and min(*found.tok_s, *found.quiet_tok_s) > 0
    assert after["committed"] - before["committed"] >= 3 and found.gb_per_s > 0
    assert llm.stats()["num_running"] == 0 and after["reserved_blocks"] == 0
    paced = beside_streams(llm, decoding, prompt, 0.1, 1, 0.05, bar)
    assert paced.transfers_per_s == pytest.approx(10, rel=0.3), "one a period, and a window is a period"


def test_streams_that_end_are_an_error(llm: LLM, bar: tqdm) -> None:
    with pytest.raises(UnsteadyError, match="--max-model-len"):
        beside_streams(llm, prompts(1, 4090, 256), prompts(1, PROMPT_TOKENS, 256)[0], 0.0, 1, 0.5, bar)
    assert llm.stats()["num_running"] == 0


def test_ratios_are_of_pairs() -> None:
    assert FirstTokens([2.0, 3.0, 9.0], [1.0, 3.0, 3.0], 0.0, 0.0, 0.0).ratio == 2.0
    assert Beside([9.0, 5.0, 4.0], [10.0, 10.0, 5.0], 0.0, 0.0).ratio == 0.8
