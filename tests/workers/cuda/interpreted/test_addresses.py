"""Addresses in caches that are too large to be made here: int32 would wrap, silently."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from headwise.workers.cuda.addresses import block_start, first_element


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


@triton.jit
def compute_blocks(out, layers, blocks, num_blocks, block_elements):  # type: ignore[no-untyped-def]
    n = tl.arange(0, 4)
    tl.store(out + n, block_start(tl.load(layers + n), tl.load(blocks + n), num_blocks, block_elements))


def test_blocks_of_all_layers_beyond_32_bits() -> None:
    num_blocks, block_elements = 70_000, 8 * 16 * 128
    places = [(1, 61_072), (3, 52_144), (3, 52_145), (31, num_blocks - 1)]
    layers, blocks = (torch.tensor(x, dtype=torch.int32) for x in zip(*places, strict=True))
    out = torch.zeros(4, dtype=torch.int64)
    compute_blocks[(1,)](out, layers, blocks, num_blocks, block_elements)
    expected = [(layer * num_blocks + block) * block_elements for layer, block in places]
    assert out.tolist() == expected and expected[0] >= 2**31 and expected[1] >= 2**32 and expected[3] > 2**33
