"""The oracle of KV policies against transformers, where that computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from headwise.workers.kv.format import kv_format
from headwise.workers.kv.policy import resolve_policy
from tests.checkpoints import reference_model
from tests.policy_oracle import Oracle, assert_logits

TOKENS = torch.randint(3, 256, (90,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.mark.parametrize("shape", ["gqa", "mqa"])
def test_the_dense_policy_is_transformers(checkpoint: Callable[..., Path], shape: str) -> None:
    directory = checkpoint(shape)
    with torch.inference_mode():
        expected_TV = reference_model(directory)(torch.tensor([TOKENS])).logits[0].double()
    assert_logits(Oracle(directory).logits(TOKENS), expected_TV, 2e-5)


def test_a_window_is_that_of_mistral(checkpoint: Callable[..., Path]) -> None:
    directory = checkpoint("gqa")
    llama = reference_model(directory)
    fields = {
        name: value for name, value in llama.config.to_dict().items() if name not in ("model_type", "architectures")
    }
    mistral = MistralForCausalLM(MistralConfig(**fields | {"sliding_window": 20})).eval()
    mistral.load_state_dict(llama.state_dict())
    with torch.inference_mode():
        expected_TV = mistral(torch.tensor([TOKENS])).logits[0].double()
    assert_logits(Oracle(directory).logits(TOKENS, resolve_policy("window:20", 2, 4)), expected_TV, 2e-5)


def test_sinks_move_up_to_the_window(checkpoint: Callable[..., Path]) -> None:
    """One layer, so that a token knows others only by what it attends to: the cache is then a text of its own."""
    oracle = Oracle(checkpoint("gqa", num_hidden_layers=1))
    found_TV = oracle.logits(TOKENS, resolve_policy("sinks:3,17", 1, 4))
    assert_logits(found_TV[60], oracle.logits(TOKENS[:3] + TOKENS[44:61])[-1], 1e-12)
    assert_logits(found_TV[:20], oracle.logits(TOKENS[:20]), 1e-12)


def test_recomputation_starts_over_at_each_position(checkpoint: Callable[..., Path]) -> None:
    oracle = Oracle(checkpoint("gqa"))
    found_TV = oracle.recomputed(TOKENS, 20)
    assert_logits(found_TV[60], oracle.logits(TOKENS[41:61])[-1], 1e-12)
    assert_logits(found_TV[:20], oracle.logits(TOKENS[:20]), 1e-12)


@pytest.mark.parametrize(("name", "most"), [("float16", 0.01), ("bfloat16", 0.05), ("int8", 0.1), ("int8/int4", 0.5)])
def test_narrow_keys_and_values_are_off_by_their_steps(checkpoint: Callable[..., Path], name: str, most: float) -> None:
    oracle = Oracle(checkpoint("gqa"))
    exact_TV, found_TV = oracle.logits(TOKENS), oracle.logits(TOKENS, format=kv_format(name, 16))
    assert 0 < (found_TV - exact_TV).abs().max() / exact_TV.abs().max() < most


def test_greedy_tokens_follow_one_another(checkpoint: Callable[..., Path]) -> None:
    oracle, policy = Oracle(checkpoint("gqa")), resolve_policy("sinks:4,12", 2, 4)
    tokens = oracle.greedy(TOKENS[:30], 6, policy)
    oracle.assert_greedy(TOKENS[:30], tokens, policy, tolerance=0)
    with pytest.raises(AssertionError):
        oracle.assert_greedy(TOKENS[:30], [*tokens[:5], (tokens[5] + 1) % 256], policy)
