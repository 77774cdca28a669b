"""Paged attention on CPU cores, fp32: flash-style kernels that read each block of keys and values in place."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from headwise.workers.cpu import attention_kernels as kernels
from headwise.workers.cpu.attention_plan import RUN_KEYS, Sizes, cut_step, rows_of_item
from headwise.workers.cpu.team import launching, team_bytes, usable_threads
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.cache import KVCache
from headwise.workers.kv.format import KvFormat
from headwise.workers.kv.policy import KvPolicy
from headwise.workers.model.attention import AttentionBackend, AttentionBatch, no_policies

_LANES = 8
"""Elements of a head that the kernels read at a time."""


class CpuAttention(AttentionBackend):
    """Numba kernels over a cache with transposed keys: fp32 only; other dtypes go to the reference.

    Work is cut into items (row, KV head, tile of queries, stretch of context) that threads take from a queue, longest
    first; the heads of a group and the queries of a tile share each pass over keys and values. With one thread
    Numba's thread pool is never entered, so several ranks may run in threads of one process. An instance serves one
    calling thread at a time.

    Args:
        num_threads: most threads one call may use.

    Attributes:
        sizes, work: what a compiled step attends by, ``work`` from ``begin`` on.
        layers: where the cache holds each layer's keys and values.

    Raises:
        InvalidValueError: the cache's dtype, block size, head dim, device or key layout is not what the kernels read.
    """

    transposed_keys = True
    work: kernels.Work

    def __init__(self, cache: KVCache, q_starts: tuple[int, ...], scale: float, num_threads: int = 1) -> None:
        super().__init__(cache, q_starts, scale)
        if obstacles := self.obstacles(cache.device, cache.dtype, cache.block_size, cache.head_dim):
            raise InvalidValueError("attention", "cpu", " and ".join(obstacles), "use the reference backend")
        self._threads = usable_threads(num_threads)
        self._q_starts = np.array(q_starts, dtype=np.int64)
        max_rows = rows_of_item(self._q_starts)
        self.sizes = Sizes(cache.num_blocks, cache.num_kv_heads, cache.block_size, cache.head_dim, max_rows)
        # The kernels compute 2 ** x, so the queries carry the logarithm.
        self._scale = np.float32(scale * math.log2(math.e))
        self._scratch_bytes = 4 * kernels.scratch_floats(self.sizes)
        scratch_bytes = self._threads * self._scratch_bytes
        self._scratch = torch.zeros(scratch_bytes + team_bytes(self._threads) + 64, dtype=torch.uint8)
        self._scratch_address = -(-self._scratch.data_ptr() // 64) * 64
        self._team_address = self._scratch_address + scratch_bytes
        self._sums = torch.empty(0)
        self._num_tokens = 0
        self.layers = [
            kernels.LayerKV(keys.data_ptr(), values.data_ptr())
            for keys, values in zip(cache.keys, cache.values, strict=True)
        ]

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
            f"device={device.type} is not cpu": device.type == "cpu",
            f"dtype={str(dtype).removeprefix('torch.')} is not float32": dtype is torch.float32,
            f"block_size={block_size} is not a multiple of {RUN_KEYS}": block_size % RUN_KEYS == 0,
            f"head_dim={head_dim} is not a multiple of {_LANES}": head_dim % _LANES == 0,
        }
        return [*(obstacle for obstacle, fits in checks.items() if not fits), *no_policies(dtype, format, policy)]

    def begin(self, batch: AttentionBatch) -> None:
        """
        Raises:
            InvalidValueError: rows, context and blocks do not fit each other or the cache.
        """
        step = cut_step(batch, self.sizes, self._q_starts, self._threads)
        floats = kernels.sums_floats(step.sums_rows, self.sizes.head_dim)
        if floats > len(self._sums):
            self._sums = torch.empty(floats)
        memory = (self._scratch_address, self._scratch_bytes, self._sums.data_ptr())
        self.work = kernels.Work(*step, self._scale, *memory)
        self._num_tokens = int(batch.query_starts_B1[-1])

    def attend(self, layer: int, q_THD: Tensor, q_sinks_THD: Tensor | None = None) -> Tensor:
        shape = (self._num_tokens, self.q_starts[-1], self.cache.head_dim)
        if q_THD.shape != shape or q_THD.dtype is not torch.float32 or q_THD.stride(2) != 1:
            given = (q_THD.dtype, tuple(q_THD.shape), q_THD.stride())
            raise InvalidValueError("q_THD", given, f"must be float32 {shape} with a contiguous last dimension")
        o_THD = torch.empty(shape)
        q, o = (kernels.Heads(x_THD.data_ptr(), x_THD.stride(0), x_THD.stride(1)) for x_THD in (q_THD, o_THD))
        run = kernels.attend_in_threads if self._threads > 1 else kernels.attend_alone
        with launching(self._threads):
            run(self.work, self.sizes, q, self.layers[layer], o, self._team_address, self._threads)
        return o_THD
