"""The interface between the plain model and whatever computes the small operations between its matrix products."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from headwise.workers.kv.cache import KVCache


class Ops(Protocol):
    """The operations of one kind of device."""

    def rms_norm(self, x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm (Zhang and Sennrich, 2019), computed in float32."""

    def add_rms_norm(self, residual_TE: Tensor, delta_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        """Adds ``delta`` to ``residual`` in place and returns the norm of the sum."""

    def silu_mul(self, gate_up_TM: Tensor) -> Tensor:
        """SwiGLU's gate (Shazeer, 2020): ``silu(gate) * up`` of ``[T, 2 M]``, gate first, to ``[T, M]``."""

    def rotate_and_write(
        self, qkv_TXD: Tensor, cos_TD: Tensor, sin_TD: Tensor, cache: KVCache, layer: int, slots_T: Tensor
    ) -> None:
        """Turns queries and keys to their positions (rotary embedding; Su et al., 2021), in place, and then puts keys
        and values into a layer of the cache.

        Args:
            qkv_TXD: heads of queries, then the cache's number of heads of keys, then as many of values.
            cos_TD, sin_TD: [T, D/2], of each token's position; dimension i turns with i + D/2.
            slots_T: int64, block * block_size + offset: where each token goes.
        """
