"""The compiled layers against plain torch, on odd sizes and with threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from headwise.workers.collectives import Solo
from headwise.workers.errors import InvalidValueError
from headwise.workers.plan import RowAdmit, RowSampling, StepPlan
from headwise.workers.shard import Shard
from tests.checkpoints import small_spec
from tests.workers.reference.test_llama import logits_of_a_rank

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


@pytest.mark.parametrize("block", [-1, 8, 10**6])
def test_a_step_that_would_write_outside_the_cache_is_refused(checkpoint: Callable[..., Path], block: int) -> None:
    shard = Shard(small_spec(checkpoint("gqa"), attention="cpu"), Solo(), 1)
    shard.load()
    shard.allocate(8)
    admit = RowAdmit(0, [3, 4], 2, 0, [block], RowSampling())
    with pytest.raises(InvalidValueError, match=r"^slots_T="):
        shard.step(StepPlan(0, admits=[admit], computes=[(0, 2)]))
    shard.close()
