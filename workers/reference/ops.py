"""The small operations between the matrix products in plain torch: right on every device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from headwise.workers.kv.cache import KVCache


class ReferenceOps:
    """See :class:`~headwise.workers.model.ops.Ops`."""

    def rms_norm(self, x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        x32_TE = x_TE.float()
        scale_T1 = torch.rsqrt(x32_TE.square().mean(-1, keepdim=True) + eps)
        return (x32_TE * scale_T1).to(x_TE.dtype).mul_(weight_E)

    def add_rms_norm(self, residual_TE: Tensor, delta_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        return self.rms_norm(residual_TE.add_(delta_TE), weight_E, eps)

    def silu_mul(self, gate_up_TM: Tensor) -> Tensor:
        gate_TM, up_TM = gate_up_TM.chunk(2, dim=-1)
        return functional.silu(gate_TM).mul_(up_TM)

    def rotate_and_write(
        self, qkv_TXD: Tensor, cos_TD: Tensor, sin_TD: Tensor, cache: KVCache, layer: int, slots_T: Tensor
    ) -> None:
        k_TKD, v_TKD = qkv_TXD[:, -2 * cache.num_kv_heads :].chunk(2, dim=1)
        rotate_(qkv_TXD[:, : -cache.num_kv_heads], cos_TD, sin_TD)
        cache.write(layer, k_TKD, v_TKD, slots_T)


def rotate_(x_TXD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> None:
    """Rotary position embedding of every head, in place."""
    first, second = x_TXD.chunk(2, dim=-1)
    cos_T1D, sin_T1D = cos_TD.unsqueeze(1), sin_TD.unsqueeze(1)
    turned = first * cos_T1D - second * sin_T1D
    second.copy_(second * cos_T1D + first * sin_T1D)
    first.copy_(turned)
