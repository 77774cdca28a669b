"""The small operations between the matrix products: plain torch, right on every device and dtype; float32 on CPU goes
to the fused kernels of :mod:`headwise.workers.ops_cpu`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from headwise.workers import ops_cpu


def rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (Zhang and Sennrich, 2019), computed in float32 and returned in x's dtype."""
    if _fuses(x_TE):
        return ops_cpu.add_rms_norm(x_TE, None, weight_E, eps)
    x32_TE = x_TE.float()
    scale_T1 = torch.rsqrt(x32_TE.square().mean(-1, keepdim=True) + eps)
    return (x32_TE * scale_T1).to(x_TE.dtype).mul_(weight_E)


def add_rms_norm(residual_TE: Tensor, delta_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """Adds ``delta`` to ``residual`` in place and returns the norm of the sum."""
    if _fuses(residual_TE):
        return ops_cpu.add_rms_norm(residual_TE, delta_TE, weight_E, eps)
    residual_TE.add_(delta_TE)
    return rms_norm(residual_TE, weight_E, eps)


def rope_(x_TXD: Tensor, num_heads: int, cos_TD: Tensor, sin_TD: Tensor) -> None:
    """Rotary position embedding (Su et al., 2021) in place, halves layout: dimension i turns with i + D/2.

    Args:
        x_TXD: the first ``num_heads`` of its heads are turned.
        cos_TD, sin_TD: ``[T, D/2]`` of each token's position.
    """
    if _fuses(x_TXD):
        ops_cpu.rope_(x_TXD, num_heads, cos_TD, sin_TD)
        return
    half = x_TXD.shape[-1] // 2
    first, second = x_TXD[:, :num_heads, :half], x_TXD[:, :num_heads, half:]
    cos_T1D, sin_T1D = cos_TD.unsqueeze(1), sin_TD.unsqueeze(1)
    turned = first * cos_T1D - second * sin_T1D
    second.copy_(second * cos_T1D + first * sin_T1D)
    first.copy_(turned)


def silu_mul(gate_up_TM: Tensor) -> Tensor:
    """SwiGLU's gate (Shazeer, 2020): ``silu(gate) * up`` of ``[T, 2 M]``, gate first, to ``[T, M]``."""
    gate_TM, up_TM = gate_up_TM.chunk(2, dim=-1)
    return functional.silu(gate_TM).mul_(up_TM)


def _fuses(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous()
