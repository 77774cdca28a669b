"""The small operations between the matrix products in plain torch: right on every device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (Zhang and Sennrich, 2019), computed in float32."""
    x32_TE = x_TE.float()
    scale_T1 = torch.rsqrt(x32_TE.square().mean(-1, keepdim=True) + eps)
    return (x32_TE * scale_T1).to(x_TE.dtype).mul_(weight_E)


def add_rms_norm(residual_TE: Tensor, delta_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """Adds ``delta`` to ``residual`` in place and returns the norm of the sum."""
    return rms_norm(residual_TE.add_(delta_TE), weight_E, eps)


def rope_(x_TXD: Tensor, num_heads: int, cos_TD: Tensor, sin_TD: Tensor) -> None:
    """Rotary position embedding (Su et al., 2021) of the first ``num_heads`` heads, in place.

    Halves layout: dimension i turns with i + D/2. ``cos_TD`` and ``sin_TD`` are ``[T, D/2]``, of each token's position.
    """
    first, second = x_TXD[:, :num_heads].chunk(2, dim=-1)
    cos_T1D, sin_T1D = cos_TD.unsqueeze(1), sin_TD.unsqueeze(1)
    turned = first * cos_T1D - second * sin_T1D
    second.copy_(second * cos_T1D + first * sin_T1D)
    first.copy_(turned)


def silu_mul(gate_up_TM: Tensor) -> Tensor:
    """SwiGLU's gate (Shazeer, 2020): ``silu(gate) * up`` of ``[T, 2 M]``, gate first, to ``[T, M]``."""
    gate_TM, up_TM = gate_up_TM.chunk(2, dim=-1)
    return functional.silu(gate_TM).mul_(up_TM)
