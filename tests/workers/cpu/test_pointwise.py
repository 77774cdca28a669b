"""What lies between the products, against plain torch: each to 1e-5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.workers.cpu import pointwise_simd
from headwise.workers.cpu.argmax import argmax
from headwise.workers.reference.ops import ReferenceOps, rotate_


def _add_norm(residual: Any, delta: Any, weight: Any, width: Any, eps: Any, out: Any) -> None:
    vectors = residual.size // 16
    addresses = (residual.ctypes.data, delta.ctypes.data, weight.ctypes.data)
    pointwise_simd.add_norm(*addresses, vectors, width, eps, out.ctypes.data)


def _turn(x: Any, cos: Any, sin: Any) -> None:
    pointwise_simd.turn(x.ctypes.data, cos.ctypes.data, sin.ctypes.data, x.size // 2)


def _move(source: Any, copied: Any, scattered: Any, stride: Any) -> None:
    pointwise_simd.copy(source.ctypes.data, copied.ctypes.data, source.size)
    pointwise_simd.scatter(source.ctypes.data, scattered.ctypes.data, stride, source.size)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(scope="module")
def compiled() -> Callable[[Any], Any]:
    kernels = {function: numba.njit(function) for function in (_add_norm, _turn, _move)}
    return kernels.__getitem__


@pytest.mark.parametrize("width", [16, 50, 576])
def test_add_and_norm(compiled: Callable[[Any], Any], width: int) -> None:
    padding = (0, -width % 16)
    residual, delta, weight = (torch.nn.functional.pad(random(1, width) + i, padding) for i in range(3))
    expected_sum, out = residual.clone(), torch.zeros_like(residual)
    expected = ReferenceOps().add_rms_norm(expected_sum[:, :width], delta[:, :width], weight[0, :width], 1e-5)
    arrays = (residual.numpy(), delta.numpy(), weight.numpy())
    compiled(_add_norm)(*arrays, width, np.float32(1e-5), out.numpy())
    assert torch.equal(residual, expected_sum)
    torch.testing.assert_close(out[:, :width], expected, rtol=1e-5, atol=1e-6)
    assert not out[:, width:].any()


@pytest.mark.parametrize("head_dim", [8, 16, 40, 64, 128])
def test_turning_a_head(compiled: Callable[[Any], Any], head_dim: int) -> None:
    x, angles = random(1, 1, head_dim), random(1, head_dim // 2)
    expected = x.clone()
    rotate_(expected, angles.cos(), angles.sin())
    compiled(_turn)(x.numpy(), angles.cos().numpy(), angles.sin().numpy())
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 16, 40])
def test_copying_and_scattering(compiled: Callable[[Any], Any], count: int) -> None:
    source, copied, scattered = random(count).numpy(), np.zeros(count + 1, np.float32), np.zeros((count, 3), np.float32)
    compiled(_move)(source, copied, scattered, 3)
    assert (copied[:count] == source).all() and copied[count] == 0
    assert (scattered[:, 0] == source).all() and not scattered[:, 1:].any()


VALUES = st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.0, float("inf"), float("-inf"), float("nan")])


@settings(deadline=None)  # the first call may compile
@given(st.lists(st.lists(VALUES, min_size=40, max_size=40), min_size=1, max_size=3), st.integers(1, 40))
def test_the_best_is_torchs(rows: list[list[float]], width: int) -> None:
    logits = torch.tensor(rows)[:, :width]
    expected = []
    for row in logits:
        nans = row.isnan().nonzero().flatten()
        best = nans if len(nans) else (row == row.max()).nonzero().flatten()
        expected.append(int(best[0]))
    assert argmax(logits, 1).tolist() == expected
    assert argmax(logits, 2).tolist() == expected
