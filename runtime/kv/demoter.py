"""Demoter: copies blocks from host memory to the disk before the host must part with them."""

from __future__ import annotations

from functools import partial

from headwise.runtime.kv.ledger import MAX_BATCH, Ledger, Outcome
from headwise.runtime.kv.tier_books import TierBooks
from headwise.runtime.kv.tier_index import TierBlock
from headwise.workers.kv.transfer import Op, Tier


class Demoter:
    """Does nothing unless there are both a host tier and a disk."""

    def __init__(self, books: TierBooks, ledger: Ledger, reserve: int) -> None:
        """Args: ``reserve``: at least so many of the host's blocks can be had at once."""
        self._books, self._ledger, self._reserve = books, ledger, reserve
        self._demoting: set[bytes] = set()

    @property
    def busy(self) -> bool:
        """Whether blocks are on their way to the disk."""
        return bool(self._demoting)

    def keep_reserve(self) -> None:
        """Starts to copy what the reserve lacks. Called once a step."""
        if len(self._books.tiers) < 2:
            return
        host, disk = self._books.tiers[Tier.HOST], self._books.tiers[Tier.DISK]
        count = min(host.capacity, self._reserve) - host.num_free - host.num_clean
        if count <= 0:
            return
        blocks: list[TierBlock] = []
        for block in host.dirty(min(count, MAX_BATCH)):
            if block.key.digest in self._demoting:  # an earlier block of that digest, whose copy is void by now
                continue
            if not self._books.expect(disk, block.owner):
                break
            host.read(block)
            host.clean(block)
            blocks.append(block)
        self._demoting |= {block.key.digest for block in blocks}
        if blocks:
            keys = [block.key for block in blocks]
            self._ledger.start(Op.DEMOTE, Tier.DISK, keys, done=partial(self._demoted, blocks))

    def _demoted(self, blocks: list[TierBlock], outcome: Outcome) -> None:
        host, disk = self._books.tiers[Tier.HOST], self._books.tiers[Tier.DISK]
        self._books.settle(disk, (block.owner for block in blocks))
        self._demoting -= {block.key.digest for block in blocks}
        for block in blocks:
            host.done(block)
            if block.key.digest in outcome.failed:
                self._books.counts["disk_refused"] += 1
            elif not outcome.void and block.key.digest not in disk:
                self._books.add(disk, block.key, block.owner)
                self._books.count(Tier.DISK, "inserted", 1)
        self._books.discard(Tier.DISK, [block.key for block in blocks if block.key.digest not in disk])
