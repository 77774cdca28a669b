"""Tiers: what host memory and disk hold of the prefix cache, and which blocks move between them and the device.

The shards copy, beside the steps; this decides, on the engine's thread, and a block is in a tier only once every rank
has said so. Nothing waits for a copy but a newcomer that wants memory whose blocks are not saved yet.

A block that is copied to a tier stays idle on the device, and may be taken while that goes on: the copy is then of
no use, and is dropped when the ranks report it. So a save never holds up a step. A block that is restored has memory
of its own, which nobody else has before the ranks report it.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from headwise.runtime.kv.blocks import Use
from headwise.runtime.kv.cost import RestoreCost
from headwise.runtime.kv.events import KvEvents
from headwise.runtime.kv.eviction import CachedBlock
from headwise.runtime.kv.identity import TokenBlocks
from headwise.runtime.kv.prefix_cache import PrefixCache, parent_digest
from headwise.runtime.kv.tier_index import TierEntry, TierIndex
from headwise.workers.kv.transfer import BlockKey, Op, Tier, TransferJob, TransferResult

MAX_BATCH = 64
"""Most blocks of a job that saves: a restore waits for the jobs before it."""


@dataclass(slots=True, eq=False)
class Restore:
    """Blocks on their way from the tiers to the device, for one sequence.

    Attributes:
        chain: cached blocks that come before them, held meanwhile.
        entries, memory: what is restored, and the device block for each.
        done: called with the chain and what was restored of the rest, once all jobs are.
    """

    blocks: TokenBlocks
    chain: list[CachedBlock]
    entries: list[TierEntry]
    memory: list[int]
    done: Callable[[int], None]
    waiting: int = 0
    void: bool = False
    failed: set[bytes] = field(default_factory=set)


@dataclass(slots=True)
class _Job:
    """A job in flight. ``nodes`` and ``entries``: what SAVE, and what LOAD and DEMOTE are about."""

    job: TransferJob
    nodes: list[CachedBlock] = field(default_factory=list)
    entries: list[TierEntry] = field(default_factory=list)
    restore: Restore | None = None
    void: bool = False
    started: float = field(default_factory=time.monotonic)


class Tiers:
    """The engine's side of host memory and disk. Called on the engine's thread only.

    Attributes:
        outbox: jobs to send to the shards, in order.
    """

    def __init__(
        self,
        cache: PrefixCache,
        host_blocks: int,
        disk_blocks: int,
        reserve: int,
        quota: float | None = None,
        events: KvEvents | None = None,
    ) -> None:
        """
        Args:
            host_blocks, disk_blocks: how many blocks they hold; 0 is none, and one of them is not.
            reserve: blocks on the device that can be had at once are kept at least so many, by saving idle ones early.
            quota: the share of each tier that one cache salt may fill.
        """
        self._cache, self._events, self._reserve = cache, events, reserve
        self.outbox: deque[TransferJob] = deque()
        self.cost = RestoreCost()
        self._tiers = {
            tier: TierIndex(tier, capacity, quota)
            for tier, capacity in ((Tier.HOST, host_blocks), (Tier.DISK, disk_blocks))
            if capacity
        }
        self._top = next(iter(self._tiers))
        self._counts: Counter[str] = Counter()
        self._jobs: dict[int, _Job] = {}
        self._next_id = 0
        self._unsaved: OrderedDict[CachedBlock, None] = OrderedDict()  # idle, and no tier has them
        self._saving: set[CachedBlock] = set()  # idle, and on their way to one
        self._copying: dict[bytes, CachedBlock] = {}  # on their way to one, idle or not
        self._demoting: set[bytes] = set()
        cache.on_idle, cache.on_busy = self._idle, self._busy

    @property
    def busy(self) -> bool:
        """Whether jobs are to be sent, or in flight."""
        return bool(self.outbox or self._jobs)

    def adopt(self, keys: Iterable[BlockKey], useless: Sequence[BlockKey] = ()) -> None:
        """The disk holds blocks from before.

        Args:
            keys: those that every rank has, the oldest first.
            useless: those that only some ranks have, and may delete.
        """
        disk = self._tiers[Tier.DISK]
        for key in keys:
            if not self._make_room(disk, key.namespace):
                break
            self._add(disk, key)
        if useless:
            self._send(Op.DROP, Tier.DISK, list(useless))

    def can_take(self, count: int) -> bool:
        """Whether so many blocks can be had without losing one that could be saved; if not, saving starts, and a
        later step asks again."""
        clean = self._cache.num_available - len(self._unsaved) - len(self._saving)
        if count <= clean:
            return True
        self._save(count - clean - len(self._saving))
        return not self._saving and not (self._unsaved and self._demoting)

    def pump(self) -> None:
        """Starts what keeps the reserves. Called once a step."""
        clean = self._cache.num_available - len(self._unsaved)
        if self._unsaved and clean < self._reserve:
            self._save(self._reserve - clean)
        self._keep_host_reserve()

    def find(self, blocks: TokenBlocks, start: int, limit: int) -> list[TierEntry]:
        """The tiers' blocks that continue a sequence from its ``start``-th block, up to the ``limit``-th."""
        found: list[TierEntry] = []
        for index in range(start, limit):
            entry = self._find(blocks, index)
            if entry is None:
                break
            found.append(entry)
        return found

    def worth(self, entries: Sequence[TierEntry]) -> bool:
        """Whether restoring them is expected to be faster than computing them."""
        tokens = len(entries) * self._cache.block_size
        worth = self.cost.worth(Counter(entry.tier for entry in entries), tokens)
        if not worth:
            self._counts["declined_tokens"] += tokens
        return worth

    def restore(
        self,
        blocks: TokenBlocks,
        chain: Sequence[CachedBlock],
        entries: list[TierEntry],
        done: Callable[[int], None],
    ) -> None:
        """Starts to bring ``entries``, which continue ``chain``, to the device; ``done`` gets how many came.

        Raises:
            OutOfBlocksError: the device has no room for them; nothing is started.
        """
        self._cache.hold(chain, Use.TRANSFER)
        try:
            memory = self._cache.allocate(len(entries), Use.TRANSFER, blocks.namespace)
        except BaseException:
            self._cache.release(chain, Use.TRANSFER)
            raise
        restore = Restore(blocks, list(chain), entries, memory, done)
        for tier, index in self._tiers.items():
            part = [(entry, block) for entry, block in zip(entries, memory, strict=True) if entry.tier is tier]
            if part:
                restore.waiting += 1
                keys, into = [entry.key for entry, _ in part], [block for _, block in part]
                job = self._send(Op.LOAD, tier, keys, into)
                job.entries, job.restore = [entry for entry, _ in part], restore
                for entry in job.entries:
                    entry.busy += 1
                    index.touch(entry)

    def finished(self, result: TransferResult) -> None:
        """Every rank is done with a job; ``failed`` has what failed on any of them."""
        job = self._jobs.pop(result.id)
        failed = set(result.failed)
        for entry in job.entries:
            entry.busy -= 1
        if job.job.op is Op.SAVE:
            self._saved(job, failed)
        elif job.job.op is Op.DEMOTE:
            self._demoted(job, failed)
        elif job.job.op is Op.LOAD:
            self._loaded(job, failed, result.seconds)

    def clear(self) -> None:
        """Forgets what the tiers hold; what is on its way will not arrive."""
        for index in self._tiers.values():
            self._drop(index, list(index), "reset")
        for job in self._jobs.values():
            job.void = True
            if job.restore is not None:
                job.restore.void = True

    def stats(self) -> dict[str, Any]:
        """By tier: blocks held and their limit, tokens ``queried``, ``hit`` (restored) and ``inserted``, ``evictions``
        in blocks by cause, ``damaged`` blocks found and ``refused`` ones, which could not be written.

        For all: ``declined_tokens``, which were faster to compute; ``collisions``, digests that stood for other tokens;
        and the measured seconds of a block or token.
        """
        stats: dict[str, Any] = {
            "declined_tokens": self._counts["declined_tokens"],
            "collisions": self._counts["collisions"],
            "seconds": self.cost.stats(),
        }
        for tier, index in self._tiers.items():
            mine = {name.removeprefix(f"{tier}_"): n for name, n in self._counts.items() if name.startswith(f"{tier}_")}
            evictions = {name.removeprefix("evicted_"): n for name, n in mine.items() if name.startswith("evicted_")}
            named = {name: mine.get(name, 0) for name in _TIER_COUNTS}
            stats[tier.value] = {"blocks": len(index), "max_blocks": index.capacity, **named, "evictions": evictions}
        return stats

    def check_integrity(self) -> None:
        """
        Raises:
            IntegrityError: a tier holds more than it may, or its books do not agree.
        """
        for index in self._tiers.values():
            index.check_integrity()

    def _idle(self, node: CachedBlock) -> None:
        if not node.verified or node.unwanted or self._holds(node.digest):
            return
        copying = self._copying.get(node.digest)
        if copying is None:
            self._unsaved[node] = None
        elif copying is node:
            self._saving.add(node)

    def _busy(self, node: CachedBlock) -> None:
        if node in self._unsaved:
            del self._unsaved[node]
        self._saving.discard(node)
        node.unwanted = False

    def _holds(self, digest: bytes) -> bool:
        return any(digest in index for index in self._tiers.values())

    def _find(self, blocks: TokenBlocks, index: int) -> TierEntry | None:
        for tier in self._tiers.values():
            entry = tier.get(blocks.digests[index])
            if entry is not None:
                key = entry.key
                if (key.namespace, key.parent) == (blocks.namespace, blocks.parent(index)) and (
                    key.tokens == blocks.block(index)
                ):
                    return entry
                self._counts["collisions"] += 1
        return None

    def _save(self, count: int) -> None:
        """Starts to copy up to so many idle blocks, those first that are evicted first, to the topmost tier."""
        index = self._tiers[self._top]
        nodes: list[CachedBlock] = []
        while self._unsaved and len(nodes) < min(count, MAX_BATCH):
            node = next(iter(self._unsaved))
            if not self._make_room(index, node.namespace):
                self._keep_host_reserve()
                break
            del self._unsaved[node]
            index.incoming[node.namespace] += 1
            self._saving.add(node)
            self._copying[node.digest] = node
            nodes.append(node)
        if nodes:
            keys = [BlockKey(node.digest, node.namespace, parent_digest(node), node.tokens) for node in nodes]
            self._send(Op.SAVE, self._top, keys, [node.block for node in nodes]).nodes = nodes

    def _saved(self, job: _Job, failed: set[bytes]) -> None:
        index = self._tiers[job.job.tier]
        index.incoming -= Counter(node.namespace for node in job.nodes)
        useless: list[BlockKey] = []
        for node, key in zip(job.nodes, job.job.keys, strict=True):
            del self._copying[node.digest]
            self._saving.discard(node)
            if node.digest in failed:
                self._counts[f"{index.tier}_refused"] += 1
                node.unwanted = True
            if job.void or not node.cached or node.digest in failed:
                # Taken for something else while it was copied, or missing on a rank: no good to anybody.
                useless.append(key)
                continue
            self._add(index, key)
            self._counts[f"{index.tier}_inserted_tokens"] += self._cache.block_size
        if useless:
            self._send(Op.DROP, index.tier, useless)
            self._retry([key.digest for key in useless])

    def _keep_host_reserve(self) -> None:
        """Starts to copy what the host may have to part with to the disk, if there are both."""
        if len(self._tiers) < 2:
            return
        host, disk = self._tiers[Tier.HOST], self._tiers[Tier.DISK]
        count = min(host.capacity, self._reserve) - host.num_free - host.num_clean
        if count <= 0:
            return
        entries: list[TierEntry] = []
        for entry in host.dirty(min(count, MAX_BATCH)):
            if entry.key.digest in self._demoting:  # an earlier one of that digest, which is void by now
                continue
            if not self._make_room(disk, entry.key.namespace):
                break
            disk.incoming[entry.key.namespace] += 1
            entry.busy += 1
            host.clean(entry)
            entries.append(entry)
        self._demoting |= {entry.key.digest for entry in entries}
        if entries:
            self._send(Op.DEMOTE, Tier.DISK, [entry.key for entry in entries]).entries = entries

    def _demoted(self, job: _Job, failed: set[bytes]) -> None:
        disk = self._tiers[Tier.DISK]
        disk.incoming -= Counter(entry.key.namespace for entry in job.entries)
        self._demoting -= {entry.key.digest for entry in job.entries}
        for entry in job.entries:
            if entry.key.digest in failed:
                self._counts["disk_refused"] += 1
            elif not job.void and entry.key.digest not in disk:
                self._add(disk, entry.key)
                self._counts["disk_inserted_tokens"] += self._cache.block_size
        if useless := [key for key in job.job.keys if key.digest not in disk]:
            self._send(Op.DROP, Tier.DISK, useless)

    def _loaded(self, job: _Job, failed: set[bytes], seconds: float) -> None:
        index, restore = self._tiers[job.job.tier], job.restore
        assert restore is not None, "a LOAD is part of a restore"
        if not failed:
            latency = max(0.0, time.monotonic() - job.started - seconds)
            self.cost.saw_restore(index.tier, len(job.entries), seconds, latency)
        damaged = [entry for entry in job.entries if entry.key.digest in failed and entry.key.digest in index]
        self._counts[f"{index.tier}_damaged"] += len(damaged)
        self._drop(index, damaged, "damage")
        restore.failed |= failed
        restore.waiting -= 1
        if not restore.waiting:
            self._arrive(restore)

    def _arrive(self, restore: Restore) -> None:
        """Caches what came, up to the first block that did not; all of it is idle then."""
        cache, chain = self._cache, list(restore.chain)
        arrived, complete = 0, not restore.void and all(node.cached for node in chain)
        rest: list[tuple[int, CachedBlock | None]] = []
        for entry, block in zip(restore.entries, restore.memory, strict=True):
            complete = complete and entry.key.digest not in restore.failed
            parent = chain[-1] if chain else None
            node = cache.insert(restore.blocks, len(chain), parent, block, verified=True) if complete else None
            complete = node is not None
            rest.append((block, node if node is not None and node.block == block else None))
            if node is not None:
                if node.block != block:  # somebody computed it meanwhile
                    cache.hold([node], Use.TRANSFER)
                    rest.append((node.block, node))
                chain.append(node)
                arrived += 1
                self._counts[f"{entry.tier}_hit_tokens"] += cache.block_size
        for block, node in reversed(rest):
            cache.release_block(block, Use.TRANSFER, node)
        cache.release(restore.chain, Use.TRANSFER)
        restore.done(arrived)

    def count_lookup(self, tokens: int) -> None:
        """So many tokens of a request were not on the device, and looked for here."""
        for tier in self._tiers:
            self._counts[f"{tier}_queried_tokens"] += tokens

    def _make_room(self, index: TierIndex, namespace: bytes) -> bool:
        """Drops what must go for one more block; False if nothing can go now."""
        if not index.is_full(namespace):
            return True
        victim = index.victim(namespace)
        if victim is None:
            return False
        self._drop(index, [victim], "room")
        return True

    def _add(self, index: TierIndex, key: BlockKey) -> None:
        index.add(TierEntry(key, index.tier), clean=index.tier is not Tier.HOST or Tier.DISK not in self._tiers)
        if self._events is not None:
            self._events.stored([key.digest], key.parent, index.tier.value)

    def _drop(self, index: TierIndex, entries: list[TierEntry], cause: str) -> None:
        if not entries:
            return
        digests = [entry.key.digest for entry in entries]
        for entry in entries:
            index.remove(entry)
        self._counts[f"{index.tier}_evicted_{cause}"] += len(entries)
        if self._events is not None:
            self._events.removed(digests, index.tier.value)
        self._send(Op.DROP, index.tier, [entry.key for entry in entries])
        if cause == "room":  # it would only drive out others to come back
            for digest in digests:
                node = self._cache.get(digest)
                if node is not None and not self._cache.pool.is_used(node.block):
                    node.unwanted = True
        else:
            self._retry(digests)

    def _retry(self, digests: Iterable[bytes]) -> None:
        """No tier has these blocks after all, or any more: if they are idle on the device, they are to be saved."""
        for digest in digests:
            node = self._cache.get(digest)
            if node is not None and not self._cache.pool.is_used(node.block):
                self._idle(node)

    def _send(self, op: Op, tier: Tier, keys: list[BlockKey], blocks: Sequence[int] = ()) -> _Job:
        job = _Job(TransferJob(self._next_id, op, tier, keys, list(blocks)))
        self._jobs[self._next_id] = job
        self._next_id += 1
        self.outbox.append(job.job)
        return job


_TIER_COUNTS = ("queried_tokens", "hit_tokens", "inserted_tokens", "damaged", "refused")
