"""The fused operations against the plain ones."""

from __future__ import annotations

import pytest
import torch

from headwise.workers import ops, ops_cpu


@pytest.fixture(params=[1, 5, 200])
def tokens(request: pytest.FixtureRequest) -> int:
    """Rows of a step; 200 of them take the parallel kernels where there are threads."""
    return int(request.param)


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """``ops`` computes in plain torch; ``ops_cpu`` is called directly."""
    monkeypatch.setattr(ops, "_fuses", lambda x: False)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_norm(tokens: int) -> None:
    x, weight = random(tokens, 576), random(576)
    torch.testing.assert_close(ops_cpu.add_rms_norm(x, None, weight, 1e-5), ops.rms_norm(x, weight, 1e-5))


def test_add_and_norm(tokens: int) -> None:
    plain_sum, delta, weight = random(tokens, 576), random(tokens, 576) + 1, random(576)
    fused_sum = plain_sum.clone()
    expected = ops.add_rms_norm(plain_sum, delta, weight, 1e-5)
    torch.testing.assert_close(ops_cpu.add_rms_norm(fused_sum, delta, weight, 1e-5), expected)
    assert torch.equal(fused_sum, plain_sum)


def test_rope_turns_the_first_heads_only(tokens: int) -> None:
    plain, angles = random(tokens, 15, 64), random(tokens, 32)
    fused, before = plain.clone(), plain.clone()
    ops.rope_(plain, 12, angles.cos(), angles.sin())
    ops_cpu.rope_(fused, 12, angles.cos(), angles.sin())
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)
    assert torch.equal(fused[:, 12:], before[:, 12:])
    assert not torch.equal(fused[:, :12], before[:, :12])


def test_half_precision_stays_with_torch() -> None:
    x = random(3, 64).to(torch.bfloat16)
    assert ops.rms_norm(x, torch.ones(64, dtype=torch.bfloat16), 1e-5).dtype == torch.bfloat16
