"""Attention by FlashInfer's kernels, where that library is installed and asked for.

Written for flashinfer-python 0.7.2, and not run on a GPU yet. Each step is planned on the host, so there are no graphs.
"""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwise.workers.cuda import gpu
from headwise.workers.cuda.launch import TRITON
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.cache import KVCache
from headwise.workers.kv.format import KvFormat
from headwise.workers.kv.policy import KvPolicy
from headwise.workers.model.attention import AttentionBackend, AttentionBatch, no_policies

PACKAGE = "flashinfer"
HEAD_DIMS = (64, 128, 256)
_DTYPES = (torch.bfloat16, torch.float16)

_WORKSPACE_BYTES = 384 << 20
"""For the parts of divided contexts. The library recommends 128 MiB, which head_dim=256 can exceed."""
_TENSOR_CORE_GROUP = 4
"""From so many query heads of a KV head on, tensor cores decode faster; without them, not every group has a kernel."""


class FlashInferAttention(AttentionBackend):
    """Groups of one size on each rank, bfloat16 and float16. The bits of a row's output depend on its batch."""

    transposed_keys = False

    def __init__(self, cache: KVCache, q_starts: tuple[int, ...], scale: float) -> None:
        """
        Raises:
            InvalidValueError: the KV heads of this rank have different numbers of query heads.
        """
        super().__init__(cache, q_starts, scale)
        groups = [stop - start for start, stop in pairwise(q_starts)]
        if len(set(groups)) > 1:
            limit = f"needs equally many query heads for each KV head, and on this rank they have {groups}"
            fix = "take another tensor_parallel_size (--tp), or leave attention out"
            raise InvalidValueError("attention", PACKAGE, limit, fix)
        flashinfer = importlib.import_module(PACKAGE)
        # Zeros, because some of its kernels count in there. A step uses one of the two, so they can share.
        workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=cache.device)
        # HND is the cache's own layout: [blocks, KV heads, block_size, head_dim].
        self._mixed = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        self._decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_tensor_cores=groups[0] >= _TENSOR_CORE_GROUP
        )
        self._planned = self._mixed
        self._gpu = gpu.of(cache.device)
        self._plan_taken: gpu.Event | None = None

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
        """See :class:`AttentionBackend`; every block size will do."""
        checks = {
            f"device={device.type} is not cuda": device.type == "cuda",
            f"dtype={str(dtype).removeprefix('torch.')} is neither bfloat16 nor float16": dtype in _DTYPES,
            f"head_dim={head_dim} is none of {', '.join(map(str, HEAD_DIMS))}": head_dim in HEAD_DIMS,
            "flashinfer is not installed (pip install flashinfer-python)": _installed(),
            "triton, for what is not attention, is not installed (pip install 'headwise[cuda]')": TRITON,
        }
        return [*(obstacle for obstacle, fits in checks.items() if not fits), *no_policies(dtype, format, policy)]

    def begin(self, batch: AttentionBatch) -> None:
        cache, size = self.cache, self.cache.block_size
        blocks_B = -(-batch.context_lens_B // size)
        starts_B1 = np.concatenate(([0], np.cumsum(blocks_B)))
        used_BN = np.arange(batch.block_tables_BN.shape[1]) < blocks_B[:, None]
        # Planning reads them on the host; on the device, it would wait for the steps before.
        pages = [
            self._host(x) for x in (starts_B1, batch.block_tables_BN[used_BN], (batch.context_lens_B - 1) % size + 1)
        ]
        if self._plan_taken is not None:
            # A wrapper has one page-locked buffer for all its plans, from which the last may be on its way still.
            self._plan_taken.synchronize()
        sizes = (self.q_starts[-1], cache.num_kv_heads, cache.head_dim, size)
        types: dict[str, Any] = {"sm_scale": self.scale, "q_data_type": cache.dtype, "kv_data_type": cache.dtype}
        if (np.diff(batch.query_starts_B1) == 1).all():
            self._planned = self._decode
            self._decode.plan(*pages, *sizes, **types)
        else:
            self._planned = self._mixed
            self._mixed.plan(self._host(batch.query_starts_B1), *pages, *sizes, causal=True, **types)
        if self._gpu is not None:
            self._plan_taken = self._gpu.new_event()
            self._plan_taken.record(self._gpu.current_stream())

    def attend(self, layer: int, q_THD: Tensor, q_sinks_THD: Tensor | None = None) -> Tensor:
        # Contiguous, because not all of its kernels heed strides.
        o_THD: Tensor = self._planned.run(q_THD.contiguous(), (self.cache.keys[layer], self.cache.values[layer]))
        return o_THD

    def _host(self, array: NDArray[Any]) -> Tensor:
        """Page-locked where there is a GPU, so that copies from there need not be waited for."""
        tensor = torch.from_numpy(np.ascontiguousarray(array, np.int32))
        return tensor.pin_memory() if self.cache.device.type == "cuda" else tensor


def _installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None
