"""The compiled layers against plain torch, on odd sizes and with threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from headwise.workers.collectives import Solo
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.policy import resolve_policy
from headwise.workers.plan import RowAdmit, RowSampling, StepPlan
from headwise.workers.shard import Shard
from tests.checkpoints import small_spec
from tests.policy_oracle import Oracle, assert_logits
from tests.workers.policy_rows import logits_of_ranks
from tests.workers.reference.test_llama import logits_of_a_rank
from tests.workers.reference.test_policies import LONG, POLICIES, SHORT, STEPS

CHANGES = {
    "plain": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "odd": {"hidden_size": 72, "intermediate_size": 71, "vocab_size": 261},
    "narrow": {"head_dim": 8},
    "wide": {"head_dim": 80},
    "untied": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("changes", list(CHANGES))
def test_logits_are_those_of_plain_torch(checkpoint: Callable[..., Path], changes: str, threads: int) -> None:
    directory = checkpoint("gqa", **CHANGES[changes])
    token_ids = torch.randint(3, 256, (183,), generator=torch.Generator().manual_seed(3)).tolist()
    chunks = [1, 30, 140, 1, 11]
    expected = logits_of_a_rank(directory, token_ids, chunks, "reference")
    found = logits_of_a_rank(directory, token_ids, chunks, "cpu", threads)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [8, 10**6])
def test_a_step_that_would_write_outside_the_cache_is_refused(checkpoint: Callable[..., Path], block: int) -> None:
    shard = Shard(small_spec(checkpoint("gqa"), attention="cpu"), Solo(), 1)
    shard.load()
    shard.allocate(8)
    admit = RowAdmit(0, [3, 4], 2, 0, [block], RowSampling())
    with pytest.raises(InvalidValueError, match=r"^slots_T="):
        shard.step(StepPlan(0, admits=[admit], computes=[(0, 2)]))
    shard.close()


@pytest.mark.parametrize("policy", list(POLICIES))
def test_logits_under_policies_are_those_of_the_oracle(checkpoint: Callable[..., Path], policy: str) -> None:
    """And do not depend on chunks and company, to the bit."""
    directory, text = checkpoint("uneven"), POLICIES[policy]
    found = logits_of_ranks(directory, [LONG, SHORT], STEPS, text, attention="cpu")
    oracle, resolved = Oracle(directory), resolve_policy(text, 2, 3)
    for tokens, found_TV in zip((LONG, SHORT), found, strict=True):
        assert_logits(found_TV, oracle.logits(tokens, resolved))
    (alone_TV,) = logits_of_ranks(directory, [LONG], [[140], [7], *[[1]] * 3, [100], [100]], text, attention="cpu")
    assert torch.equal(alone_TV, found[0])


@pytest.mark.parametrize("tp", [2, 3])
def test_ranks_have_the_policies_of_their_heads(checkpoint: Callable[..., Path], tp: int) -> None:
    directory, text = checkpoint("uneven"), POLICIES["heads"]
    (found_TV,) = logits_of_ranks(directory, [LONG], [[140], [130], [1], [79]], text, attention="cpu", tp=tp)
    assert_logits(found_TV, Oracle(directory).logits(LONG, resolve_policy(text, 2, 3)))


@pytest.mark.parametrize("kv_dtype", ["float16", "bfloat16", "int8", "int4", "int8/int4"])
def test_narrow_keys_and_values_are_those_of_the_reference(checkpoint: Callable[..., Path], kv_dtype: str) -> None:
    """But for the few that are rounded the other way, because what is rounded differs in the last bits."""
    directory, steps = checkpoint("uneven"), [[1], [50], [39]]
    found_TV, expected_TV = (
        logits_of_ranks(directory, [SHORT], steps, POLICIES["sinks"], kv_dtype, attention)[0]
        for attention in ("cpu", "reference")
    )
    assert_logits(found_TV, expected_TV.double(), 2e-3)
