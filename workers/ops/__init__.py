"""The small operations between the matrix products: one interface, plain torch and fused kernels for CPU."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from headwise.workers.ops.cpu import CpuOps
from headwise.workers.ops.plain import PlainOps

__all__ = ["CpuOps", "Ops", "PlainOps", "ops_for"]


class Ops(Protocol):
    """What a layer needs beside its matrix products; all tensors contiguous and of one dtype."""

    def rms_norm(self, x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm (Zhang and Sennrich, 2019), computed in float32."""

    def add_rms_norm(self, residual_TE: Tensor, delta_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        """Adds ``delta`` to ``residual`` in place and returns the norm of the sum."""

    def rope_(self, x_TXD: Tensor, num_heads: int, cos_TD: Tensor, sin_TD: Tensor) -> None:
        """Rotary position embedding (Su et al., 2021) of the first ``num_heads`` heads, in place.

        Halves layout: dimension i turns with i + D/2. ``cos_TD`` and ``sin_TD`` are ``[T, D/2]``, of each token's
        position.
        """

    def silu_mul(self, gate_up_TM: Tensor) -> Tensor:
        """SwiGLU's gate (Shazeer, 2020): ``silu(gate) * up`` of ``[T, 2 M]``, gate first, to ``[T, M]``."""


def ops_for(device: torch.device, dtype: torch.dtype) -> Ops:
    """The fastest operations that compute on such tensors."""
    return CpuOps() if device.type == "cpu" and dtype == torch.float32 else PlainOps()
