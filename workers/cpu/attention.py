"""Paged attention on CPU cores, fp32: flash-style kernels that read each block of keys and values in place."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwise.workers.cpu import attention_kernels as kernels
from headwise.workers.cpu.attention_plan import RUN_KEYS, StepItems, cut_step, rows_of_item
from headwise.workers.cpu.team import launching, team_bytes
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.cache import KVCache
from headwise.workers.model.attention import AttentionBackend, AttentionBatch


class KernelInputs(NamedTuple):
    """The arguments of cpu_kernels.py for a step: its items, tables, q_starts and sizes, the tokens' slots, the scale
    for powers of 2, and the memory."""

    arrays: tuple[Any, Any, Any, Any]
    slots_T: NDArray[np.int64]
    scale: np.float32
    memory: tuple[int, int, int, int]


class CpuAttention(AttentionBackend):
    """Numba kernels over a cache with transposed keys: fp32 only; other dtypes go to the reference.

    Work is cut into items (row, KV head, tile of queries, stretch of context) that threads take from a queue, longest
    first; the heads of a group and the queries of a tile share each pass over keys and values. With one thread
    Numba's thread pool is never entered, so several ranks may run in threads of one process. An instance serves one
    calling thread at a time.

    Raises:
        InvalidValueError: the cache's dtype, block size, head dim, device or key layout is not what the kernels read.
    """

    transposed_keys = True

    def __init__(self, cache: KVCache, q_starts: tuple[int, ...], scale: float, num_threads: int = 1) -> None:
        super().__init__(cache, q_starts, scale, num_threads)
        if not self.supports(cache.dtype, cache.block_size, cache.head_dim) or cache.device.type != "cpu":
            given = (str(cache.device), str(cache.dtype), cache.block_size, cache.head_dim)
            limit = (
                f"the cpu backend needs float32 on cpu, block_size a multiple of {RUN_KEYS}, head_dim a multiple of 8"
            )
            raise InvalidValueError("attention_backend", given, limit, "use the reference backend")
        self.num_threads = min(num_threads, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
        self._q_starts = np.array(q_starts, dtype=np.int64)
        self._max_rows = rows_of_item(self._q_starts)
        o_stride = q_starts[-1] * cache.head_dim
        sizes = (cache.num_kv_heads, cache.block_size, cache.head_dim, o_stride, self._max_rows, cache.num_blocks)
        self._sizes = np.array(sizes, dtype=np.int64)
        # The kernels compute 2 ** x, so the queries carry the logarithm.
        self._scale = np.float32(scale * math.log2(math.e))
        self._scratch_bytes = 4 * kernels.scratch_floats(self._max_rows, cache.head_dim)
        scratch_bytes = self.num_threads * self._scratch_bytes
        self._scratch = torch.zeros(scratch_bytes + team_bytes(self.num_threads) + 64, dtype=torch.uint8)
        self._scratch_address = -(-self._scratch.data_ptr() // 64) * 64
        self._team_address = self._scratch_address + scratch_bytes
        self._parts = torch.empty(0)
        self._step: StepItems | None = None
        self.layers = [
            (keys.data_ptr(), values.data_ptr()) for keys, values in zip(cache.keys, cache.values, strict=True)
        ]

    @staticmethod
    def supports(dtype: torch.dtype, block_size: int, head_dim: int) -> bool:
        return dtype is torch.float32 and block_size % RUN_KEYS == 0 and head_dim % 8 == 0

    def kernel_inputs(self, batch: AttentionBatch, o_stride: int) -> KernelInputs:
        """What a compiled step needs to attend by itself; ``o_stride`` floats lie between two tokens' outputs.

        Raises:
            InvalidValueError: slots are not in the cache, or rows, context and blocks do not fit each other.
        """
        step = self._items_of(batch)
        slots_T, limit = step.slots_T, self.cache.num_blocks * self.cache.block_size
        if len(slots_T) and not 0 <= slots_T.min() <= slots_T.max() < limit:
            raise InvalidValueError("slots_T", slots_T.tolist(), f"must be in [0, {limit - 1}]")
        sizes = self._sizes.copy()
        sizes[3] = o_stride
        arrays = (step.items, step.tables_BN, self._q_starts, sizes)
        memory = (self._scratch_address, self._scratch_bytes, self._parts.data_ptr(), step.num_parts)
        return KernelInputs(arrays, slots_T, self._scale, memory)

    def write(self, layer: int, k_TKD: Tensor, v_TKD: Tensor, batch: AttentionBatch) -> None:
        inputs = self.kernel_inputs(batch, self._sizes[3])
        shape = (len(inputs.slots_T), self.cache.num_kv_heads, self.cache.head_dim)
        k, v = _strided("k_TKD", k_TKD, shape), _strided("v_TKD", v_TKD, shape)
        kernels.write_tokens(inputs.slots_T, self._sizes, k, v, self.layers[layer])

    def attend(self, layer: int, q_THD: Tensor, batch: AttentionBatch) -> Tensor:
        inputs = self.kernel_inputs(batch, self._sizes[3])
        q = _strided("q_THD", q_THD, (len(inputs.slots_T), self.q_starts[-1], self.cache.head_dim))
        o_THD = torch.empty(q_THD.shape, dtype=torch.float32)
        run = kernels.attend_in_threads if self.num_threads > 1 else kernels.attend_alone
        with launching(self.num_threads):
            run(
                inputs.arrays,
                q,
                self.layers[layer],
                inputs.scale,
                o_THD.data_ptr(),
                inputs.memory,
                self._team_address,
                self.num_threads,
            )
        return o_THD

    def _items_of(self, batch: AttentionBatch) -> StepItems:
        if self._step is None or self._step.batch is not batch:
            self._step = cut_step(batch, self.cache, self._q_starts, self.num_threads)
            floats = self._step.num_parts * kernels.part_floats(self._max_rows, self.cache.head_dim)
            if floats > len(self._parts):
                self._parts = torch.empty(floats)
        return self._step


def _strided(name: str, x_TXD: Tensor, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(address, token stride, head stride) of a tensor whose last dimension is contiguous."""
    if x_TXD.shape != shape or x_TXD.dtype is not torch.float32 or x_TXD.stride(2) != 1:
        given = (x_TXD.dtype, tuple(x_TXD.shape), x_TXD.stride())
        raise InvalidValueError(name, given, f"must be float32 {shape} with a contiguous last dimension")
    return x_TXD.data_ptr(), x_TXD.stride(0), x_TXD.stride(1)
