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
from headwise.workers.kv.cache import KVCache


@dataclass(slots=True, eq=False)
class AttentionBatch:
    """The rows of one step as attention sees them, in host memory.

    Attributes:
        query_starts_B1: int32 [B + 1]; row b's tokens are [query_starts[b], query_starts[b + 1]) of the step's T.
        context_lens_B: int32 [B]; tokens of the row that have KV once this step's are written. The row's queries are
            the last of them.
        block_tables_BN: int32 [B, most blocks of a row]; padded with any block.
    """

    query_starts_B1: NDArray[np.int32]
    context_lens_B: NDArray[np.int32]
    block_tables_BN: NDArray[np.int32]


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
    def obstacles(cls, device: torch.device, dtype: torch.dtype, block_size: int, head_dim: int) -> list[str]:
        """Why this backend does not work on such a cache, a clause for each setting; empty if it does."""
        return []

    @abstractmethod
    def begin(self, batch: AttentionBatch) -> None:
        """Prepares for the layers of a step."""

    @abstractmethod
    def attend(self, layer: int, q_THD: Tensor) -> Tensor:
        """Causal attention of each row's queries over all of the row's context.

        Args:
            q_THD: may be a view of the [T, (H + 2K) * D] of all heads: any stride between tokens and heads, the last
                dimension contiguous.

        Returns:
            o_THD, contiguous, in the queries' dtype.
        """
