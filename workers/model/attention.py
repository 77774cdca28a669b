"""The interface between the model and whatever computes attention over the paged KV cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.cache import KVCache, dtype_name
from headwise.workers.kv.format import KvFormat
from headwise.workers.kv.policy import KvPolicy


@dataclass(slots=True, eq=False)
class AttentionBatch:
    """The rows of one step as attention sees them, in host memory.

    Attributes:
        query_starts_B1: int32 [B + 1]; row b's tokens are [query_starts[b], query_starts[b + 1]) of the step's T.
        context_lens_B: int32 [B]; tokens of the row that have KV once this step's are written. The row's queries are
            the last of them.
        block_tables_BN: int32 [G * B, most blocks of a row]; the table of row b in group g of the cache's policy is at
            g * B + b. Padded with any block, and any block may stand where the row has none, for no query sees it.
        shifts_B: int64 [G * B]; None is all zero. Key k of the text is at k - shift in the table, except that the sinks
            are where they are in the text. A shift is a multiple of the block size and of PART_KEYS, and above zero
            only if no query of the row sees a key, but for the sinks, that would come to lie in a block of the sinks,
            or before key sinks + 1. So all that is said of positions holds of positions - shift as well.
    """

    query_starts_B1: NDArray[np.int32]
    context_lens_B: NDArray[np.int32]
    block_tables_BN: NDArray[np.int32]
    shifts_B: NDArray[np.int64] | None = None


PART_KEYS = 256
"""Backends that divide a context cut it at multiples of so many keys, counted from the start of the text: so the bits
of a row's output do not depend on how it came to be computed."""


class AttentionBackend(ABC):
    """Attends over the KV cache, in which a step's own keys and values are written already.

    ``begin`` is called once a step, then ``attend`` for each layer. Slots that no token of a row was written to never
    influence that row, whatever they hold.

    Args:
        cache: the shard's KV memory, laid out as ``transposed_keys`` of the backend's class asks or either way where
            it is None.
        q_starts: K + 1 numbers; local query heads [q_starts[k], q_starts[k + 1]) use local KV head k. The groups may
            differ in size.
        scale: what queries times keys are multiplied with, commonly head_dim ** -0.5.
    """

    transposed_keys: ClassVar[bool | None] = None

    def __init__(self, cache: KVCache, q_starts: tuple[int, ...], scale: float) -> None:
        steps = [after - before for before, after in pairwise(q_starts)]
        if len(steps) != cache.num_kv_heads or q_starts[0] != 0 or min(steps) < 1:
            raise InvalidValueError("q_starts", q_starts, f"must rise from 0 in {cache.num_kv_heads} steps")
        if self.transposed_keys is not None and self.transposed_keys != cache.transposed_keys:
            raise InvalidValueError("transposed_keys", cache.transposed_keys, f"must be {self.transposed_keys} here")
        self.cache, self.q_starts, self.scale = cache, q_starts, scale

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
        """Why this backend does not work on such a cache, a clause for each setting; empty if it does.

        Args:
            dtype: that the model is computed in.
            format: of keys and values; None is the floats of ``dtype``.
            policy: None is dense.
        """
        return []

    @abstractmethod
    def begin(self, batch: AttentionBatch) -> None:
        """Prepares for the layers of a step."""

    @abstractmethod
    def attend(self, layer: int, q_THD: Tensor, q_sinks_THD: Tensor | None = None) -> Tensor:
        """Causal attention of each row's queries over what the reach of each KV head lets them see of the row's
        context.

        Args:
            q_THD: may be a view of the [T, (H + 2K) * D] of all heads: any stride between tokens and heads, the last
                dimension contiguous.
            q_sinks_THD: where heads of the layer have sinks (see :meth:`KvPolicy.sinks_of_layer`), the queries that
                see those: rotated at position ``sinks + window - 1`` if the token is at a later one.

        Returns:
            o_THD, contiguous, in the queries' dtype.
        """


def no_policies(dtype: torch.dtype, format: KvFormat | None, policy: KvPolicy | None) -> list[str]:
    """The obstacles of a backend that has kernels for dense attention over the floats of ``dtype`` only."""
    checks = {
        f"kv_policy={policy.text if policy is not None else None} is not dense": policy is None or policy.plain,
        f"kv_dtype={format} is not the dtype of the model": format is None or str(format) == dtype_name(dtype),
    }
    return [obstacle for obstacle, fits in checks.items() if not fits]
