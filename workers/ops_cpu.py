"""The small operations fused for float32 on CPU, in Numba: one pass over the data and one call each.

Each has a serial form too. A step of a few rows is over before a second thread has woken, and several ranks with a
thread each must not meet in one thread pool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

PARALLEL_FROM = 32_768
"""Elements from which on threads pay: about 10 us of work for one."""


def add_rms_norm(residual_TE: Tensor, delta_TE: Tensor | None, weight_E: Tensor, eps: float) -> Tensor:
    """As :func:`headwise.workers.ops.add_rms_norm`; without a delta only the norm. Contiguous tensors."""
    out_TE = torch.empty_like(residual_TE)
    residual, out = residual_TE.numpy(), out_TE.numpy()
    if delta_TE is None:
        _pick(_norm, residual_TE)(residual, weight_E.numpy(), np.float32(eps), out)
    else:
        _pick(_add_norm, residual_TE)(residual, delta_TE.numpy(), weight_E.numpy(), np.float32(eps), out)
    return out_TE


def rope_(x_TXD: Tensor, num_heads: int, cos_TD: Tensor, sin_TD: Tensor) -> None:
    """As :func:`headwise.workers.ops.rope_`. Contiguous tensors."""
    _pick(_rope, x_TXD)(x_TXD.numpy(), num_heads, cos_TD.numpy(), sin_TD.numpy())


def _both(function: Callable[..., None]) -> tuple[Any, Any]:
    """The serial and the parallel form of a kernel."""
    options: Any = {"cache": True, "nogil": True, "fastmath": {"contract", "reassoc", "nsz", "arcp"}}
    return njit(**options)(function), njit(parallel=True, **options)(function)


def _pick(forms: tuple[Any, Any], x: Tensor) -> Any:
    return forms[x.numel() >= PARALLEL_FROM and torch.get_num_threads() > 1]


def _add_norm_rows(residual_TE: Any, delta_TE: Any, weight_E: Any, eps: Any, out_TE: Any) -> None:
    width = residual_TE.shape[1]
    for t in prange(residual_TE.shape[0]):
        squares = np.float32(0)
        for e in range(width):
            value = residual_TE[t, e] + delta_TE[t, e]
            residual_TE[t, e] = value
            squares += value * value
        scale = np.float32(1) / np.sqrt(squares / np.float32(width) + eps)
        for e in range(width):
            out_TE[t, e] = residual_TE[t, e] * scale * weight_E[e]


def _norm_rows(x_TE: Any, weight_E: Any, eps: Any, out_TE: Any) -> None:
    width = x_TE.shape[1]
    for t in prange(x_TE.shape[0]):
        squares = np.float32(0)
        for e in range(width):
            squares += x_TE[t, e] * x_TE[t, e]
        scale = np.float32(1) / np.sqrt(squares / np.float32(width) + eps)
        for e in range(width):
            out_TE[t, e] = x_TE[t, e] * scale * weight_E[e]


def _rope_rows(x_TXD: Any, num_heads: Any, cos_TD: Any, sin_TD: Any) -> None:
    half = x_TXD.shape[2] // 2
    for t in prange(x_TXD.shape[0]):
        cos, sin = cos_TD[t], sin_TD[t]
        for h in range(num_heads):
            # Halves of their own: LLVM vectorises over them, and would not over half + d, which might wrap.
            first, second = x_TXD[t, h, :half], x_TXD[t, h, half:]
            for d in range(half):
                turned = first[d] * cos[d] - second[d] * sin[d]
                second[d] = second[d] * cos[d] + first[d] * sin[d]
                first[d] = turned


_add_norm, _norm, _rope = _both(_add_norm_rows), _both(_norm_rows), _both(_rope_rows)
