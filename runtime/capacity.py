"""What a model takes of each rank's memory, and how many tokens and requests find room; from its shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from headwise.runtime.config import EngineConfig
from headwise.runtime.kv.windows import ENDLESS, row_blocks
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.format import FLOAT_BYTES, KvFormat
from headwise.workers.kv.policy import DENSE_TEXT, KvPolicy, Reach, resolve_policy
from headwise.workers.kv.sizes import affordable, block_bytes, parse_memory
from headwise.workers.kv.store import disk_block_bytes
from headwise.workers.model.model_config import ModelConfig
from headwise.workers.model.partition import ShardPartition, partition_model

DTYPE_BYTES = FLOAT_BYTES
MAX_NUM_SEQS: int = EngineConfig.model_fields["max_num_seqs"].default
MAX_NUM_BATCHED_TOKENS: int = EngineConfig.model_fields["max_num_batched_tokens"].default


@dataclass(frozen=True, slots=True)
class RankCapacity:
    """One rank's part. Ranges of heads are global and half open.

    Attributes:
        weight_bytes: of its weights in the dtype, without copies that a CPU's kernels want in another order.
        block_bytes: of the keys and values of one block of each group of the policy, all layers together.
        kv_bytes_per_token: of a token's keys and values, all layers together, while no window has left it behind.
        kv_bytes_per_request: of a whole request's.
    """

    rank: int
    query_heads: tuple[int, int]
    kv_heads: tuple[int, int]
    weight_bytes: int
    block_bytes: tuple[int, ...]
    kv_bytes_per_token: int
    kv_bytes_per_request: int


class GroupCapacity(NamedTuple):
    """What the KV heads take, in all layers and on all ranks, that keep the same tokens.

    Attributes:
        reach: which tokens those are.
        heads: how many they are, those of each layer counted.
        request_blocks: of one request, once its prompt is computed.
    """

    reach: Reach
    heads: int
    kv_bytes_per_token: int
    request_blocks: int
    kv_bytes_per_request: int


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a model takes. A KV head that several ranks hold counts on each of them.

    Attributes:
        attention: ``MHA``, ``GQA`` or ``MQA``.
        policy, format: of its keys and values.
        request_tokens: of one request, prompt and output together, in whole blocks.
        groups: of the policy.
        caps: the most blocks of each group, however much memory there is; None is no limit.
    """

    attention: str
    policy: KvPolicy
    format: KvFormat
    block_size: int
    request_tokens: int
    groups: tuple[GroupCapacity, ...]
    caps: tuple[int | None, ...]
    ranks: tuple[RankCapacity, ...]

    @property
    def weight_bytes(self) -> int:
        return sum(rank.weight_bytes for rank in self.ranks)

    @property
    def kv_bytes_per_token(self) -> int:
        return sum(rank.kv_bytes_per_token for rank in self.ranks)

    @property
    def kv_bytes_per_request(self) -> int:
        return sum(rank.kv_bytes_per_request for rank in self.ranks)

    def request_bytes(self, rank: RankCapacity, tokens: int) -> int:
        """What a rank's keys and values of one request of so many tokens take, in whole blocks."""
        blocks = [row_blocks(reach, self.block_size, tokens) for reach in self.policy.reaches]
        return sum(count * size for count, size in zip(blocks, rank.block_bytes, strict=True))

    @property
    def constant_after(self) -> int | None:
        """From how many tokens on a request takes no more; None: it takes more with every block."""
        if not self.policy.bounded:
            return None
        most = max(row_blocks(reach, self.block_size, ENDLESS) for reach in self.policy.reaches)
        return most * self.block_size

    def num_blocks(self, budgets: tuple[int, ...], on_disk: bool = False) -> int:
        """How many blocks of each group every rank can have, but where a group's cap is lower.

        Args:
            budgets: bytes for KV on each rank.
            on_disk: a block is a file there.
        """
        sizes = [rank.block_bytes for rank in self.ranks]
        if on_disk:
            sizes = [tuple(disk_block_bytes(size, self.block_size) for size in of_groups) for of_groups in sizes]
        return min(affordable(budget, size, self.caps) for budget, size in zip(budgets, sizes, strict=True))

    def num_requests(self, num_blocks: int) -> int:
        """How many requests of ``request_tokens`` fit at a time, if they share no block."""
        pairs = zip(self.groups, self.caps, strict=True)
        return min(min(num_blocks, cap or num_blocks) // group.request_blocks for group, cap in pairs)


def capacity(
    config: ModelConfig,
    tp: int,
    dtype: str,
    request_tokens: int,
    block_size: int = 16,
    *,
    policy: KvPolicy | None = None,
    format: KvFormat | None = None,
    max_num_seqs: int = MAX_NUM_SEQS,
    max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS,
) -> Capacity:
    """
    Args:
        dtype: of weights, a key of DTYPE_BYTES.
        request_tokens: of one request, prompt and output together.
        policy: of keys and values; None is that of the model itself.
        format: of keys and values; None is the floats of ``dtype``.
        max_num_seqs, max_num_batched_tokens: of the engine; they limit the blocks of groups with a window.

    Raises:
        InvalidValueError: the model cannot be split over ``tp`` ranks, or another argument is out of range.
    """
    if dtype not in DTYPE_BYTES:
        raise InvalidValueError("dtype", dtype, f"must be one of {', '.join(DTYPE_BYTES)}")
    for name, value in (("request_tokens", request_tokens), ("block_size", block_size)):
        if value < 1:
            raise InvalidValueError(name, value, "must be at least 1")
    policy = policy or resolve_policy(DENSE_TEXT, config.num_layers, config.num_kv_heads, config.sliding_windows)
    format = format or KvFormat(dtype, dtype)
    blocks = [row_blocks(reach, block_size, request_tokens) for reach in policy.reaches]
    ranks = []
    for part in partition_model(config, tp):
        heads = part.heads
        sizes = block_bytes(policy.heads(heads.kv_start, heads.kv_stop), format, block_size, config.head_dim)
        ranks.append(
            RankCapacity(
                part.rank,
                (heads.q_start, heads.q_stop),
                (heads.kv_start, heads.kv_stop),
                _num_weights(config, part) * DTYPE_BYTES[dtype],
                sizes,
                sum(sizes) // block_size,
                sum(count * size for count, size in zip(blocks, sizes, strict=True)),
            )
        )
    tokens = -(-request_tokens // block_size) * block_size
    caps = policy.caps(block_size, max_num_seqs, max_num_batched_tokens)
    groups = tuple(_group(policy, group, ranks, block_size, count) for group, count in enumerate(blocks))
    return Capacity(_attention(config), policy, format, block_size, tokens, groups, caps, tuple(ranks))


def _group(
    policy: KvPolicy, group: int, ranks: Sequence[RankCapacity], block_size: int, request_blocks: int
) -> GroupCapacity:
    size = sum(rank.block_bytes[group] for rank in ranks)
    heads = sum(row.count(group) for row in policy.groups_LK)
    return GroupCapacity(policy.reaches[group], heads, size // block_size, request_blocks, size * request_blocks)


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
        InvalidValueError: ``size`` or ``kv_memory`` is none, or the weights do not fit, or blocks of the policy are not
            kept there.
    """
    if field != "gpu_memory" and taken.policy.num_groups > 1:
        limit = f"heads that keep different tokens, of which there are {taken.policy.num_groups} groups here, have no "
        limit += "blocks there"
        raise InvalidValueError(field, size, limit, "leave it out, or give all heads the same kv_policy (--kv-policy)")
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
