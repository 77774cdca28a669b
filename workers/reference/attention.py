"""Attention by gathering each row's context and calling torch: slow, plain, and what the others are tested against."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headwise.workers.kv.cache import KVCache
from headwise.workers.model.attention import AttentionBackend, AttentionBatch


class ReferenceAttention(AttentionBackend):
    """Any device, any floating-point dtype, either cache layout."""

    def __init__(self, cache: KVCache, q_starts: tuple[int, ...], scale: float, num_threads: int = 1) -> None:
        super().__init__(cache, q_starts, scale, num_threads)
        group_sizes = torch.tensor(q_starts).diff()
        self._kv_head_H = torch.repeat_interleave(torch.arange(cache.num_kv_heads), group_sizes).to(cache.device)

    def write(self, layer: int, k_TKD: Tensor, v_TKD: Tensor, batch: AttentionBatch) -> None:
        self.cache.write(layer, k_TKD, v_TKD, batch.slots_T)

    def attend(self, layer: int, q_THD: Tensor, batch: AttentionBatch) -> Tensor:
        o_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        starts = batch.query_starts_B1.tolist()
        for row, context_len in enumerate(batch.context_lens_B.tolist()):
            tokens = slice(starts[row], starts[row + 1])
            o_THD[tokens] = self._attend_row(layer, q_THD[tokens], batch.block_tables_BN[row], context_len)
        return o_THD

    def _attend_row(self, layer: int, q_THD: Tensor, blocks_N: Tensor, context_len: int) -> Tensor:
        k_KCD, v_KCD = self.cache.gather(layer, blocks_N, context_len)
        key_C = torch.arange(context_len, device=q_THD.device)
        query_T = key_C[context_len - len(q_THD) :]
        o_1HTD = scaled_dot_product_attention(
            q_THD.transpose(0, 1)[None],
            k_KCD[self._kv_head_H][None],
            v_KCD[self._kv_head_H][None],
            attn_mask=key_C <= query_T[:, None],
            scale=self.scale,
        )
        return o_1HTD[0].transpose(0, 1)
