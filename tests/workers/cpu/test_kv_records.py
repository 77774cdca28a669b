"""What the compiled step writes into the cache against what plain torch does, bit for bit."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
import torch

from headwise.workers.cpu import kv_records
from headwise.workers.cpu.attention import CpuAttention
from headwise.workers.kv.cache import KVCache
from headwise.workers.kv.format import KV_DTYPES, kv_format
from headwise.workers.kv.policy import DENSE, KvPolicy, Reach

TOKENS = 40


@numba.njit
def write_all(keys: int, values: int, stride: int, slots: Any, sizes: Any, kv: Any) -> None:
    tokens = len(slots) // 2
    for t in range(tokens):
        at = 4 * stride * sizes.kv_heads * t
        kv_records.write_token(keys + at, values + at, stride, slots, t, tokens, sizes, kv)


@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 64, 80, 128])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_compiled_writes_are_those_of_torch(kv_dtype: str, head_dim: int) -> None:
    if "int4" in kv_dtype and head_dim % min(head_dim, 32):
        pytest.skip("no such format")
    policy = KvPolicy((DENSE, Reach(0, 9)), ((0, 1, 0), (1, 1, 0)))
    block_size = 16 if head_dim % 3 else 32
    caches = [
        KVCache(
            2,
            (6, 4),
            3,
            block_size,
            head_dim,
            torch.float32,
            "cpu",
            True,
            format=kv_format(kv_dtype, head_dim),
            policy=policy,
        )
        for _ in range(2)
    ]
    generator = torch.Generator().manual_seed(head_dim)
    k_TKD, v_TKD = (
        torch.randn((2, TOKENS, 3, head_dim), generator=generator) * torch.logspace(-9, 3, TOKENS)[:, None, None]
    )
    k_TKD[3], v_TKD[4], k_TKD[5] = 0.1, -7.0, 0.0  # all alike
    k_TKD[6], v_TKD[6] = 6e-8, 7e-8 * torch.rand((3, head_dim), generator=generator)
    slots = [torch.randperm(blocks * block_size, generator=generator)[:TOKENS] for blocks in (6, 4)]
    slots_T = torch.cat(slots)
    caches[0].write(1, k_TKD, v_TKD, slots_T)
    backend = CpuAttention(caches[1], (0, 1, 2, 3), 1.0)
    k_TKD, v_TKD = k_TKD.clone(), v_TKD.clone()
    write_all(k_TKD.data_ptr(), v_TKD.data_ptr(), head_dim, slots_T.numpy(), backend.sizes, backend.layers[1])
    for wanted, found in zip(*(cache.parts[1] for cache in caches), strict=True):
        for x, y in ((wanted.keys, found.keys), (wanted.values, found.values)):
            np.testing.assert_array_equal(x.view(torch.uint8).numpy(), y.view(torch.uint8).numpy())


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_what_is_not_finite_does_not_come_back_finite(kv_dtype: str, poison: float) -> None:
    cache = KVCache(1, 1, 1, 16, 32, torch.float32, "cpu", True, format=kv_format(kv_dtype, 32))
    backend = CpuAttention(cache, (0, 1), 1.0)
    k_TKD, v_TKD = torch.randn(2, 1, 1, 32)
    k_TKD[0, 0, 17] = v_TKD[0, 0, 30] = poison
    slots_T = np.array([3, 3])
    write_all(k_TKD.data_ptr(), v_TKD.data_ptr(), 32, slots_T, backend.sizes, backend.layers[0])
    for x_KCD in cache.gather(0, torch.tensor([0]), 4):
        assert not x_KCD[0, 3].isfinite().all()
        assert x_KCD[0, :3].isfinite().all()
