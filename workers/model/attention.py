"""The interface between the model and whatever computes attention over the paged KV cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.cache import KVCache


@dataclass(slots=True, eq=False)
class AttentionBatch:
    """The rows of one step as attention sees them. Not changed once a backend has seen it: backends plan once a batch.

    Attributes:
        query_starts_B1: int32 [B + 1]; row b's tokens are [query_starts[b], query_starts[b + 1]) of the step's T.
        context_lens_B: int32 [B]; tokens of the row that have KV once this step's are written. The row's queries are
            the last of them.
        block_tables_BN: int32 [B, most blocks of a row]; padded with 0.
        slots_T: int64 [T]; block * block_size + offset: where each token's K and V are written.
        max_query_len: most tokens any row computes in this step.
        max_context_len: most tokens with KV of any row.
    """

    query_starts_B1: Tensor
    context_lens_B: Tensor
    block_tables_BN: Tensor
    slots_T: Tensor
    max_query_len: int
    max_context_len: int


class AttentionBackend(ABC):
    """Writes a step's K and V into the cache and attends over it.

    For each layer the model calls ``write`` and then ``attend`` with the same batch. Queries, keys and values may be
    views of one [T, (H + 2K) * D] tensor: any stride between tokens and heads, the last dimension contiguous.
    Slots that no token of a row was written to never influence that row, whatever they hold.

    Args:
        cache: the shard's KV memory, laid out as ``transposed_keys`` of the backend's class asks or either way where
            it is None.
        q_starts: K + 1 numbers; local query heads [q_starts[k], q_starts[k + 1]) use local KV head k. The groups may
            differ in size.
        scale: what queries times keys are multiplied with, commonly head_dim ** -0.5.
        num_threads: most threads one call may use.
    """

    transposed_keys: ClassVar[bool | None] = None

    def __init__(self, cache: KVCache, q_starts: tuple[int, ...], scale: float, num_threads: int = 1) -> None:
        steps = [after - before for before, after in pairwise(q_starts)]
        if len(steps) != cache.num_kv_heads or q_starts[0] != 0 or min(steps) < 1:
            raise InvalidValueError("q_starts", q_starts, f"must rise from 0 in {cache.num_kv_heads} steps")
        if num_threads < 1:
            raise InvalidValueError("num_threads", num_threads, "must be at least 1")
        if self.transposed_keys is not None and self.transposed_keys != cache.transposed_keys:
            raise InvalidValueError("transposed_keys", cache.transposed_keys, f"must be {self.transposed_keys} here")
        self.cache, self.q_starts, self.scale, self.num_threads = cache, q_starts, scale, num_threads

    @abstractmethod
    def write(self, layer: int, k_TKD: Tensor, v_TKD: Tensor, batch: AttentionBatch) -> None:
        """Put the step's keys and values, in the cache's dtype, at ``batch.slots_T`` of a layer."""

    @abstractmethod
    def attend(self, layer: int, q_THD: Tensor, batch: AttentionBatch) -> Tensor:
        """Causal attention of each row's queries over all of the row's context.

        Returns:
            o_THD, contiguous, in the queries' dtype.
        """
