"""A weight prepared for its device: prepacked for MKL on CPU at float32, plain everywhere else."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

PACK_ROWS = 64
"""The row count MKL packs for. One packing at 64 was the fastest over 1 to 700 rows; packed for one row, 32 rows
and more are up to twice as slow."""


class Linear:
    """``y = x W^T + b``.

    Attributes:
        in_features, out_features: the weight is ``[out_features, in_features]``.
        nbytes: memory held, in bytes, packed copies included.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        """Takes the weight; on CPU the plain copy is kept only by whoever else holds it."""
        self.out_features, self.in_features = weight_OI.shape
        self._bias_O = bias_O
        self._packed: Tensor | None = None
        if mkl_packs(weight_OI):
            self._packed = torch.ops.mkl._mkl_reorder_linear_weight(weight_OI.contiguous(), PACK_ROWS)
            # The operator asks the plain weight for its shape only, as long as the packed one fits the call.
            self._weight_OI = weight_OI.new_empty(1).expand(weight_OI.shape)
            self.nbytes = self.out_features * self.in_features * weight_OI.element_size()
        else:
            self._weight_OI = weight_OI
            self.nbytes = weight_OI.nbytes
        self.nbytes += bias_O.nbytes if bias_O is not None else 0

    def __call__(self, x_TI: Tensor) -> Tensor:
        """``[T, in_features]`` to ``[T, out_features]``, in x's dtype."""
        if self._packed is None:
            return functional.linear(x_TI, self._weight_OI, self._bias_O)
        out_TO: Tensor = torch.ops.mkl._mkl_linear(x_TI, self._packed, self._weight_OI, self._bias_O, x_TI.shape[0])
        return out_TO

    def shares(self, weight_OI: Tensor) -> bool:
        """Whether this linear reads the very memory of ``weight_OI`` instead of holding a copy."""
        return self._packed is None and self._weight_OI.data_ptr() == weight_OI.data_ptr()


def mkl_packs(weight_OI: Tensor) -> bool:
    """Whether this build of torch can prepack the weight (float32 on an x86 CPU, with MKL's private operators)."""
    return (
        weight_OI.device.type == "cpu"
        and weight_OI.dtype == torch.float32
        and weight_OI.numel() > 0
        and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkl, "_mkl_reorder_linear_weight")
        and hasattr(torch.ops.mkl, "_mkl_linear")
    )
