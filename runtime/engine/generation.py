"""Generation: one shard group, and all the books that are true of this group alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headwise.cluster.group import GroupFactory, Progress, ShardGroup
from headwise.runtime.config import DEFAULT_KV_MEMORY, EngineConfig, HandoffConfig
from headwise.runtime.engine.block_tables import BlockTables
from headwise.runtime.engine.graphs import Graphs
from headwise.runtime.engine.tier_sizes import TierSizes
from headwise.runtime.handoff.choice import HandoffCost
from headwise.runtime.handoff.inbound import Inbound
from headwise.runtime.handoff.links import Links, NamedPeer
from headwise.runtime.handoff.messages import Hello, Identity
from headwise.runtime.handoff.outbound import Outbound
from headwise.runtime.kv.blocks import BlockPool
from headwise.runtime.kv.events import KvEvents
from headwise.runtime.kv.eviction import Chain
from headwise.runtime.kv.identity import TokenBlocks
from headwise.runtime.kv.ledger import Ledger
from headwise.runtime.kv.pins import Pins
from headwise.runtime.kv.prefix_cache import PrefixCache, match_all
from headwise.runtime.kv.tiers import Tiers
from headwise.runtime.kv.windows import ENDLESS, RowRoom, row_blocks
from headwise.runtime.tls import channel_credentials
from headwise.workers.addresses import is_loopback
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.handoff import KvEndpoint
from headwise.workers.kv.policy import DENSE, DENSE_TEXT, KvPolicy
from headwise.workers.kv.transfer import BlockKey

MIXED_TOKENS = 64
"""Prompts with fewer tokens are never worth a handoff, unless max_mixed_prefill_tokens says otherwise."""
MEET_S = 20.0
"""How long the requests of shards that have died wait for prefill engines to be connected to the next, where a handoff
must not fail."""
PLAIN = KvPolicy((DENSE,), ())
"""Every head keeps everything, whatever the heads."""


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
        graphs: the decode graphs of its shards.
        kv_policy: which tokens' keys and values are kept, as :mod:`headwise.workers.kv.policy` says.
        other_pins: the pins in groups 1, 2, ... of the KV policy; those in group 0 are ``pins``.
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
    graphs: Graphs = field(default_factory=lambda: Graphs(0))
    kv_policy: str = DENSE_TEXT
    other_pins: tuple[Pins, ...] = ()

    @property
    def all_pins(self) -> tuple[Pins, ...]:
        """Of each group of the KV policy."""
        return (self.pins, *self.other_pins)

    @property
    def fullest(self) -> PrefixCache:
        """Of the group whose blocks run out first: one that keeps everything, where there is one."""
        return next((cache for cache in self.tables.caches if cache.reach == DENSE), self.cache)

    def group_stats(self) -> list[dict[str, Any]]:
        """What each group of the KV policy keeps, and its blocks; empty where there is one group."""
        caches = self.tables.caches if len(self.tables.caches) > 1 else []
        return [
            {"reach": str(cache.reach), "num_blocks": cache.pool.num_blocks, "num_free_blocks": cache.num_available}
            | {"pinned_blocks": pins.num_blocks, "prefix_cache": cache.stats()}
            for cache, pins in zip(caches, self.all_pins, strict=False)
        ]

    def pin(self, blocks: TokenBlocks, num_blocks: int, ttl_s: float) -> int:
        """Keeps what is cached of a sequence's first blocks for a time, in every group; returns how many they are.

        Raises:
            InvalidValueError: more blocks would be pinned than may be; none is then.
        """
        chains: list[Chain] = [[] for _ in self.all_pins]
        match_all(self.tables.caches, blocks, num_blocks, chains)
        for cache, chain in zip(self.tables.caches, chains, strict=True):
            cache.add_before_last(blocks, chain)
        for pins, chain in zip(self.all_pins, chains, strict=True):
            pins.check(chain)
        for pins, chain in zip(self.all_pins, chains, strict=True):
            pins.pin(chain, ttl_s, blocks)
        return len(chains[0])

    def forget_blocks(self) -> None:
        """Forgets every cached block, pinned ones too, on the device and the tiers below."""
        for pins, cache in zip(self.all_pins, self.tables.caches, strict=True):
            pins.clear()
            cache.clear()
        if self.tiers is not None:
            self.tiers.clear()

    @property
    def handing_over(self) -> bool:
        """Whether a handoff is on its way, in or out."""
        return (self.inbound is not None and self.inbound.busy) or (self.outbound is not None and self.outbound.busy)

    def handoff_stats(self) -> dict[str, Any]:
        """Of the handoffs in or out; empty where there are none."""
        handoffs = self.inbound or self.outbound
        return handoffs.stats() if handoffs is not None else {}

    def abandon(self) -> None:
        """The group is dead: handoffs are over, in and out."""
        if self.inbound is not None:
            self.inbound.abandon()
        if self.outbound is not None:
            self.outbound.abandon("the shard group died")

    def count_on(self, before: Generation) -> None:
        """Counts go on from those of the generation before this one."""
        for cache, old in zip(self.tables.caches, before.tables.caches, strict=True):
            cache.counts.update(old.counts)
        self.graphs.count_on(before.graphs)
        if self.tiers is not None and before.tiers is not None:
            self.tiers.books.counts.update(before.tiers.books.counts)
        if self.inbound is not None and before.inbound is not None:
            self.inbound.count_on(before.inbound)
        if self.outbound is not None and before.outbound is not None:
            self.outbound.count_on(before.outbound)

    def close(self) -> None:
        """Ends the shards, once the engine's thread has ended or uses another generation. Idempotent."""
        try:
            if self.inbound is not None:
                self.inbound.close()
        finally:
            self.group.close()


