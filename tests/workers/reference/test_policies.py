"""One shard's forward pass under KV policies, against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from headwise.workers.kv.cache import KVCache
from headwise.workers.kv.format import BITS, kv_format
from headwise.workers.kv.policy import resolve_policy
from headwise.workers.kv.quantise import dequantise, quantise
from headwise.workers.model.attention import AttentionBatch
from headwise.workers.reference.attention import ReferenceAttention
from tests.policy_oracle import Oracle, assert_logits
from tests.workers.policy_rows import logits_of_ranks

POLICIES = {
    "window": "window:40",
    "sinks": "sinks:4,44",
    "many sinks": "sinks:20,28",
    "layers": "dense@0;sinks:4,44@*",
    "heads": "window:24@0.1;sinks:5,33@0.2,1.0;dense@*",
}
# Long enough that every window has moved, and that positions are beyond those of the model.
LONG, SHORT = ((torch.arange(n) * 7919 % 251 + 3).tolist() for n in (350, 90))
STEPS = [[1, 60], [99, 1], [28, 29], [128, 0], *[[1, 0]] * 3, [60, 0], [31, 0]]


@pytest.mark.parametrize("policy", list(POLICIES))
def test_logits_are_those_of_the_oracle(checkpoint: Callable[..., Path], policy: str) -> None:
    directory, text = checkpoint("uneven"), POLICIES[policy]
    found = logits_of_ranks(directory, [LONG, SHORT], STEPS, text)
    oracle, resolved = Oracle(directory), resolve_policy(text, 2, 3)
    for tokens, found_TV in zip((LONG, SHORT), found, strict=True):
        assert_logits(found_TV, oracle.logits(tokens, resolved))


@pytest.mark.parametrize("tp", [2, 3])
def test_ranks_have_the_policies_of_their_heads(checkpoint: Callable[..., Path], tp: int) -> None:
    directory, text = checkpoint("uneven"), POLICIES["heads"]
    found_TV = logits_of_ranks(directory, [LONG], [[140], [130], [1], [79]], text, tp=tp)[0]
    assert_logits(found_TV, Oracle(directory).logits(LONG, resolve_policy(text, 2, 3)))


@pytest.mark.parametrize("kv_dtype", ["float16", "bfloat16", "int8", "int4", "int8/int4"])
def test_narrow_keys_and_values_are_those_of_the_oracle(checkpoint: Callable[..., Path], kv_dtype: str) -> None:
    """But for the few that are rounded the other way; to the digit, see below."""
    directory = checkpoint("uneven")
    found_TV = logits_of_ranks(directory, [SHORT], [[1], [50], [39]], POLICIES["sinks"], kv_dtype)[0]
    expected_TV = Oracle(directory).logits(SHORT, resolve_policy(POLICIES["sinks"], 2, 3), kv_format(kv_dtype, 16))
    assert_logits(found_TV, expected_TV, 2e-3)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8", "int4/int8"])
def test_attention_is_that_over_what_is_kept(kv_dtype: str) -> None:
    """40 tokens over 60 others; each KV head has two query heads."""
    policy, format = resolve_policy("sinks:4,28@0.0;dense@*", 1, 2), kv_format(kv_dtype, 32)
    cache = KVCache(1, 7, 2, 16, 32, torch.float32, format=format, policy=policy)
    q_THD, q_sinks_THD, k_CKD, v_CKD = (torch.randn(n, h, 32) for n, h in ((40, 4), (40, 4), (100, 2), (100, 2)))
    cache.write(0, k_CKD, v_CKD, torch.arange(100).repeat(2))
    attention = ReferenceAttention(cache, (0, 2, 4), 0.2)
    tables_BN = np.arange(7, dtype=np.int32)[None].repeat(2, axis=0)
    attention.begin(AttentionBatch(np.array([0, 40], np.int32), np.array([100], np.int32), tables_BN))
    found_THD = attention.attend(0, q_THD, q_sinks_THD)
    k_CKD, v_CKD = _kept(k_CKD, format.keys), _kept(v_CKD, format.values)
    for token, position in enumerate(range(60, 100)):
        for head in range(4):
            first = position - 27 if head < 2 else 4
            keys_CD, values_CD = (
                torch.cat([x[:4, head // 2], x[first : position + 1, head // 2]]) for x in (k_CKD, v_CKD)
            )
            scores_C = keys_CD @ q_THD[token, head] * 0.2
            if head < 2:
                scores_C[:4] = keys_CD[:4] @ q_sinks_THD[token, head] * 0.2
            torch.testing.assert_close(found_THD[token, head], scores_C.softmax(-1) @ values_CD, rtol=0, atol=1e-5)


def _kept(x: torch.Tensor, kind: str) -> torch.Tensor:
    return dequantise(quantise(x, kind)) if kind in BITS else x.to(getattr(torch, kind)).float()
