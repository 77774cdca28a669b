"""The logits that KV policies and dtypes are compared by, against an oracle; and the blocks they take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from headwise.runtime.bench.scorer import BLOCK_SIZE, CHUNK_TOKENS, ScoredModel, Scorer
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.policy import resolve_policy
from tests.policy_oracle import Oracle, assert_logits

TOKENS = torch.randint(3, 256, (700,), generator=torch.Generator().manual_seed(1)).tolist()
POLICIES = ["dense", "window:20", "sinks:4,30", "window:300", "sinks:20,40@0;dense@1", "sinks:4,30@0.1,1;window:9"]


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path]) -> ScoredModel:
    return ScoredModel(checkpoint("gqa", max_position_embeddings=1024), threads=1)


@pytest.fixture(scope="module")
def oracle(checkpoint: Callable[..., Path]) -> Oracle:
    return Oracle(checkpoint("gqa", max_position_embeddings=1024))


def logits(scorer: Scorer, token_ids: list[int], steps: list[int]) -> torch.Tensor:
    scorer.start(token_ids)
    return torch.cat([scorer.advance(count).clone() for count in steps])


@pytest.mark.parametrize("policy", POLICIES)
def test_logits_of_every_token(model: ScoredModel, oracle: Oracle, policy: str) -> None:
    scorer = Scorer(model, policy, "float32", len(TOKENS))
    found_TV = logits(scorer, TOKENS, [CHUNK_TOKENS, 100, 1, 1, CHUNK_TOKENS, 86])
    config = model.config
    resolved = resolve_policy(policy, config.num_layers, config.num_kv_heads)
    assert_logits(found_TV, oracle.logits(TOKENS, resolved), 3e-5)
    again_TV = logits(scorer, TOKENS[:50], [50])
    assert_logits(again_TV, oracle.logits(TOKENS[:50], resolved), 3e-5)


def test_generated_tokens_are_read_as_if_they_were_given(model: ScoredModel) -> None:
    scorer = Scorer(model, "dense", "float32", 64)
    scorer.start(TOKENS[:20])
    new = [int(scorer.advance(20, last_only=True).argmax())]
    for _ in range(5):
        scorer.append(new[-1])
        new.append(int(scorer.advance(1).argmax()))
    whole_TV = logits(scorer, TOKENS[:20] + new[:-1], [25])
    assert whole_TV[19:].argmax(-1).tolist() == new


def test_scorers_take_turns(model: ScoredModel) -> None:
    one, other = (Scorer(model, "dense", "float32", 64) for _ in range(2))
    alone_TV = logits(one, TOKENS[:40], [20, 20])
    one.start(TOKENS[:40])
    other.start(TOKENS[100:140])
    parts = []
    for _ in range(2):
        parts.append(one.advance(20).clone())
        other.advance(20)
    assert torch.equal(torch.cat(parts), alone_TV)


@pytest.mark.parametrize("policy", ["window:20", "sinks:4,30"])
def test_blocks_that_leave_the_window_are_used_again(model: ScoredModel, policy: str) -> None:
    scorer = Scorer(model, policy, "float32", len(TOKENS))
    reach = scorer.policy.reaches[0]
    assert reach.span is not None
    scorer.start(TOKENS)
    most, token_bytes = 0, 2 * 2 * 4 * 16 * 4  # layers, K and V, KV heads, head_dim, float32
    assert scorer.bytes_per_token == token_bytes
    while scorer.num_computed < 600:
        scorer.advance(10)
        most = max(most, scorer.kv_bytes)
    assert most <= (reach.span + 2 * BLOCK_SIZE + BLOCK_SIZE) * BLOCK_SIZE * token_bytes // BLOCK_SIZE
    assert scorer.kv_bytes >= reach.span * token_bytes


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8", "int8/int4"])
def test_narrow_keys_and_values_come_close(model: ScoredModel, kv_dtype: str) -> None:
    exact_TV = logits(Scorer(model, "dense", "float32", 128), TOKENS[:128], [128])
    scorer = Scorer(model, "dense", kv_dtype, 128)
    found_TV = logits(scorer, TOKENS[:128], [128])
    apart = (found_TV - exact_TV).abs().mean() / exact_TV.abs().mean()
    assert 0 < apart < 0.2
    again_TV = logits(scorer, TOKENS[:128], [40, 1, 1, 86])  # a code may be rounded the other way, on its edge
    assert (again_TV - found_TV).abs().mean() < 0.1 * (found_TV - exact_TV).abs().mean()


def test_what_no_backend_serves_is_refused(checkpoint: Callable[..., Path]) -> None:
    model = ScoredModel(checkpoint("gqa"), attention="cuda", threads=1)
    with pytest.raises(InvalidValueError, match="attention"):
        Scorer(model, "window:20", "float32", 64)
    with pytest.raises(InvalidValueError, match="kv_dtype"):
        Scorer(model, "dense", "int2", 64)
