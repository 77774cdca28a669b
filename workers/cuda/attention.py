"""Paged attention on a GPU: one Triton kernel for prefill chunks and decodes, and one that adds up divided contexts."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from headwise.workers.cuda.attention_plan import Items, cut_step
from headwise.workers.cuda.launch import INTERPRETED, TRITON, num_programs, padded
from headwise.workers.cuda.tiling import Tiling, tilings
from headwise.workers.kv.cache import KVCache
from headwise.workers.model.attention import AttentionBackend, AttentionBatch
from headwise.workers.upload import upload

HEAD_DIMS = (64, 80, 96, 128, 256)
"""Those of Llama models and their like; others work, and nobody has seen what their kernels become."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TritonAttention(AttentionBackend):
    """Any group of query heads up to 64, float32, bfloat16 and float16; sums are float32.

    For one shape of row, that is tokens of the step and context, the bits of its output do not depend on the batch.
    """

    transposed_keys = False

    def __init__(self, cache: KVCache, q_starts: tuple[int, ...], scale: float) -> None:
        super().__init__(cache, q_starts, scale)
        self._group = int(np.diff(q_starts).max())
        self._tilings = tilings(cache.dtype, cache.head_dim, self._group)
        self._q_starts = upload(np.array(q_starts, np.int32), cache.device)
        # The kernels compute 2 ** x, so the scores carry the logarithm.
        self._scale = scale * math.log2(math.e)
        self._sums = torch.empty(0, device=cache.device)
        self._tables_BN = torch.empty(0)
        self._works: list[_Work] = []

    @classmethod
    def obstacles(cls, device: torch.device, dtype: torch.dtype, block_size: int, head_dim: int) -> list[str]:
        checks = {
            f"device={device.type} is not cuda": device.type == "cuda" or INTERPRETED,
            f"dtype={str(dtype).removeprefix('torch.')} is none of float32, bfloat16, float16": dtype in _DTYPES,
            f"head_dim={head_dim} is no multiple of 8 from 16 to 256": head_dim % 8 == 0 and 16 <= head_dim <= 256,
            "triton is not installed (pip install 'headwise[cuda]')": TRITON,
        }
        return [obstacle for obstacle, fits in checks.items() if not fits]

    def begin(self, batch: AttentionBatch) -> None:
        device = self.cache.device
        self._tables_BN = upload(np.ascontiguousarray(batch.block_tables_BN), device)
        cut = cut_step(batch, self._group, self._tilings[1].rows)
        self._works = [self._work(*both) for both in zip(self._tilings, cut, strict=True) if len(both[1].items_I8)]
        floats = max((work.num_sums for work in self._works), default=0) * (self.cache.head_dim + 2)
        if floats > len(self._sums):
            self._sums = torch.empty(floats, device=device)

    def _work(self, tiling: Tiling, items: Items) -> _Work:
        device, num_kv_heads = self.cache.device, self.cache.num_kv_heads
        num_items = len(items.items_I8)
        return _Work(
            tiling,
            upload(items.items_I8, device),
            upload(np.array([num_items], np.int32), device),
            num_programs(num_items * num_kv_heads, device),
            items.num_slots * num_kv_heads * tiling.rows,
        )

    def attend(self, layer: int, q_THD: Tensor) -> Tensor:
        from headwise.workers.cuda import attention_kernels as kernels  # who computes on a CPU needs no Triton

        o_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        cache, keys, values = self.cache, self.cache.keys[layer], self.cache.values[layer]
        sizes = {
            "NUM_KV_HEADS": cache.num_kv_heads,
            "HEAD_DIM": cache.head_dim,
            "GROUP": self._group,
            "PADDED_DIM": padded(cache.head_dim),
            "NUM_HEADS": self.q_starts[-1],
        }
        for work in self._works:
            programs, tiling = (work.num_programs,), work.tiling
            shared = (work.items_I8, work.num_items_1, self._q_starts, work.num_sums)
            kernels.attend[programs](
                *(o_THD, self._sums, q_THD, keys, values, self._tables_BN),
                *shared,
                *(self._scale, q_THD.stride(0), self._tables_BN.stride(0)),
                **sizes,
                ROWS=tiling.rows,
                KEYS=tiling.keys,
                BLOCK_SIZE=cache.block_size,
                INTERPRETED=INTERPRETED,
                num_warps=tiling.warps,
                num_stages=tiling.stages,
            )
            if work.num_sums:
                elements = tiling.rows * sizes["PADDED_DIM"]
                warps = min(16, max(4, elements // 256))  # 8 elements of each sum a thread; with more, registers spill
                kernels.add_parts[programs](o_THD, self._sums, *shared, **sizes, ROWS=tiling.rows, num_warps=warps)
        return o_THD


class _Work(NamedTuple):
    """The items of tiles of one size, on the device."""

    tiling: Tiling
    items_I8: Tensor
    num_items_1: Tensor
    num_programs: int
    num_sums: int