@dataclass(frozen=True, slots=True)
class ReadyGroup:
    """A group that takes plans, and what its ranks have said of themselves.

    Attributes:
        num_blocks: that each rank has.
        stored: the blocks that every rank has on disk from before, oldest first, and those that only some of them have.
        endpoints: where each rank takes blocks from other engines; none where it takes none.
    """

    group: ShardGroup
    num_blocks: int
    stored: tuple[list[BlockKey], list[BlockKey]]
    endpoints: list[KvEndpoint]


class GenerationFactory:
    """Makes the generations of one engine. Groups may be loaded and prepared on any thread, one at a time; their books
    are opened on the engine's."""

    def __init__(
        self,
        config: EngineConfig,
        groups: GroupFactory,
        max_model_len: int,
        sizes: TierSizes,
        events: KvEvents,
        identity: Identity | None = None,
        policy: KvPolicy = PLAIN,
    ) -> None:
        """
        Args:
            config: its device is no longer ``auto``.
            groups: makes their groups; this factory closes it.
            sizes: of the tiers.
            max_model_len: of the model. A later group whose memory holds fewer tokens serves shorter requests.
            events: where generations tell which blocks they hold; its epoch is theirs.
            identity: what the engines of a handoff must have in common; needed where there are handoffs.
            policy: of the whole model.
        """
        self._config, self._groups, self._max_model_len = config, groups, max_model_len
        self._sizes, self._events, self._identity, self._policy = sizes, events, identity, policy
        self._peers = [
            NamedPeer.at(address) for address in (config.handoff.peers if config.handoff is not None else ())
        ]
        self._links: Links | None = None  # of the latest generation
        self._meet_s = 0.0  # of the first generation: no stream goes on that would break off

    def make(self, progress: Progress | None = None) -> Generation:
        """Starts a group, and opens its books; what its disks hold from before is in the prefix cache.

        Args:
            progress: gets (layers loaded, layers).

        Raises:
            GroupStartError, ShardGroupDied, CheckpointError: the group cannot be started.
            InvalidValueError: its KV memory does not hold one request of the model's length.
        """
        group = self.new_group()
        try:
            group.load(progress)
            ready = self.prepare(group)
            self._check_length(ready.num_blocks)
            return self.open(ready)
        except BaseException:
            group.close()
            raise

    def new_group(self) -> ShardGroup:
        """A group that is not loaded yet.

        Raises:
            NoRoomError: there is no room for its ranks.
        """
        return self._groups.make()

    def prepare(self, group: ShardGroup, in_haste: bool = False) -> ReadyGroup:
        """Takes the KV memory of a group that is loaded.

        Args:
            in_haste: streams wait for it.

        Raises:
            ShardGroupDied: a rank died.
            InvalidValueError: the memory is not there, or the disk tier or the handoff cannot be opened.
        """
        num_blocks = group.allocate(self._config.num_blocks, in_haste)
        stored: tuple[list[BlockKey], list[BlockKey]] = [], []
        endpoints: list[KvEndpoint] = []
        if num_blocks and self._sizes.disk:
            stored = _stored_everywhere(group.query("stored_blocks"))
        handoff = self._config.handoff
        if num_blocks and handoff is not None and handoff.role == "decode":
            endpoints = [KvEndpoint((a, b), address, host) for a, b, address, host in group.query("kv_endpoint")]
        return ReadyGroup(group, num_blocks, stored, endpoints)

    def open(self, ready: ReadyGroup) -> Generation:
        """Opens the books of a group, under the epoch that the KV events have now."""
        group, num_blocks = ready.group, ready.num_blocks
        config, events, sizes = self._config, self._events, self._sizes
        caches = self._open_caches(num_blocks)
        cache = caches[0]
        ledger = Ledger(group.transfer, group.transferred, config.tensor_parallel_size)
        tiers = None
        if sizes.host or sizes.disk:
            # What waiting requests may want before the next saves are done: two steps' tokens, or an eighth of all.
            reserve = min(num_blocks, max(num_blocks // 8, -(-2 * config.max_num_batched_tokens // config.block_size)))
            tiers = Tiers(cache, ledger, sizes.host, sizes.disk, reserve, config.cache_quota, events)
            if sizes.disk:
                tiers.adopt(*ready.stored)
        spare = [max(0, cache.pool.num_blocks - self._row_blocks(cache) - 1) for cache in caches]
        inbound = outbound = None
        if config.handoff is not None and config.handoff.role == "decode":
            inbound = self._open_inbound(config.handoff, ready, cache, ledger, spare[0])
        elif config.handoff is not None:
            outbound = Outbound(ledger, events.epoch, config.block_size)
        tables = BlockTables(caches, tiers, inbound, config.max_num_batched_tokens)
        decodes = config.device == "cuda" and outbound is None  # for others, an engine only computes prompts
        # A request finds room beside them.
        pins, *others = [Pins(cache, most) for cache, most in zip(caches, spare, strict=True)]
        graphs = Graphs(config.max_num_seqs if decodes else 0)
        books = (cache, tables, ledger, tiers, pins, inbound, outbound, graphs)
        return Generation(events.epoch, group, *books, self._policy.text, tuple(others))

    def use_peers(self, peers: Sequence[NamedPeer], generation: Generation | None) -> None:
        """These prefill engines compute prompts from now on, and no others; on the engine's thread.

        Args:
            generation: the one that runs, if one does; later ones know of them, too.

        Raises:
            InvalidValueError: this engine has no prompts computed by others, or its token would go to one of them in
                clear text.
        """
        if self._links is None:
            limit = "an engine has its prompts computed by others with the role decode alone"
            raise InvalidValueError("peers", [peer.name for peer in peers], limit)
        if generation is not None and generation.inbound is not None:
            generation.inbound.use(self._links.to(peers, generation.inbound.peers))
        self._peers = list(peers)

    def close(self) -> None:
        """Gives back what outlives a generation, such as the ranks' places in Ray. Close the generations first."""
        self._groups.close()

    def _open_caches(self, num_blocks: int) -> list[PrefixCache]:
        """Of each group of the policy, which has as many blocks as the first unless it can make no use of them."""
        config, caches = self._config, list[PrefixCache]()
        caps = self._policy.caps(config.block_size, config.max_num_seqs, config.max_num_batched_tokens)
        for reach, cap in zip(self._policy.reaches, caps, strict=True):
            count = num_blocks if cap is None else min(num_blocks, cap)
            quota = None if config.cache_quota is None else max(1, int(config.cache_quota * count))
            events = None if caches else self._events
            pool = BlockPool(count)
            caches.append(PrefixCache(pool, config.block_size, config.prefix_eviction, events, quota, reach))
        return caches

    def _row_blocks(self, cache: PrefixCache) -> int:
        """The most blocks of a group that a request has at a time: of the model's length, or of any."""
        config, reach = self._config, cache.reach
        whole = -(-self._max_model_len // config.block_size)
        if reach == DENSE:
            return whole
        room = RowRoom.of(reach, config.block_size, cache.pool.num_blocks, config.max_num_batched_tokens)
        most = room.most_blocks(ENDLESS if self._policy.bounded else self._max_model_len)
        return most if config.handoff is None else max(most, whole)  # a handoff reserves blocks for a whole prompt

    def _check_length(self, num_blocks: int) -> None:
        config, reaches = self._config, self._policy.reaches
        kept = (DENSE,) if config.handoff is not None else reaches
        needed = max(row_blocks(reach, config.block_size, self._max_model_len) for reach in kept)
        if num_blocks >= needed:
            return
        size = self._sizes.block_bytes
        limit = f"pays for {num_blocks} KV blocks of {config.block_size} tokens on each rank, {num_blocks * size} bytes"
        limit += f"; one request of max_model_len={self._max_model_len} tokens needs {needed * size} bytes"
        if config.num_blocks is not None and num_blocks == config.num_blocks:
            limit = f"holds {num_blocks * config.block_size} tokens, max_model_len={self._max_model_len} needs more"
            raise InvalidValueError("num_blocks", num_blocks, limit)
        value = DEFAULT_KV_MEMORY.get(config.device) if config.kv_memory is None else config.kv_memory
        fix = "raise kv_memory (--kv-memory) or lower max_model_len (--max-model-len)"
        raise InvalidValueError("kv_memory", value, limit, fix)

    def _open_inbound(
        self, handoff: HandoffConfig, ready: ReadyGroup, cache: PrefixCache, ledger: Ledger, spare: int
    ) -> Inbound:
        assert self._identity is not None, "handoffs need an identity"
        group = ready.group
        hello = Hello(self._identity, self._events.epoch, ready.endpoints, not is_loopback(handoff.host))
        credentials = None
        if handoff.ca is not None:
            cert, key = (None if path is None else Path(path) for path in (handoff.tls_cert, handoff.tls_key))
            credentials = channel_credentials(Path(handoff.ca), cert, key)
        self._links = Links(hello, credentials, handoff.token, group.wake, handoff.lease_s)
        peers = self._links.to(self._peers)
        inbound = Inbound(
            cache,
            ledger,
            self._events.epoch,
            peers,
            HandoffCost(handoff.min_tokens, self._config.max_mixed_prefill_tokens or MIXED_TOKENS),
            lease_s=handoff.lease_s,
            max_reserved=spare,
            max_tokens=min(self._max_model_len, cache.pool.num_blocks * self._config.block_size - 1),
            must_succeed=handoff.on_failure == "fail",
            meet_s=self._meet_s,
        )
        self._meet_s = MEET_S
        inbound.on_event = group.wake
        return inbound


def _stored_everywhere(ranks: list[list[Any]]) -> tuple[list[BlockKey], list[BlockKey]]:
    """What every rank has, oldest first, and what only some of them have."""
    counts = Counter(tuple(key) for stored in ranks for key in stored)
    keys = [(BlockKey(*key), count) for key, count in counts.items()]
    return [key for key, count in keys if count == len(ranks)], [key for key, count in keys if count < len(ranks)]
