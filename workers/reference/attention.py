"""Attention by gathering what each row sees of its context and calling torch: slow, plain, and what the others are
tested against."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headwise.workers.kv.cache import KVCache, KvPart
from headwise.workers.kv.policy import Reach
from headwise.workers.model.attention import AttentionBackend, AttentionBatch
from headwise.workers.upload import upload


class ReferenceAttention(AttentionBackend):
    """Any device, any floating-point dtype, either cache layout, every policy and every form of keys and values."""

    def __init__(self, cache: KVCache, q_starts: tuple[int, ...], scale: float) -> None:
        super().__init__(cache, q_starts, scale)
        self._heads = {part.heads: self._heads_of(part) for parts in cache.parts for part in parts}
        self._views: list[list[_View]] = []

    def begin(self, batch: AttentionBatch) -> None:
        self._views = [self._group_views(batch, group) for group in range(self.cache.policy.num_groups)]

    def attend(self, layer: int, q_THD: Tensor, q_sinks_THD: Tensor | None = None) -> Tensor:
        o_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        for part in self.cache.parts[layer]:
            heads_H, kv_heads_H = self._heads[part.heads]
            queries = q_THD if self.cache.policy.reaches[part.group].sinks == 0 else _with_sinks(q_THD, q_sinks_THD)
            for view in self._views[part.group]:
                q_HTX = queries[view.tokens, heads_H].transpose(0, 1)
                o_THD[view.tokens, heads_H] = self._attend_row(part, kv_heads_H, q_HTX, view).transpose(0, 1)
        return o_THD

    def _attend_row(self, part: KvPart, kv_heads_H: Tensor, q_HTX: Tensor, view: _View) -> Tensor:
        """Args: ``q_HTX``: where the view has sinks, each head of the window and then the same of the sinks."""
        k_KCD, v_KCD = self.cache.gather_part(part, view.blocks_N, len(view.blocks_N) * self.cache.block_size)
        k_KCD, v_KCD = k_KCD[:, view.kept_C].to(q_HTX.dtype), v_KCD[:, view.kept_C].to(q_HTX.dtype)
        if view.num_sinks is not None:
            # One product of all: a key meets one half of the query, and zeros meet the other.
            k_KCX = k_KCD.new_zeros(*k_KCD.shape[:2], 2 * k_KCD.shape[2])
            k_KCX[:, view.num_sinks :, : k_KCD.shape[2]] = k_KCD[:, view.num_sinks :]
            k_KCX[:, : view.num_sinks, k_KCD.shape[2] :] = k_KCD[:, : view.num_sinks]
            k_KCD = k_KCX
        o_1HTD = scaled_dot_product_attention(
            q_HTX[None],
            k_KCD[kv_heads_H][None],
            v_KCD[kv_heads_H][None],
            attn_mask=view.sees_TC,
            scale=self.scale,
        )
        return o_1HTD[0]

    def _heads_of(self, part: KvPart) -> tuple[Tensor, Tensor]:
        """The query heads of a part, and for each of them its KV head among those of the part."""
        ranges = [np.arange(self.q_starts[head], self.q_starts[head + 1]) for head in part.heads]
        kv_heads = np.repeat(np.arange(len(ranges)), [len(heads) for heads in ranges])
        return upload(np.concatenate(ranges), self.cache.device), upload(kv_heads, self.cache.device)

    def _group_views(self, batch: AttentionBatch, group: int) -> list[_View]:
        rows, reach = len(batch.context_lens_B), self.cache.policy.reaches[group]
        views = []
        for row, tokens in enumerate(pairwise(batch.query_starts_B1.tolist())):
            place = group * rows + row
            shift = 0 if batch.shifts_B is None else int(batch.shifts_B[place])
            queries_T = np.arange(tokens[0] - tokens[1], 0) + int(batch.context_lens_B[row]) - shift
            views.append(self._view(slice(*tokens), batch.block_tables_BN[place], queries_T, reach))
        return views

    def _view(self, tokens: slice, table_N: NDArray[np.int32], queries_T: NDArray[np.int64], reach: Reach) -> _View:
        """Only what one of the queries sees is gathered: other blocks may be anybody's."""
        size, first = self.cache.block_size, reach.first_key(int(queries_T[0]))
        num_blocks, sinks = int(queries_T[-1]) // size + 1, min(reach.sinks, first)
        blocks = np.union1d(np.arange(-(-sinks // size)), np.arange(first // size, num_blocks))
        keys_C = (blocks[:, None] * size + np.arange(size)).flatten()
        kept_C = np.flatnonzero(((keys_C < sinks) | (keys_C >= first)) & (keys_C <= queries_T[-1]))
        keys_C = keys_C[kept_C]
        sees_TC = keys_C <= queries_T[:, None]
        if reach.window is not None:
            sees_TC &= (keys_C < reach.sinks) | (keys_C > queries_T[:, None] - reach.window)
        num_sinks = int((keys_C < reach.sinks).sum()) if reach.sinks else None
        blocks_N, kept, sees = (upload(x, self.cache.device) for x in (table_N[blocks], kept_C, sees_TC))
        return _View(tokens, blocks_N, slice(len(kept_C)) if first == 0 else kept, sees, num_sinks)


class _View(NamedTuple):
    """What a row's queries see of one group.

    Attributes:
        blocks_N: those that are gathered.
        kept_C: which of their tokens are used; a slice where nothing is left out, so that nothing is copied.
        num_sinks: how many of these are sinks, which come first; None where the group has none.
    """

    tokens: slice
    blocks_N: Tensor
    kept_C: Tensor | slice
    sees_TC: Tensor
    num_sinks: int | None


def _with_sinks(q_THD: Tensor, q_sinks_THD: Tensor | None) -> Tensor:
    assert q_sinks_THD is not None, "a layer with sinks needs queries for them"
    return torch.cat([q_THD, q_sinks_THD], dim=-1)
