"""How many blocks the tiers below the device may hold, by what the settings pay for."""

from __future__ import annotations

from typing import NamedTuple

from headwise.runtime.config import EngineConfig
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.format import kv_format
from headwise.workers.kv.policy import KvPolicy
from headwise.workers.kv.sizes import block_bytes, parse_memory
from headwise.workers.kv.store import disk_block_bytes
from headwise.workers.model.model_config import ModelConfig
from headwise.workers.model.partition import partition_model
from headwise.workers.spec import ShardSpec


class TierSizes(NamedTuple):
    """How many blocks each rank keeps in host memory and on disk, the same on all of them; and what a block takes in
    memory, in bytes, on the rank with the most KV heads."""

    host: int
    disk: int
    block_bytes: int


def tier_sizes(config: EngineConfig, model: ModelConfig, spec: ShardSpec, policy: KvPolicy) -> TierSizes:
    """The rank with the most KV heads decides what a budget pays for.

    Args:
        spec: of the shards; their dtypes.
        policy: of the whole model.

    Raises:
        InvalidValueError: a budget is none, or less than one block, or the prefix cache is off.
    """
    has_tiers = config.host_kv_memory is not None or config.disk_kv_path is not None
    if has_tiers and not config.enable_prefix_caching:
        name = "host_kv_memory" if config.host_kv_memory is not None else "disk_kv_path"
        raise InvalidValueError(name, getattr(config, name), "needs enable_prefix_caching=True, whose blocks it holds")
    form = kv_format(spec.kv_dtype or spec.dtype, model.head_dim)
    heads = [part.heads for part in partition_model(model, config.tensor_parallel_size)]
    policies = [policy.heads(part.kv_start, part.kv_stop) for part in heads]
    block = max(sum(block_bytes(part, form, config.block_size, model.head_dim)) for part in policies)
    host = _blocks("host_kv_memory", config.host_kv_memory, block) if config.host_kv_memory is not None else 0
    file = disk_block_bytes(block, config.block_size)
    disk = _blocks("disk_kv_limit", config.disk_kv_limit, file) if config.disk_kv_path is not None else 0
    return TierSizes(host, disk, block)


def _blocks(field: str, text: str | int, block_bytes: int) -> int:
    try:
        budget = parse_memory(text, 0)
    except InvalidValueError:
        raise InvalidValueError(field, text, 'must be a size in bytes, such as "2GiB"') from None
    if budget < block_bytes:
        raise InvalidValueError(field, text, f"a block of the largest rank takes {block_bytes} bytes")
    return budget // block_bytes
