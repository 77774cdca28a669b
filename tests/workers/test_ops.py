"""The fused operations against the plain ones."""

from __future__ import annotations

import pytest
import torch

from headwise.workers.ops import CpuOps, PlainOps, ops_for

FUSED, PLAIN = CpuOps(), PlainOps()


@pytest.fixture(params=[1, 5, 200])
def tokens(request: pytest.FixtureRequest) -> int:
    """Rows of a step; 200 of them take the parallel kernels where there are threads."""
    return int(request.param)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_norm(tokens: int) -> None:
    x, weight = random(tokens, 576), random(576)
    torch.testing.assert_close(FUSED.rms_norm(x, weight, 1e-5), PLAIN.rms_norm(x, weight, 1e-5))


def test_add_and_norm(tokens: int) -> None:
    plain_sum, delta, weight = random(tokens, 576), random(tokens, 576) + 1, random(576)
    fused_sum = plain_sum.clone()
    expected = PLAIN.add_rms_norm(plain_sum, delta, weight, 1e-5)
    torch.testing.assert_close(FUSED.add_rms_norm(fused_sum, delta, weight, 1e-5), expected)
    assert torch.equal(fused_sum, plain_sum)


def test_rope_turns_the_first_heads_only(tokens: int) -> None:
    plain, angles = random(tokens, 15, 64), random(tokens, 32)
    fused, before = plain.clone(), plain.clone()
    PLAIN.rope_(plain, 12, angles.cos(), angles.sin())
    FUSED.rope_(fused, 12, angles.cos(), angles.sin())
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)
    assert torch.equal(fused[:, 12:], before[:, 12:])
    assert not torch.equal(fused[:, :12], before[:, :12])


def test_the_fused_ones_are_for_float32_on_cpu() -> None:
    assert isinstance(ops_for(torch.device("cpu"), torch.float32), CpuOps)
    assert not isinstance(ops_for(torch.device("cpu"), torch.bfloat16), CpuOps)
    assert not isinstance(ops_for(torch.device("cuda"), torch.float32), CpuOps)
