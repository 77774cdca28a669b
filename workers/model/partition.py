"""Which query heads, KV heads, MLP columns and vocabulary rows each tensor-parallel rank owns. Integers only.

Heads are split by KV group, so that no rank needs another rank's keys and values; MLP columns and vocabulary rows are
split evenly. Columns do not make up for heads: ranks meet after each half of a layer, so one that had waited in the
first half would only make the others wait in the second. SmolLM2-135M on two ranks::

                     rank 0                              rank 1
    KV heads         [  0       |  1       ]             [  2       ]
    query heads      [  0  1  2 |  3  4  5 ]             [  6  7  8 ]
    MLP columns      [ 0 ............. 767 ]             [ 768 ............. 1535 ]
    vocabulary rows  [ 0 ............. 24575 ]           [ 24576 ............. 49151 ]

With more ranks than KV heads, a KV head lives on every rank that holds one of its query heads. 4 query heads and
2 KV heads on three ranks::

                     rank 0          rank 1          rank 2
    KV heads         [ 0     ]       [ 1 ]           [ 1 ]
    query heads      [ 0   1 ]       [ 2 ]           [ 3 ]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from headwise.workers.errors import InvalidValueError
from headwise.workers.model.model_config import ModelConfig

Range = tuple[int, int]
"""(start, stop), half open."""


@dataclass(frozen=True, slots=True)
class HeadShard:
    """The heads one rank owns; ids are global, ranges half open.

    Attributes:
        q_start, q_stop: its query heads.
        kv_start, kv_stop: the KV heads these attend to.
        group_size: query heads of one KV head in the whole model; on this rank the first and the last may have fewer.
    """

    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int
    group_size: int

    @property
    def num_q(self) -> int:
        """How many query heads the rank owns."""
        return self.q_stop - self.q_start

    @property
    def num_kv(self) -> int:
        """How many KV heads the rank owns."""
        return self.kv_stop - self.kv_start

    @property
    def q_starts(self) -> tuple[int, ...]:
        """``num_kv + 1`` bounds: local query heads ``q_starts[k]`` to ``q_starts[k + 1]`` use local KV head k."""
        starts = (max(kv * self.group_size - self.q_start, 0) for kv in range(self.kv_start, self.kv_stop))
        return (*starts, self.num_q)


@dataclass(frozen=True, slots=True)
class ShardPartition:
    """What one rank of ``world_size`` owns of the model.

    Attributes:
        heads: its attention heads.
        mlp: its columns of the MLP's intermediate dimension; the same in every layer, possibly none.
        vocab: its rows of the token embedding and of the output head.
    """

    rank: int
    world_size: int
    heads: HeadShard
    mlp: Range
    vocab: Range


def partition_model(config: ModelConfig, tp: int) -> list[ShardPartition]:
    """Split a model over ``tp`` ranks.

    Raises:
        InvalidValueError: ``tp`` is below 1 or above the number of query heads.
    """
    heads = partition_heads(config.num_heads, config.num_kv_heads, tp)
    vocab = split_evenly(config.vocab_size, tp)
    mlp = split_evenly(config.intermediate_size, tp)
    return [ShardPartition(rank, tp, heads[rank], mlp[rank], vocab[rank]) for rank in range(tp)]


def partition_heads(num_q: int, num_kv: int, tp: int) -> list[HeadShard]:
    """Split query and KV heads over ``tp`` ranks, in order, the larger shares first.

    With ``tp <= num_kv`` a rank owns whole KV groups, and ranks differ by at most one group. With more ranks than KV
    heads the query heads are split, ranks differ by at most one head, and KV heads are replicated where needed.

    Raises:
        InvalidValueError: ``tp`` is below 1 or above ``num_q``, or ``num_kv`` does not divide ``num_q``.
    """
    if not 1 <= num_kv <= num_q or num_q % num_kv:
        raise InvalidValueError("num_key_value_heads", num_kv, f"must divide the {num_q} query heads")
    if not 1 <= tp <= num_q:
        limit = f"must be from 1 to {num_q}, the model's number of query heads"
        raise InvalidValueError("tensor_parallel_size", tp, limit, "each rank needs at least one query head")
    group = num_q // num_kv
    if tp <= num_kv:
        return [HeadShard(a * group, b * group, a, b, group) for a, b in split_evenly(num_kv, tp)]
    return [HeadShard(a, b, a // group, (b - 1) // group + 1, group) for a, b in split_evenly(num_q, tp)]


def split_evenly(total: int, parts: int) -> list[Range]:
    """``parts`` adjacent ranges that cover ``[0, total)``; sizes differ by at most one, the larger ones first."""
    small, larger = divmod(total, parts)
    return _ranges([small + 1] * larger + [small] * (parts - larger))


def _ranges(sizes: Sequence[int]) -> list[Range]:
    return list(pairwise(accumulate(sizes, initial=0)))
