"""Addresses in caches that are too large to be made here: int32 would wrap, silently."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from headwise.workers.cuda.addresses import first_element


@triton.jit
def compute(out, blocks, kv_head, offset, K: tl.constexpr, S: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    n = tl.arange(0, 4)
    tl.store(out + n, first_element(tl.load(blocks + n), kv_head, offset, K, S, D))


@pytest.mark.parametrize(("kv_heads", "head_dim"), [(8, 128), (1, 256), (3, 80)])
def test_beyond_32_bits(kv_heads: int, head_dim: int) -> None:
    elements = kv_heads * 16 * head_dim
    blocks = [2**31 // elements, 2**32 // elements, 2**32 // elements + 1, 2**31 - 1]
    out = torch.zeros(4, dtype=torch.int64)
    compute[(1,)](out, torch.tensor(blocks, dtype=torch.int32), kv_heads - 1, 15, kv_heads, 16, head_dim)
    expected = [((block * kv_heads + kv_heads - 1) * 16 + 15) * head_dim for block in blocks]
    assert out.tolist() == expected and max(expected) > 2**32
