"""The small operations fused for float32 on CPU, in Numba: one call each.

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

from headwise.workers.ops.plain import PlainOps

PARALLEL_FROM = 16_384
"""Elements from which on threads pay."""


class CpuOps(PlainOps):
    """See :class:`~headwise.workers.ops.Ops`. What is not fused here is torch's."""

    def rms_norm(self, x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        out_TE = torch.empty_like(x_TE)
        _pick(_norm, x_TE)(x_TE.numpy(), weight_E.numpy(), np.float32(eps), out_TE.numpy())
        return out_TE

    def add_rms_norm(self, residual_TE: Tensor, delta_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        out_TE = torch.empty_like(residual_TE)
        arrays = (residual_TE.numpy(), delta_TE.numpy(), weight_E.numpy())
        _pick(_add_norm, residual_TE)(*arrays, np.float32(eps), out_TE.numpy())
        return out_TE

    def rope_(self, x_TXD: Tensor, num_heads: int, cos_TD: Tensor, sin_TD: Tensor) -> None:
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
