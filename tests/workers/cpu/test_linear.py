"""The packed products against torch's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from headwise.workers.cpu.linear import PackedLinear
from headwise.workers.cpu.linear_simd import TILE_ROWS
from headwise.workers.reference.ops import ReferenceOps


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def rows_of(linear: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    """x with its rows rounded up to the linear's depth."""
    return functional.pad(x, (0, linear.depth - x.shape[1]))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [*range(1, TILE_ROWS + 3), 31, 64, 300])
@pytest.mark.parametrize("biased", [True, False])
def test_it_computes_what_torch_does(rows: int, biased: bool, threads: int) -> None:
    weight, bias = random(107, 83), random(107) if biased else None
    linear, x = PackedLinear(weight, bias), random(rows, 83)
    found = linear(rows_of(linear, x), threads)
    torch.testing.assert_close(found[:, :107], functional.linear(x, weight, bias), rtol=1e-5, atol=1e-4)
    assert not found[:, 107:].any()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 5, TILE_ROWS, TILE_ROWS + 1, 300])
@pytest.mark.parametrize("columns", [16, 50])
def test_a_gated_one_is_a_swiglu(rows: int, columns: int, threads: int) -> None:
    weight, bias, x = random(2 * columns, 64), random(2 * columns), random(rows, 64)
    found = PackedLinear(weight, bias, gated=True)(x, threads)
    expected = ReferenceOps().silu_mul(functional.linear(x, weight, bias))
    torch.testing.assert_close(found[:, :columns], expected, rtol=1e-5, atol=1e-4)
    assert not found[:, columns:].any()


def test_the_gate_survives_extreme_values() -> None:
    gate = torch.tensor([-1e30, -200.0, -90.0, 0.0, 90.0, 200.0, 1e30, torch.inf, torch.nan])
    weight = torch.zeros(2 * len(gate), 1)
    bias = torch.cat((gate, torch.ones(len(gate))))
    linear = PackedLinear(weight, bias, gated=True)
    found = linear(torch.zeros(1, linear.depth))[0, : len(gate)]
    torch.testing.assert_close(found, functional.silu(gate), equal_nan=True)


@pytest.mark.parametrize("gated", [False, True])
def test_a_row_has_the_same_bits_whatever_is_beside_it(gated: bool) -> None:
    linear, x = PackedLinear(random(160, 576), gated=gated), random(300, 576)
    together = linear(x, 2)
    for count in (1, 2, 7, TILE_ROWS, 33):
        assert torch.equal(linear(x[:count]), together[:count])
