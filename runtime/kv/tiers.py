"""Tiers: host memory and disk below the device's prefix cache, put together.

The shards copy, beside the steps; saver, demoter and restorer decide, on the engine's thread. A block is in a tier only
once every rank has said so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from headwise.runtime.kv.cost import RestoreCost
from headwise.runtime.kv.demoter import Demoter
from headwise.runtime.kv.events import KvEvents
from headwise.runtime.kv.ledger import Ledger
from headwise.runtime.kv.prefix_cache import PrefixCache
from headwise.runtime.kv.restorer import Restorer
from headwise.runtime.kv.saver import Saver
from headwise.runtime.kv.tier_books import TierBooks
from headwise.workers.kv.transfer import BlockKey, Tier


class Tiers:
    """What the scheduler and the engine know of the tiers. Called on the engine's thread only.

    Attributes:
        books: what each tier holds.
        saver, demoter, restorer: move blocks from the device down, from host memory to disk, and back to the device.
        cost: what restoring and computing took lately.
    """

    def __init__(
        self,
        cache: PrefixCache,
        ledger: Ledger,
        host_blocks: int,
        disk_blocks: int,
        reserve: int,
        quota: float | None = None,
        events: KvEvents | None = None,
    ) -> None:
        """
        Args:
            ledger: for the jobs that move blocks.
            host_blocks, disk_blocks: how many blocks they hold; 0 is none, and one of them is not.
            reserve: blocks on the device that can be had at once are kept at least so many, by saving idle ones early;
                the same of the host's blocks, by copying them to the disk.
            quota: the share of each tier that one owner may fill.
        """
        self._ledger, self.cost = ledger, RestoreCost()
        self.books = TierBooks(
            {Tier.HOST: host_blocks, Tier.DISK: disk_blocks}, cache.block_size, ledger, quota, events
        )
        self.demoter = Demoter(self.books, ledger, reserve)
        self.saver = Saver(cache, self.books, ledger, self.demoter, reserve)
        self.restorer = Restorer(cache, self.books, ledger, self.cost)

    def adopt(self, keys: Iterable[BlockKey], useless: Sequence[BlockKey] = ()) -> None:
        """The disk holds blocks from before. Whose they were is not known; each namespace is an owner of its own.

        Args:
            keys: those that every rank has, the oldest first.
            useless: those that only some ranks have, and are to delete.
        """
        disk = self.books.tiers[Tier.DISK]
        for key in keys:
            if not self.books.make_room(disk, key.namespace):
                break
            self.books.add(disk, key, key.namespace)
        self.books.discard(Tier.DISK, useless)
        self._ledger.flush()

    def pump(self) -> None:
        """Starts what keeps the reserves. Called once a step."""
        self.saver.keep_reserve()
        self.demoter.keep_reserve()

    def clear(self) -> None:
        """Forgets what the tiers hold; what is on its way will not arrive."""
        self._ledger.void()
        self.books.clear()

    def stats(self) -> dict[str, Any]:
        """As :meth:`TierBooks.stats <headwise.runtime.kv.tier_books.TierBooks.stats>`; and ``declined_tokens``, which
        were faster to compute, and the measured ``seconds`` of a block or token."""
        declined = self.books.counts["declined_tokens"]
        return self.books.stats() | {"declined_tokens": declined, "seconds": self.cost.stats()}
