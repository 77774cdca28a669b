"""The small operations between matrix products on a GPU, one Triton kernel each."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.workers.cuda import ops_kernels as kernels
from headwise.workers.cuda.launch import FP_FUSION, padded
from headwise.workers.kv.cache import KVCache

_COLUMNS = 1024
"""Of a program that gates: enough for 16 bytes a thread."""


class TritonOps:
    """See :class:`~headwise.workers.model.ops.Ops`. Sums are float32; each result is rounded where torch rounds it."""

    def rms_norm(self, x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        o_TE = torch.empty(x_TE.shape, dtype=x_TE.dtype, device=x_TE.device)
        rows, size = x_TE.shape
        kernels.norm_rows[(rows,)](o_TE, x_TE, weight_E, eps, x_TE.stride(0), **_row(size))
        return o_TE

    def add_rms_norm(self, residual_TE: Tensor, delta_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        o_TE = torch.empty_like(residual_TE)
        rows, size = residual_TE.shape
        kernels.add_and_norm_rows[(rows,)](o_TE, residual_TE, delta_TE, weight_E, eps, **_row(size))
        return o_TE

    def silu_mul(self, gate_up_TM: Tensor) -> Tensor:
        rows, size = len(gate_up_TM), gate_up_TM.shape[1] // 2
        o_TM = torch.empty((rows, size), dtype=gate_up_TM.dtype, device=gate_up_TM.device)
        kernels.gate_rows[(rows, -(-size // _COLUMNS))](
            o_TM, gate_up_TM, SIZE=size, COLUMNS=_COLUMNS, enable_fp_fusion=FP_FUSION
        )
        return o_TM

    def rotate_and_write(
        self, qkv_TXD: Tensor, cos_TD: Tensor, sin_TD: Tensor, cache: KVCache, layer: int, slots_T: Tensor
    ) -> None:
        tokens, heads, head_dim = qkv_TXD.shape
        kernels.rotate_and_write[(tokens,)](
            *(qkv_TXD, cos_TD, sin_TD, cache.keys[layer], cache.values[layer], slots_T, qkv_TXD.stride(0)),
            NUM_HEADS=heads - 2 * cache.num_kv_heads,
            NUM_KV_HEADS=cache.num_kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_SIZE=cache.block_size,
            PADDED_HEADS=padded(heads),
            PADDED_HALF=padded(head_dim // 2),
            enable_fp_fusion=FP_FUSION,
        )


def _row(size: int) -> dict[str, int]:
    """Of a launch: the sizes of a row, and warps that each take about eight elements a thread."""
    room, fusion = padded(size), {"enable_fp_fusion": FP_FUSION}
    return {"SIZE": size, "PADDED": room, "num_warps": min(16, max(1, room // 256))} | fusion
