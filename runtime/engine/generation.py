"""Generation: one shard group, and all the books that are true of this group alone."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwise.cluster.group import GroupFactory, Progress, ShardGroup
from headwise.runtime.config import EngineConfig, HandoffConfig
from headwise.runtime.engine.block_tables import BlockTables
from headwise.runtime.engine.tier_sizes import TierSizes
from headwise.runtime.handoff.choice import HandoffCost
from headwise.runtime.handoff.inbound import Inbound
from headwise.runtime.handoff.link import PrefillLink
from headwise.runtime.handoff.messages import Hello, Identity
from headwise.runtime.handoff.outbound import Outbound
from headwise.runtime.kv.blocks import BlockPool
from headwise.runtime.kv.events import KvEvents
from headwise.runtime.kv.ledger import Ledger
from headwise.runtime.kv.pins import Pins
from headwise.runtime.kv.prefix_cache import PrefixCache
from headwise.runtime.kv.tiers import Tiers
from headwise.runtime.tls import channel_credentials
from headwise.workers.addresses import is_loopback
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.handoff import KvEndpoint
from headwise.workers.kv.transfer import BlockKey

MIXED_TOKENS = 64
"""Prompts with fewer tokens are never worth a handoff, unless max_mixed_prefill_tokens says otherwise."""


@dataclass(frozen=True, slots=True)
class Generation:
    """A shard group with its block tables, prefix cache, tiers and pins.

    All of it lives and dies together, for a block's number means nothing without the shards that hold the block. What
    outlives a generation is a request's tokens and sampling state.

    Attributes:
        epoch: which generation this is, as its KV events say.
        ledger: the jobs that move blocks between the shards' devices and the tiers.
        tiers: None where there is no host memory or disk for blocks.
        inbound: the prompts that other engines compute for this one; None where none do.
        outbound: the prompts that this engine computes for others; None where it does not.
    """

    epoch: int
    group: ShardGroup
    cache: PrefixCache
    tables: BlockTables
    ledger: Ledger
    tiers: Tiers | None
    pins: Pins
    inbound: Inbound | None = None
    outbound: Outbound | None = None

    @property
    def handing_over(self) -> bool:
        """Whether a handoff is on its way, in or out."""
        return (self.inbound is not None and self.inbound.busy) or (self.outbound is not None and self.outbound.busy)

    def handoff_stats(self) -> dict[str, Any]:
        """Of the handoffs in or out; empty where there are none."""
        handoffs = self.inbound or self.outbound
        return handoffs.stats() if handoffs is not None else {}

    def close(self) -> None:
        """Ends the shards; call it once the engine's thread has ended. Idempotent."""
        try:
            if self.inbound is not None:
                self.inbound.close()
        finally:
            self.group.close()


class GenerationFactory:
    """Makes the generations of one engine."""

    def __init__(
        self,
        config: EngineConfig,
        groups: GroupFactory,
        max_model_len: int,
        sizes: TierSizes,
        events: KvEvents,
        identity: Identity | None = None,
    ) -> None:
        """
        Args:
            groups: makes their groups; this factory closes it.
            sizes: of the tiers.
            events: where generations tell which blocks they hold; its epoch is theirs.
            identity: what the engines of a handoff must have in common; needed where there are handoffs.
        """
        self._config, self._groups, self._max_model_len = config, groups, max_model_len
        self._sizes, self._events, self._identity = sizes, events, identity

    def make(self, progress: Progress | None = None) -> Generation:
        """Starts a group, and opens its books; what its disks hold from before is in the prefix cache.

        Args:
            progress: gets (layers loaded, layers).

        Raises:
            GroupStartError, ShardGroupDied, CheckpointError: the group cannot be started.
            InvalidValueError: its KV memory does not hold one request of the model's length.
        """
        group = self._groups.make()
        try:
            num_blocks = group.start(progress, self._config.num_blocks)
            self._check_length(num_blocks)
            return self._open_books(group, num_blocks)
        except BaseException:
            group.close()
            raise

    def close(self) -> None:
        """Gives back what outlives a generation, such as the ranks' places in Ray. Close the generations first."""
        self._groups.close()

    def _check_length(self, num_blocks: int) -> None:
        num_tokens = num_blocks * self._config.block_size
        if num_tokens < self._max_model_len:
            limit = f"holds {num_tokens} tokens, max_model_len={self._max_model_len} needs more"
            raise InvalidValueError("num_blocks", num_blocks, limit)

    def _open_books(self, group: ShardGroup, num_blocks: int) -> Generation:
        config, events, sizes = self._config, self._events, self._sizes
        quota = None if config.cache_quota is None else max(1, int(config.cache_quota * num_blocks))
        cache = PrefixCache(BlockPool(num_blocks), config.block_size, config.prefix_eviction, events, quota)
        ledger = Ledger(group.transfer, group.transferred, config.tensor_parallel_size)
        tiers = None
        if sizes.host or sizes.disk:
            # What waiting requests may want before the next saves are done: two steps' tokens, or an eighth of all.
            reserve = min(num_blocks, max(num_blocks // 8, -(-2 * config.max_num_batched_tokens // config.block_size)))
            tiers = Tiers(cache, ledger, sizes.host, sizes.disk, reserve, config.cache_quota, events)
            if sizes.disk:
                tiers.adopt(*_stored_everywhere(group.query("stored_blocks")))
        spare = max(
            0, num_blocks - -(-self._max_model_len // config.block_size) - 1
        )  # a request finds room beside them
        inbound = outbound = None
        if config.handoff is not None and config.handoff.role == "decode":
            inbound = self._open_inbound(config.handoff, group, cache, ledger, spare)
        elif config.handoff is not None:
            outbound = Outbound(ledger, events.epoch, config.block_size)
        tables = BlockTables(cache, tiers, inbound)
        return Generation(events.epoch, group, cache, tables, ledger, tiers, Pins(cache, spare), inbound, outbound)

    def _open_inbound(
        self, handoff: HandoffConfig, group: ShardGroup, cache: PrefixCache, ledger: Ledger, spare: int
    ) -> Inbound:
        assert self._identity is not None, "handoffs need an identity"
        ends = [KvEndpoint((a, b), address, host) for a, b, address, host in group.query("kv_endpoint")]
        hello = Hello(self._identity, self._events.epoch, ends, not is_loopback(handoff.host))
        credentials = None
        if handoff.ca is not None:
            cert, key = (None if path is None else Path(path) for path in (handoff.tls_cert, handoff.tls_key))
            credentials = channel_credentials(Path(handoff.ca), cert, key)
        peers: list[PrefillLink] = []
        with contextlib.ExitStack() as undo:
            for address in handoff.peers:
                peers.append(PrefillLink(address, hello, credentials, handoff.token, group.wake, handoff.lease_s))
                undo.callback(peers[-1].close)
            undo.pop_all()
        inbound = Inbound(
            cache,
            ledger,
            self._events.epoch,
            peers,
            HandoffCost(handoff.min_tokens, self._config.max_mixed_prefill_tokens or MIXED_TOKENS),
            lease_s=handoff.lease_s,
            max_reserved=spare,
            must_succeed=handoff.on_failure == "fail",
        )
        inbound.on_event = group.wake
        return inbound


def _stored_everywhere(ranks: list[list[Any]]) -> tuple[list[BlockKey], list[BlockKey]]:
    """What every rank has, oldest first, and what only some of them have."""
    counts = Counter(tuple(key) for stored in ranks for key in stored)
    keys = [(BlockKey(*key), count) for key, count in counts.items()]
    return [key for key, count in keys if count == len(ranks)], [key for key, count in keys if count < len(ranks)]
