"""Paged attention on a GPU: one Triton kernel for prefill chunks and decodes, and one that adds up divided contexts."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from headwise.workers.cuda.attention_plan import Items, cut_step
from headwise.workers.cuda.launch import FP_FUSION, INTERPRETED, TRITON, num_programs, padded
from headwise.workers.cuda.step_pack import pack_attention
from headwise.workers.cuda.tiling import SMALL_ROWS, Tiling, tilings
from headwise.workers.kv.cache import KVCache
from headwise.workers.kv.format import KvFormat
from headwise.workers.kv.policy import KvPolicy
from headwise.workers.model.attention import AttentionBackend, AttentionBatch, no_policies
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
        self._step_I = torch.empty(0)
        self._launches: list[_Launch] = []

    @classmethod
    def obstacles(
        cls,
        device: torch.device,
        dtype: torch.dtype,
        block_size: int,
        head_dim: int,
        format: KvFormat | None = None,
        policy: KvPolicy | None = None,
    ) -> list[str]:
        checks = {
            f"device={device.type} is not cuda": device.type == "cuda" or INTERPRETED,
            f"dtype={str(dtype).removeprefix('torch.')} is none of float32, bfloat16, float16": dtype in _DTYPES,
            f"head_dim={head_dim} is no multiple of 8 from 16 to 256": head_dim % 8 == 0 and 16 <= head_dim <= 256,
            "triton is not installed (pip install 'headwise[cuda]')": TRITON,
        }
        return [*(obstacle for obstacle, fits in checks.items() if not fits), *no_policies(dtype, format, policy)]

    def begin(self, batch: AttentionBatch) -> None:
        small, large = self.cut(batch)
        pack = pack_attention(batch, small, large)
        step_I = np.empty(pack.size, np.int32)
        pack.write(step_I)
        self.begin_packed(upload(step_I, self.cache.device), small, large)

    def cut(self, batch: AttentionBatch) -> tuple[Items, Items]:
        """The items of small tiles, and those of large ones."""
        return cut_step(batch, self._group, self._tilings[1].rows)

    def begin_packed(self, step_I: Tensor, small: Items, large: Items) -> None:
        """Like :meth:`begin`, of a step whose array (see step_pack.py) is on the device."""
        counts = [(len(items.items_I8), items.num_slots) for items in (small, large)]
        self._begin(step_I, [self._launch(tiles, *count) for tiles, count in enumerate(counts) if count[0]])
        floats = max((self._floats(launch.num_sums) for launch in self._launches), default=0)
        if floats > len(self._sums):
            self._sums = torch.empty(0, device=self.cache.device)  # before there is the next: both take much
            self._sums = torch.empty(floats, device=self.cache.device)

    def begin_capture(self, step_I: Tensor, sums: Tensor, num_slots: int) -> None:
        """What is launched from now on works on any step of one token a row that comes to lie in ``step_I``, as long as
        its items use no more slots.

        Args:
            sums: float32, :meth:`sums_of_decodes` of so many slots.
        """
        self._begin(step_I, [self._launch(self._tiles_of_decodes, None, num_slots)])
        self._sums = sums

    def sums_of_decodes(self, num_slots: int) -> int:
        """How many float32 numbers the sums of so many slots are, of rows with one token."""
        return self._floats(self._launch(self._tiles_of_decodes, None, num_slots).num_sums)

    @property
    def _tiles_of_decodes(self) -> int:
        return 0 if self._group <= SMALL_ROWS else 1

    def _begin(self, step_I: Tensor, launches: list[_Launch]) -> None:
        self._step_I, self._launches = step_I, launches

    def _launch(self, tiles: int, num_items: int | None, num_slots: int) -> _Launch:
        works = None if num_items is None else num_items * self.cache.num_kv_heads
        tiling = self._tilings[tiles]
        num_sums = num_slots * self.cache.num_kv_heads * tiling.rows
        return _Launch(tiles, tiling, num_programs(works, self.cache.device), num_sums)

    def _floats(self, num_sums: int) -> int:
        return num_sums * (self.cache.head_dim + 2)

    def attend(self, layer: int, q_THD: Tensor, q_sinks_THD: Tensor | None = None) -> Tensor:
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
        for launch in self._launches:
            programs, tiling = (launch.num_programs,), launch.tiling
            shared = (self._step_I, self._q_starts, launch.num_sums)
            kernels.attend[programs](
                *(o_THD, self._sums, q_THD, keys, values, *shared, self._scale, q_THD.stride(0)),
                TILES=launch.tiles,
                **sizes,
                ROWS=tiling.rows,
                KEYS=tiling.keys,
                BLOCK_SIZE=cache.block_size,
                INTERPRETED=INTERPRETED,
                num_warps=tiling.warps,
                num_stages=tiling.stages,
                enable_fp_fusion=FP_FUSION,
            )
            if launch.num_sums:
                elements = tiling.rows * sizes["PADDED_DIM"]
                warps = min(16, max(4, elements // 256))  # 8 elements of each sum a thread; with more, registers spill
                kernels.add_parts[programs](
                    *(o_THD, self._sums, *shared),
                    TILES=launch.tiles,
                    **sizes,
                    ROWS=tiling.rows,
                    num_warps=warps,
                    enable_fp_fusion=FP_FUSION,
                )
        return o_THD


class _Launch(NamedTuple):
    """How the items of small tiles, 0, or of large ones, 1, are computed."""

    tiles: int
    tiling: Tiling
    num_programs: int
    num_sums: int
