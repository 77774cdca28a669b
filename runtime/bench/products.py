"""The matrix products that are tried for a machine's limits: every one there is here for float32 on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from headwise.workers.cpu.linear import PackedLinear, multiply_all

Chain = Callable[[Sequence[Tensor]], Tensor]
"""Multiplies inputs, each ``[rows, in_features]``, by weights that were prepared once, in their order; returns the last
product."""

Factory = Callable[[Sequence[Tensor]], Chain]
"""From weights ``[out_features, in_features]``."""

PACK_ROWS = 64
"""The row count that packing is told to expect: with it, products of 1 to 1,024 rows were the fastest."""


def headwise(weights: Sequence[Tensor]) -> Chain:
    """Headwise's own, one after another in one call as its steps do them, without what comes between."""
    linears = [PackedLinear(weight_OI) for weight_OI in weights]
    columns = [len(weight_OI) for weight_OI in weights]
    threads = torch.get_num_threads()

    def multiply(inputs: Sequence[Tensor]) -> Tensor:
        used = linears[: len(inputs)]
        inputs = [_as_deep(x_TI, linear.depth) for x_TI, linear in zip(inputs, used, strict=True)]
        room = torch.empty(max(len(x_TI) * linear.width for x_TI, linear in zip(inputs, used, strict=True)))
        multiply_all(used, inputs, [room] * len(used), threads)
        width = used[-1].width
        return room[: len(inputs[-1]) * width].view(-1, width)[:, : columns[len(used) - 1]]

    return multiply


def plain(weights: Sequence[Tensor]) -> Chain:
    """torch's own, on the weight as it is."""
    return _one_by_one([partial(_linear, weight_OI) for weight_OI in weights])


def mkl(weights: Sequence[Tensor]) -> Chain:
    """MKL's, on packed weights, by private operators of torch."""

    def prepare(weight_OI: Tensor) -> Callable[[Tensor], Tensor]:
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight_OI, PACK_ROWS)
        # The operator asks the plain weight for its shape only, as long as the packed one fits the call.
        shape_OI = weight_OI.new_empty(1).expand(weight_OI.shape)
        return lambda x_TI: torch.ops.mkl._mkl_linear(x_TI, packed, shape_OI, None, x_TI.shape[0])

    return _one_by_one([prepare(weight_OI) for weight_OI in weights])


def onednn(weights: Sequence[Tensor]) -> Chain:
    """oneDNN's, on packed weights, by private operators of torch."""

    def prepare(weight_OI: Tensor) -> Callable[[Tensor], Tensor]:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, PACK_ROWS)
        return lambda x_TI: torch.ops.mkldnn._linear_pointwise(x_TI, packed, None, "none", [], "")

    return _one_by_one([prepare(weight_OI) for weight_OI in weights])


def products() -> dict[str, Factory]:
    """By name, those that there are here."""
    found: dict[str, Factory] = {"headwise": headwise, "torch": plain}
    if torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear"):  # type: ignore[no-untyped-call]
        found["mkl"] = mkl
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # type: ignore[no-untyped-call]
        found["onednn"] = onednn
    return found


def _linear(weight_OI: Tensor, x_TI: Tensor) -> Tensor:
    return functional.linear(x_TI, weight_OI)


def _as_deep(x_TI: Tensor, depth: int) -> Tensor:
    missing = depth - x_TI.shape[1]
    return functional.pad(x_TI, (0, missing)) if missing else x_TI


def _one_by_one(linears: Sequence[Callable[[Tensor], Tensor]]) -> Chain:
    def multiply(inputs: Sequence[Tensor]) -> Tensor:
        # Only the last is kept: an engine does not hold on to them either.
        for x_TI, linear in zip(inputs, linears, strict=False):
            y_TO = linear(x_TI)
        return y_TO

    return multiply
