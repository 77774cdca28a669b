"""The best token of each row of logits, on a GPU: one pass over them, and nothing that the host waits for."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.workers.cuda import argmax_kernels as kernels
from headwise.workers.cuda.launch import FP_FUSION

_COLUMNS = 4096
"""Of a program: 16 numbers a thread."""


def best_keys(logits_BV: Tensor, first_id: int) -> Tensor:
    """As :func:`headwise.workers.sampling.best.best_keys`.

    Args:
        logits_BV: float32, rows contiguous.
    """
    rows, size = logits_BV.shape
    keys_BP = torch.empty((rows, -(-size // _COLUMNS)), dtype=torch.int64, device=logits_BV.device)
    grid, shape = tuple(keys_BP.shape), (first_id, size, logits_BV.stride(0))
    kernels.best_keys[grid](keys_BP, logits_BV, *shape, COLUMNS=_COLUMNS, num_warps=8, enable_fp_fusion=FP_FUSION)
    return keys_BP.amax(dim=1)
