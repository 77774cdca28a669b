"""Saver: copies idle blocks to the topmost tier before their memory is wanted.

A block stays idle while it is copied, and its memory may be taken meanwhile: the copy is then of no use, and every rank
deletes it. So a save never holds up a step. A request that waits for admission is the only one that waits for saves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from functools import partial

from headwise.runtime.kv.demoter import Demoter
from headwise.runtime.kv.eviction import CachedBlock
from headwise.runtime.kv.ledger import MAX_BATCH, Ledger, Outcome
from headwise.runtime.kv.prefix_cache import PrefixCache
from headwise.runtime.kv.tier_books import TierBooks
from headwise.workers.kv.transfer import BlockKey, Op


class Saver:
    """Knows which idle blocks no tier has. The cache tells it of idle and busy blocks, the books of dropped ones."""

    def __init__(self, cache: PrefixCache, books: TierBooks, ledger: Ledger, demoter: Demoter, reserve: int) -> None:
        """Args: ``reserve``: at least so many device blocks can be had without a loss, by saving idle ones early."""
        self._cache, self._books, self._ledger, self._demoter = cache, books, ledger, demoter
        self._reserve = reserve
        self._top = next(iter(books.tiers.values()))
        self._unsaved: OrderedDict[CachedBlock, None] = OrderedDict()  # idle, and no tier has them
        self._saving: set[CachedBlock] = set()  # idle, and on their way to a tier
        self._copying: dict[bytes, CachedBlock] = {}  # on their way to a tier, idle or not
        cache.on_idle, cache.on_busy, books.on_dropped = self._idle, self._busy, self._dropped

    def can_take(self, count: int) -> bool:
        """Whether so many blocks can be had without losing one that could be saved; if not, saving starts, and a
        later step asks again."""
        clean = self._cache.num_available - len(self._unsaved) - len(self._saving)
        if count <= clean:
            return True
        self._save(count - clean - len(self._saving))
        return not self._saving and not (self._unsaved and self._demoter.busy)

    def keep_reserve(self) -> None:
        """Starts to save what the reserve lacks. Called once a step."""
        clean = self._cache.num_available - len(self._unsaved)
        if self._unsaved and clean < self._reserve:
            self._save(self._reserve - clean)

    def _idle(self, node: CachedBlock) -> None:
        if node.unwanted or self._books.holds(node.digest):
            return
        copying = self._copying.get(node.digest)
        if copying is None:
            self._unsaved[node] = None
        elif copying is node:
            self._saving.add(node)

    def _busy(self, node: CachedBlock) -> None:
        self._unsaved.pop(node, None)
        self._saving.discard(node)
        node.unwanted = False

    def _save(self, count: int) -> None:
        """Starts to copy up to so many idle blocks, those first that are evicted first."""
        nodes: list[CachedBlock] = []
        while self._unsaved and len(nodes) < min(count, MAX_BATCH):
            node = next(iter(self._unsaved))
            if not self._books.expect(self._top, node.owner):
                self._demoter.keep_reserve()
                break
            del self._unsaved[node]
            self._saving.add(node)
            self._copying[node.digest] = node
            nodes.append(node)
        if nodes:
            keys = [BlockKey(node.digest, node.namespace, node.parent_digest, node.tokens) for node in nodes]
            blocks = [node.block for node in nodes]
            self._ledger.start(Op.SAVE, self._top.tier, keys, blocks, partial(self._saved, nodes, keys))

    def _saved(self, nodes: list[CachedBlock], keys: list[BlockKey], outcome: Outcome) -> None:
        tier = self._top.tier
        self._books.settle(self._top, (node.owner for node in nodes))
        useless: list[BlockKey] = []
        for node, key in zip(nodes, keys, strict=True):
            del self._copying[node.digest]
            self._saving.discard(node)
            if node.digest in outcome.failed:
                self._books.counts[f"{tier}_refused"] += 1
                node.unwanted = True
            if outcome.void or not node.cached or node.digest in outcome.failed:
                # Its memory was taken while it was copied, or a rank does not have it: no good to anybody.
                useless.append(key)
                continue
            self._books.add(self._top, key, node.owner)
            self._books.count(tier, "inserted", 1)
        self._books.discard(tier, useless)
        self._try_again(key.digest for key in useless)

    def _dropped(self, digests: list[bytes], cause: str) -> None:
        if cause != "room":
            self._try_again(digests)
            return
        for node in self._idle_nodes(digests):  # saved again, it would only drive out others
            node.unwanted = True

    def _try_again(self, digests: Iterable[bytes]) -> None:
        """No tier has these blocks: if they are idle on the device, they are to be saved."""
        for node in self._idle_nodes(digests):
            self._idle(node)

    def _idle_nodes(self, digests: Iterable[bytes]) -> list[CachedBlock]:
        nodes = (self._cache.get(digest) for digest in digests)
        return [node for node in nodes if node is not None and not self._cache.pool.is_used(node.block)]
