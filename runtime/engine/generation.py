"""From a config to a prefix cache with its tiers."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any, NamedTuple

from headwise.cluster.group import ShardGroup
from headwise.runtime.config import EngineConfig
from headwise.runtime.engine.block_tables import BlockTables
from headwise.runtime.kv.blocks import BlockPool
from headwise.runtime.kv.events import KvEvents
from headwise.runtime.kv.pins import Pins
from headwise.runtime.kv.prefix_cache import PrefixCache
from headwise.runtime.kv.tiers import Tiers
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.cache import bytes_per_block, parse_memory
from headwise.workers.kv.store import disk_block_bytes
from headwise.workers.kv.transfer import BlockKey
from headwise.workers.model.model_config import ModelConfig
from headwise.workers.model.partition import partition_model
from headwise.workers.shard import DTYPES


class TierSizes(NamedTuple):
    """How many blocks each rank keeps in host memory and on disk; the same on all of them."""

    host: int
    disk: int


def tier_sizes(config: EngineConfig, model: ModelConfig, dtype: str) -> TierSizes:
    """The rank with the most KV heads decides what a budget pays for.

    Raises:
        InvalidValueError: a budget is none, or less than one block, or the prefix cache is off.
    """
    if config.host_kv_memory is None and config.disk_kv_path is None:
        return TierSizes(0, 0)
    if not config.enable_prefix_caching:
        name = "host_kv_memory" if config.host_kv_memory is not None else "disk_kv_path"
        raise InvalidValueError(name, getattr(config, name), "needs enable_prefix_caching=True, whose blocks it holds")
    heads = [part.heads for part in partition_model(model, config.tensor_parallel_size)]
    block = bytes_per_block(
        num_layers=model.num_layers,
        num_kv_heads=max(part.kv_stop - part.kv_start for part in heads),
        block_size=config.block_size,
        head_dim=model.head_dim,
        dtype=DTYPES[dtype],
    )
    host = _blocks("host_kv_memory", config.host_kv_memory, block) if config.host_kv_memory is not None else 0
    file = disk_block_bytes(block, config.block_size)
    disk = _blocks("disk_kv_limit", config.disk_kv_limit, file) if config.disk_kv_path is not None else 0
    return TierSizes(host, disk)


class Caching(NamedTuple):
    """The parts of an engine's prefix cache."""

    tables: BlockTables
    pins: Pins
    events: KvEvents


def prefix_caching(
    config: EngineConfig, group: ShardGroup, num_blocks: int, max_model_len: int, sizes: TierSizes
) -> Caching:
    """A prefix cache for a group that has started; what its disks hold from before is in it.

    Raises:
        ShardGroupDied: a rank did not answer.
    """
    # Later engines have later epochs, so that a router can tell a restart from a gap.
    events = KvEvents(time.time_ns() // 1_000_000)
    quota = None if config.cache_quota is None else max(1, int(config.cache_quota * num_blocks))
    cache = PrefixCache(BlockPool(num_blocks), config.block_size, config.prefix_eviction, events, quota)
    tiers = None
    if sizes.host or sizes.disk:
        # What newcomers are likely to want before the next saves are done: a step's tokens twice, or an eighth of all.
        reserve = min(num_blocks, max(num_blocks // 8, -(-2 * config.max_num_batched_tokens // config.block_size)))
        tiers = Tiers(cache, sizes.host, sizes.disk, reserve, config.cache_quota, events)
        if sizes.disk:
            tiers.adopt(*_stored_everywhere(group.call("stored_blocks")))
    pins = Pins(cache, max(0, num_blocks - -(-max_model_len // config.block_size) - 1))
    return Caching(BlockTables(cache, tiers), pins, events)


def _blocks(field: str, text: str | int, block_bytes: int) -> int:
    try:
        budget = parse_memory(text, 0)
    except InvalidValueError:
        raise InvalidValueError(field, text, 'must be a size in bytes, such as "2GiB"') from None
    if budget < block_bytes:
        raise InvalidValueError(field, text, f"a block of the largest rank takes {block_bytes} bytes")
    return budget // block_bytes


def _stored_everywhere(ranks: list[list[Any]]) -> tuple[list[BlockKey], list[BlockKey]]:
    """What every rank has, oldest first, and what only some of them have."""
    counts = Counter(tuple(key) for stored in ranks for key in stored)
    keys = [(BlockKey(*key), count) for key, count in counts.items()]
    return [key for key, count in keys if count == len(ranks)], [key for key, count in keys if count < len(ranks)]
