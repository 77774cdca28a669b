"""Paged attention on CPU cores, fp32: flash-style kernels that read each block of keys and values in place."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwise.workers.cpu import attention_kernels as kernels
from headwise.workers.cpu.attention_plan import NO_WINDOW, RUN_KEYS, Groups, Sizes, cut_step, rows_of_item
from headwise.workers.cpu.kv_records import FORMS, PLANE_WORDS, LayerKV, Plane
from headwise.workers.cpu.team import launching, team_bytes, usable_threads
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.cache import KVCache, dtype_name
from headwise.workers.kv.format import BITS, KvFormat, group_size, record_bytes
from headwise.workers.kv.policy import KvPolicy
from headwise.workers.model.attention import AttentionBackend, AttentionBatch

_LANES = 8
"""Elements of a head that the kernels read at a time."""


class CpuAttention(AttentionBackend):
    """Numba kernels over a cache with transposed keys. They compute in fp32; other dtypes go to the reference.

    Work is cut into items (row, KV head, tile of queries, stretch of context) that threads take from a queue, longest
    first; the heads of a group and the queries of a tile share each pass over keys and values. With one thread
    Numba's thread pool is never entered, so several ranks may run in threads of one process. An instance serves one
    calling thread at a time.

    Args:
        num_threads: most threads one call may use.

    Attributes:
        sizes, work: what a compiled step attends by, ``work`` from ``begin`` on.
        groups: of the cache.
        layers: where the cache holds each layer's keys and values.

    Raises:
        InvalidValueError: the cache's block size, head dim, device or key layout is not what the kernels read.
    """

    transposed_keys = True
    work: kernels.Work

    def __init__(self, cache: KVCache, q_starts: tuple[int, ...], scale: float, num_threads: int = 1) -> None:
        super().__init__(cache, q_starts, scale)
        checked = (cache.device, torch.float32, cache.block_size, cache.head_dim, cache.format, cache.policy)
        if obstacles := self.obstacles(*checked):
            raise InvalidValueError("attention", "cpu", " and ".join(obstacles), "use the reference backend")
        self._threads = usable_threads(num_threads)
        self._q_starts = np.array(q_starts, dtype=np.int64)
        self.groups, kinds_L = groups_of(cache)
        self.sizes = _sizes_of(cache, rows_of_item(self._q_starts))
        # The kernels compute 2 ** x, so the queries carry the logarithm.
        self._scale = np.float32(scale * math.log2(math.e))
        self._scratch_bytes = 4 * kernels.scratch_floats(self.sizes)
        scratch_bytes = self._threads * self._scratch_bytes
        self._scratch = torch.zeros(scratch_bytes + team_bytes(self._threads) + 64, dtype=torch.uint8)
        self._scratch_address = -(-self._scratch.data_ptr() // 64) * 64
        self._team_address = self._scratch_address + scratch_bytes
        self._sums = torch.empty(0)
        self._num_tokens = 0
        self._planes_LKW = planes_of(cache)
        self.layers = [
            LayerKV(planes_KW.ctypes.data, kind) for planes_KW, kind in zip(self._planes_LKW, kinds_L, strict=True)
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
            f"dtype={dtype_name(dtype)} is not float32": dtype is torch.float32,
            f"block_size={block_size} is not a multiple of {RUN_KEYS}": block_size % RUN_KEYS == 0,
            f"head_dim={head_dim} is not a multiple of {_LANES}": head_dim % _LANES == 0,
        }
        return [obstacle for obstacle, fits in checks.items() if not fits]

    def begin(self, batch: AttentionBatch) -> None:
        """
        Raises:
            InvalidValueError: rows, context and blocks do not fit each other or the cache.
        """
        step = cut_step(batch, self.sizes, self.groups, self._q_starts, self._threads)
        floats = kernels.sums_floats(step.sums_rows, self.sizes.head_dim)
        if floats > len(self._sums):
            self._sums = torch.empty(floats)
        memory = (self._scratch_address, self._scratch_bytes, self._sums.data_ptr())
        self.work = kernels.Work(*step, self._scale, *memory)
        self._num_tokens = int(batch.query_starts_B1[-1])

    def attend(self, layer: int, q_THD: Tensor, q_sinks_THD: Tensor | None = None) -> Tensor:
        if q_sinks_THD is None:
            if self.cache.policy.sinks_of_layer(layer) is not None:
                raise InvalidValueError("q_sinks_THD", None, f"must be given, for heads of layer {layer} have sinks")
            q_sinks_THD = q_THD
        q, q_sinks = self._heads("q_THD", q_THD), self._heads("q_sinks_THD", q_sinks_THD)
        o_THD = torch.empty(q_THD.shape)
        o = kernels.Heads(o_THD.data_ptr(), o_THD.stride(0), o_THD.stride(1))
        run = kernels.attend_in_threads if self._threads > 1 else kernels.attend_alone
        with launching(self._threads):
            run(self.work, self.sizes, q, q_sinks, self.layers[layer], o, self._team_address, self._threads)
        return o_THD

    def _heads(self, name: str, x_THD: Tensor) -> kernels.Heads:
        shape = (self._num_tokens, self.q_starts[-1], self.cache.head_dim)
        if x_THD.shape != shape or x_THD.dtype is not torch.float32 or x_THD.stride(2) != 1:
            given = (x_THD.dtype, tuple(x_THD.shape), x_THD.stride())
            raise InvalidValueError(name, given, f"must be float32 {shape} with a contiguous last dimension")
        return kernels.Heads(x_THD.data_ptr(), x_THD.stride(0), x_THD.stride(1))


def groups_of(cache: KVCache) -> tuple[Groups, list[int]]:
    """The groups of a cache, and the kind of each layer."""
    policy = cache.policy
    used = {group for groups_K in policy.groups_LK for group in groups_K}
    blocks = [blocks if group in used else 0 for group, blocks in enumerate(cache.group_blocks)]
    sinks = [reach.sinks for reach in policy.reaches]
    windows = [NO_WINDOW if reach.window is None else reach.window for reach in policy.reaches]
    kinds = list(dict.fromkeys(policy.groups_LK))
    arrays = (np.array(x, np.int64) for x in (blocks, sinks, windows, kinds))
    return Groups(*arrays), [kinds.index(groups_K) for groups_K in policy.groups_LK]


def planes_of(cache: KVCache) -> NDArray[np.int64]:
    """[L, K, PLANE_WORDS]: see :class:`~headwise.workers.cpu.kv_records.Plane`."""
    planes_LKW = np.zeros((cache.num_layers, cache.num_kv_heads, PLANE_WORDS), np.int64)
    for planes_KW, parts in zip(planes_LKW, cache.parts, strict=True):
        for part in parts:
            for place, head in enumerate(part.heads):
                at = [
                    word
                    for x in (part.keys, part.values)
                    for word in (x[:, place].data_ptr(), x.stride(0) * x.element_size())
                ]
                planes_KW[head] = Plane(part.group, *at)
    return planes_LKW


def _sizes_of(cache: KVCache, max_rows: int) -> Sizes:
    forms = [FORMS[kind] for kind in cache.format]
    groups = [group_size(kind, cache.head_dim) if kind in BITS else 0 for kind in cache.format]
    size, head_dim = cache.block_size, cache.head_dim
    vector_bytes = [-(-16 * record_bytes(kind, size, head_dim) // (size * head_dim)) for kind in cache.format]
    return Sizes(cache.num_kv_heads, size, head_dim, max_rows, *forms, *groups, *vector_bytes)
