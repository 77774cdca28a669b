"""The numbers of the small operations, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headwise.workers.cuda.ops import TritonOps
from headwise.workers.kv.cache import KVCache
from headwise.workers.reference.ops import ReferenceOps

OURS, REFERENCE = TritonOps(), ReferenceOps()
EPS = 1e-5

dtypes = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 8e-3), (torch.bfloat16, 0.1)]
)


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)


@dtypes
@pytest.mark.parametrize(("tokens", "size"), [(1, 64), (5, 576), (3, 4096)])
def test_norms(tokens: int, size: int, dtype: torch.dtype, tolerance: float) -> None:
    x_TE, delta_TE, weight_E = (random(*shape, dtype=dtype) for shape in ((tokens, size), (size, tokens), (size,)))
    delta_TE = delta_TE.T.contiguous()
    assert_close(
        OURS.rms_norm(x_TE, weight_E, EPS), REFERENCE.rms_norm(x_TE.double(), weight_E.double(), EPS), tolerance
    )
    residual_TE, exact_TE = x_TE.clone(), x_TE.double() + delta_TE.double()
    got_TE = OURS.add_rms_norm(residual_TE, delta_TE, weight_E, EPS)
    assert_close(residual_TE, exact_TE, tolerance)
    assert_close(got_TE, REFERENCE.rms_norm(exact_TE, weight_E.double(), EPS), 2 * tolerance)


def test_a_norm_of_rows_that_lie_apart() -> None:
    x_TE = random(6, 64, dtype=torch.float32)[::2]
    weight_E = random(64, dtype=torch.float32)
    assert_close(OURS.rms_norm(x_TE, weight_E, EPS), REFERENCE.rms_norm(x_TE.double(), weight_E.double(), EPS), 2e-6)


@dtypes
@pytest.mark.parametrize(("tokens", "size"), [(1, 8), (5, 1536), (2, 1025)])
def test_gate(tokens: int, size: int, dtype: torch.dtype, tolerance: float) -> None:
    gate_up_TM = random(tokens, 2 * size, dtype=dtype)
    assert_close(OURS.silu_mul(gate_up_TM), REFERENCE.silu_mul(gate_up_TM.double()), tolerance)


@dtypes
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 1, 80), (5, 2, 96), (8, 8, 128)])
def test_rotate_and_write(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, tolerance: float) -> None:
    qkv_TXD = random(5, heads + 2 * kv_heads, head_dim, dtype=dtype)
    cos_TD, sin_TD = random(2, 5, head_dim // 2, dtype=dtype)
    slots_T = torch.tensor([17, 3, 95, 40, 0])
    cache = KVCache(2, 6, kv_heads, 16, head_dim, dtype)
    expected = KVCache(2, 6, kv_heads, 16, head_dim, torch.float64)
    exact_TXD = qkv_TXD.double()
    REFERENCE.rotate_and_write(exact_TXD, cos_TD.double(), sin_TD.double(), expected, 1, slots_T)
    OURS.rotate_and_write(qkv_TXD, cos_TD, sin_TD, cache, 1, slots_T)
    assert_close(qkv_TXD, exact_TXD, 4 * tolerance)
    assert_close(cache.keys, expected.keys, 4 * tolerance)
    assert_close(cache.values, expected.values, 4 * tolerance)
