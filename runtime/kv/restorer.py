"""Restorer: copies blocks from the tiers back to the device.

A block that is restored has memory of its own, which nobody else has before every rank has reported the copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from headwise.runtime.kv.arrivals import cache_arrivals
from headwise.runtime.kv.blocks import Use
from headwise.runtime.kv.cost import RestoreCost
from headwise.runtime.kv.eviction import Chain
from headwise.runtime.kv.identity import TokenBlocks
from headwise.runtime.kv.ledger import Ledger, Outcome
from headwise.runtime.kv.prefix_cache import PrefixCache
from headwise.runtime.kv.tier_books import TierBooks
from headwise.runtime.kv.tier_index import TierBlock
from headwise.runtime.kv.windows import longest_hit
from headwise.workers.kv.transfer import Op, Tier


class Found(NamedTuple):
    """What the tiers have of a sequence's first ``length`` blocks, and the device has not.

    Attributes:
        chain: what the device has of them; None where it has none, or nobody needs it.
        indices, blocks: of those that are missing, rising, and what holds each.
    """

    length: int
    chain: Chain
    indices: list[int]
    blocks: list[TierBlock]


@dataclass(slots=True, eq=False)
class _Restore:
    """Blocks of one sequence on their way to the device.

    Attributes:
        chain: cached blocks of the sequence that are held meanwhile.
        indices, wanted, memory: which blocks are restored, from where, and the device block for each.
        done: gets how many blocks came, once all jobs are done.
        waiting: jobs that are not done.
    """

    blocks: TokenBlocks
    chain: Chain
    indices: list[int]
    wanted: list[TierBlock]
    memory: list[int]
    done: Callable[[int], None]
    waiting: int = 0
    void: bool = False
    failed: set[bytes] = field(default_factory=set)


class Restorer:
    """Decides whether restoring pays, and has it done."""

    def __init__(self, cache: PrefixCache, books: TierBooks, ledger: Ledger, cost: RestoreCost) -> None:
        self._cache, self._books, self._ledger, self._cost = cache, books, ledger, cost

    def find(self, blocks: TokenBlocks, chain: Chain, limit: int) -> Found:
        """The longest start of a sequence, up to its ``limit``-th block, that need not be computed once blocks are
        restored; ``chain`` is what the device has of it."""
        cache, books = self._cache, self._books
        if cache.reach.window is None:
            found = books.find(blocks, len(chain), limit)
            stop = len(chain) + len(found)
            return Found(stop, list(chain), list(range(len(chain), stop)), found)

        def has(index: int) -> bool:
            return cache.find(blocks, index) is not None or books.find_one(blocks, index) is not None

        length = longest_hit(cache.reach, cache.block_size, limit, has)
        there: Chain = [None] * length
        indices: list[int] = []
        found = []
        for index in cache.reach.needed_blocks(length, cache.block_size):
            if (node := cache.find(blocks, index)) is not None:
                there[index] = node
            elif (block := books.find_one(blocks, index)) is not None:
                indices.append(index)
                found.append(block)
        return Found(length, there, indices, found)

    def worth(self, found: Sequence[TierBlock], num_tokens: int) -> bool:
        """Whether restoring these blocks is expected to be faster than computing so many tokens."""
        return self._cost.worth(Counter(block.tier for block in found), num_tokens)

    def decline(self, found: Sequence[TierBlock]) -> None:
        """Takes note that these blocks are computed, since restoring them was not worth it."""
        self._cost.declined(block.tier for block in found)
        self._books.counts["declined_tokens"] += len(found) * self._cache.block_size

    def restore(self, blocks: TokenBlocks, found: Found, done: Callable[[int], None]) -> None:
        """Starts to bring blocks to the device; ``done`` gets how many came.

        Raises:
            OutOfBlocksError: the device has no room for them; nothing is started.
        """
        chain, wanted = found.chain, found.blocks
        self._cache.hold(chain, Use.TRANSFER)
        try:
            memory = self._cache.allocate(len(wanted), Use.TRANSFER, blocks.owner)
        except BaseException:
            self._cache.release(chain, Use.TRANSFER)
            raise
        restore = _Restore(blocks, chain, found.indices, wanted, memory, done)
        by_tier = {
            tier: [(block, into) for block, into in zip(wanted, memory, strict=True) if block.tier is tier]
            for tier in self._books.tiers
        }
        restore.waiting = sum(bool(part) for part in by_tier.values())
        for tier, part in by_tier.items():
            if part:
                self._load(tier, part, restore)

    def _load(self, tier: Tier, part: list[tuple[TierBlock, int]], restore: _Restore) -> None:
        blocks = [block for block, _ in part]
        for block in blocks:
            self._books.tiers[tier].read(block)
            self._books.tiers[tier].touch(block)
        keys, into = [block.key for block in blocks], [block for _, block in part]
        self._ledger.start(Op.LOAD, tier, keys, into, partial(self._loaded, tier, blocks, restore))

    def _loaded(self, tier: Tier, blocks: list[TierBlock], restore: _Restore, outcome: Outcome) -> None:
        index = self._books.tiers[tier]
        for block in blocks:
            index.done(block)
        if not outcome.failed:
            self._cost.saw_restore(tier, len(blocks), outcome.seconds, outcome.latency_s)
        damaged = [block for block in blocks if block.key.digest in outcome.failed and block.key.digest in index]
        self._books.counts[f"{tier}_damaged"] += len(damaged)
        self._books.drop(index, damaged, "damage")
        restore.failed |= outcome.failed
        restore.void |= outcome.void
        restore.waiting -= 1
        if not restore.waiting:
            self._arrive(restore)

    def _arrive(self, restore: _Restore) -> None:
        """Caches what came."""
        sound = [not restore.void and block.key.digest not in restore.failed for block in restore.wanted]
        arrived = cache_arrivals(self._cache, restore.blocks, restore.chain, restore.indices, restore.memory, sound)
        tiers = dict(zip(restore.indices, restore.wanted, strict=True))
        for index in arrived:
            self._books.count(tiers[index].tier, "hit", 1)
        restore.done(len(arrived))
