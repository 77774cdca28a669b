"""What a model takes of each rank's memory, and how many tokens and requests find room; from its shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.cache import parse_memory
from headwise.workers.kv.store import disk_block_bytes
from headwise.workers.model.model_config import ModelConfig
from headwise.workers.model.partition import ShardPartition, partition_model

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class RankCapacity:
    """One rank's part. Ranges of heads are global and half open.

    Attributes:
        weight_bytes: of its weights in the dtype, without copies that a CPU's kernels want in another order.
        kv_bytes_per_token: of a token's keys and values, all layers together.
    """

    rank: int
    query_heads: tuple[int, int]
    kv_heads: tuple[int, int]
    weight_bytes: int
    kv_bytes_per_token: int


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a model takes. A KV head that several ranks hold counts on each of them.

    Attributes:
        attention: ``MHA``, ``GQA`` or ``MQA``.
        request_tokens: of one request, prompt and output together, in whole blocks.
    """

    attention: str
    block_size: int
    request_tokens: int
    ranks: tuple[RankCapacity, ...]

    @property
    def weight_bytes(self) -> int:
        return sum(rank.weight_bytes for rank in self.ranks)

    @property
    def kv_bytes_per_token(self) -> int:
        return sum(rank.kv_bytes_per_token for rank in self.ranks)

    @property
    def kv_bytes_per_request(self) -> int:
        return self.kv_bytes_per_token * self.request_tokens

    def num_blocks(self, budgets: tuple[int, ...], on_disk: bool = False) -> int:
        """How many blocks every rank can have.

        Args:
            budgets: bytes for KV on each rank.
            on_disk: a block is a file there.
        """
        sizes = [rank.kv_bytes_per_token * self.block_size for rank in self.ranks]
        if on_disk:
            sizes = [disk_block_bytes(size, self.block_size) for size in sizes]
        return min(budget // size for budget, size in zip(budgets, sizes, strict=True))

    def num_requests(self, num_blocks: int) -> int:
        """How many requests of ``request_tokens`` fit at a time, if they share no block."""
        return num_blocks // (self.request_tokens // self.block_size)


def capacity(config: ModelConfig, tp: int, dtype: str, request_tokens: int, block_size: int = 16) -> Capacity:
    """
    Args:
        dtype: of weights and KV, a key of DTYPE_BYTES.
        request_tokens: of one request, prompt and output together.

    Raises:
        InvalidValueError: the model cannot be split over ``tp`` ranks, or another argument is out of range.
    """
    if dtype not in DTYPE_BYTES:
        raise InvalidValueError("dtype", dtype, f"must be one of {', '.join(DTYPE_BYTES)}")
    for name, value in (("request_tokens", request_tokens), ("block_size", block_size)):
        if value < 1:
            raise InvalidValueError(name, value, "must be at least 1")
    size = DTYPE_BYTES[dtype]
    ranks = tuple(
        RankCapacity(
            part.rank,
            (part.heads.q_start, part.heads.q_stop),
            (part.heads.kv_start, part.heads.kv_stop),
            _num_weights(config, part) * size,
            2 * config.num_layers * part.heads.num_kv * config.head_dim * size,
        )
        for part in partition_model(config, tp)
    )
    blocks = -(-request_tokens // block_size)
    return Capacity(_attention(config), block_size, blocks * block_size, ranks)


class Room(NamedTuple):
    """What finds room in some memory.

    Attributes:
        kv_bytes: that KV may take there, by rank.
        blocks: that every rank can have there, and so the group.
        requests: of so many tokens as one is taken to have, at a time, if they share no block.
    """

    kv_bytes: tuple[int, ...]
    blocks: int
    tokens: int
    requests: int


def room(taken: Capacity, field: str, size: str, kv_memory: str) -> Room:
    """What finds room in a memory of each rank.

    Args:
        field: which: ``gpu_memory``, where weights are, too; ``host_kv_memory``; or ``disk_kv_limit``.
        size: of it, such as ``"80GiB"``.
        kv_memory: of what the weights leave of a GPU's memory, how much KV may take: a fraction or a size.

    Raises:
        InvalidValueError: ``size`` or ``kv_memory`` is none, or the weights do not fit.
    """
    try:
        whole = parse_memory(size, 0)
    except InvalidValueError:
        raise InvalidValueError(field, size, 'must be a size in bytes, such as "80GiB"') from None
    budgets = tuple(_for_kv(rank, whole, kv_memory) if field == "gpu_memory" else whole for rank in taken.ranks)
    blocks = taken.num_blocks(budgets, on_disk=field == "disk_kv_limit")
    return Room(budgets, blocks, blocks * taken.block_size, taken.num_requests(blocks))


def _for_kv(rank: RankCapacity, whole: int, kv_memory: str) -> int:
    left = whole - rank.weight_bytes
    if left <= 0:
        limit = f"the weights of rank {rank.rank} take {rank.weight_bytes} bytes"
        raise InvalidValueError("gpu_memory", whole, limit, "raise --tp, or take a smaller --dtype")
    return min(left, parse_memory(kv_memory, left))


def _num_weights(config: ModelConfig, part: ShardPartition) -> int:
    """Of one rank; norms are on every rank, and what is added once to a sum over ranks is on the first."""
    hidden, first = config.hidden_size, part.rank == 0
    vocab, mlp = (stop - start for start, stop in (part.vocab, part.mlp))
    q_rows, kv_rows = part.heads.num_q * config.head_dim, part.heads.num_kv * config.head_dim
    layer = 2 * hidden + hidden * (2 * q_rows + 2 * kv_rows) + 3 * hidden * mlp
    if config.attention_bias:
        layer += q_rows + 2 * kv_rows + first * hidden
    if config.mlp_bias:
        layer += 2 * mlp + first * hidden
    embeddings = vocab * hidden * (1 if config.tie_word_embeddings else 2)
    return embeddings + hidden + config.num_layers * layer


def _attention(config: ModelConfig) -> str:
    if config.num_kv_heads == config.num_heads:
        return "MHA"
    return "MQA" if config.num_kv_heads == 1 else "GQA"
