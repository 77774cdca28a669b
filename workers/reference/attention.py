"""Attention by gathering each row's context and calling torch: slow, plain, and what the others are tested against."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headwise.workers.kv.cache import KVCache
from headwise.workers.model.attention import AttentionBackend, AttentionBatch
from headwise.workers.upload import upload


class ReferenceAttention(AttentionBackend):
    """Any device, any floating-point dtype, either cache layout."""

    def __init__(self, cache: KVCache, q_starts: tuple[int, ...], scale: float) -> None:
        super().__init__(cache, q_starts, scale)
        group_sizes = torch.tensor(q_starts).diff()
        self._kv_head_H = torch.repeat_interleave(torch.arange(cache.num_kv_heads), group_sizes).to(cache.device)
        self._rows: list[tuple[slice, Tensor, int]] = []

    def begin(self, batch: AttentionBatch) -> None:
        blocks_BN = upload(batch.block_tables_BN, self.cache.device)
        tokens_B = [slice(start, stop) for start, stop in pairwise(batch.query_starts_B1.tolist())]
        self._rows = list(zip(tokens_B, blocks_BN, batch.context_lens_B.tolist(), strict=True))

    def attend(self, layer: int, q_THD: Tensor, q_sinks_THD: Tensor | None = None) -> Tensor:
        o_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        for tokens, blocks_N, context_len in self._rows:
            o_THD[tokens] = self._attend_row(layer, q_THD[tokens], blocks_N, context_len)
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
