"""TierBooks: what each tier holds, for everybody who moves blocks into a tier, between tiers or out of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from headwise.runtime.kv.events import KvEvents
from headwise.runtime.kv.identity import TokenBlocks
from headwise.runtime.kv.ledger import Ledger
from headwise.runtime.kv.tier_index import TierBlock, TierIndex
from headwise.workers.kv.transfer import BlockKey, Tier


class TierBooks:
    """The indices of host memory and disk, and the counts of what became of blocks.

    Attributes:
        tiers: those that there are, the topmost first.
        counts: since the start, by name; see :meth:`stats`.
        on_dropped: told of digests that a tier holds no longer, and why.
    """

    def __init__(
        self,
        capacities: dict[Tier, int],
        block_size: int,
        ledger: Ledger,
        quota: float | None = None,
        events: KvEvents | None = None,
    ) -> None:
        """
        Args:
            capacities: how many blocks each tier holds, the topmost first; 0 is no such tier.
            quota: the share of each tier that one owner may fill.
        """
        self.tiers = {tier: TierIndex(tier, size, quota) for tier, size in capacities.items() if size}
        self.block_size = block_size
        self.counts: Counter[str] = Counter()
        self.on_dropped: Callable[[list[bytes], str], None] = lambda digests, cause: None
        self._ledger, self._events = ledger, events

    def holds(self, digest: bytes) -> bool:
        return any(digest in index for index in self.tiers.values())

    def find(self, blocks: TokenBlocks, start: int, limit: int) -> list[TierBlock]:
        """The tiers' blocks that continue a sequence from its ``start``-th block, up to the ``limit``-th."""
        found: list[TierBlock] = []
        for index in range(start, limit):
            block = self.find_one(blocks, index)
            if block is None:
                break
            found.append(block)
        return found

    def find_one(self, blocks: TokenBlocks, index: int) -> TierBlock | None:
        """The ``index``-th block of a sequence. A digest alone proves nothing: the tokens, and all before them, must
        be the same."""
        for tier in self.tiers.values():
            block = tier.get(blocks.digests[index])
            if block is not None:
                key = block.key
                if (key.namespace, key.parent) == (blocks.namespace, blocks.parent(index)) and (
                    key.tokens == blocks.block(index)
                ):
                    return block
                self.counts["collisions"] += 1
        return None

    def make_room(self, index: TierIndex, owner: bytes) -> bool:
        """Drops what must go for one more block; False if nothing can go now."""
        if not index.is_full(owner):
            return True
        victim = index.victim(owner)
        if victim is None:
            return False
        self.drop(index, [victim], "room")
        return True

    def expect(self, index: TierIndex, owner: bytes) -> bool:
        """Keeps room in a tier for one more block, until :meth:`settle`; False if there can be none now."""
        if not self.make_room(index, owner):
            return False
        index.incoming[owner] += 1
        return True

    def settle(self, index: TierIndex, owners: Iterable[bytes]) -> None:
        """Blocks that were expected have come, or will not."""
        index.incoming -= Counter(owners)

    def add(self, index: TierIndex, key: BlockKey, owner: bytes) -> None:
        """Every rank has a block in a tier."""
        index.add(TierBlock(key, index.tier, owner), clean=index.tier is not Tier.HOST or Tier.DISK not in self.tiers)
        if self._events is not None:
            self._events.stored([key.digest], key.parent, index.tier.value)

    def drop(self, index: TierIndex, blocks: list[TierBlock], cause: str) -> None:
        """A tier holds these blocks no longer."""
        if not blocks:
            return
        digests = [block.key.digest for block in blocks]
        for block in blocks:
            index.remove(block)
        self.counts[f"{index.tier}_evicted_{cause}"] += len(blocks)
        if self._events is not None:
            self._events.removed(digests, index.tier.value)
        self._ledger.drop(index.tier, (block.key for block in blocks))
        self.on_dropped(digests, cause)

    def discard(self, tier: Tier, keys: Iterable[BlockKey]) -> None:
        """Ranks may hold these blocks, but not all of them do: they are to delete what they have."""
        self._ledger.drop(tier, keys)

    def clear(self) -> None:
        """Forgets everything, and has the ranks told at once: the engine may be closed next."""
        for index in self.tiers.values():
            self.drop(index, list(index), "reset")
        self._ledger.flush()

    def count(self, tier: Tier, what: str, blocks: int) -> None:
        """Counts the tokens of so many blocks."""
        self.counts[f"{tier}_{what}_tokens"] += blocks * self.block_size

    def count_lookup(self, tokens: int) -> None:
        """So many tokens of a request were not on the device, and looked for in the tiers."""
        for tier in self.tiers:
            self.counts[f"{tier}_queried_tokens"] += tokens

    def stats(self) -> dict[str, Any]:
        """By tier: blocks held and their limit, tokens ``queried``, ``hit`` (restored) and ``inserted``, ``evictions``
        in blocks by cause, ``damaged`` blocks found, and ``refused`` blocks, which could not be written.

        For all: ``collisions``, digests that stood for other tokens.
        """
        stats: dict[str, Any] = {"collisions": self.counts["collisions"]}
        for tier, index in self.tiers.items():
            mine = {name.removeprefix(f"{tier}_"): n for name, n in self.counts.items() if name.startswith(f"{tier}_")}
            evictions = {name.removeprefix("evicted_"): n for name, n in mine.items() if name.startswith("evicted_")}
            named = {name: mine.get(name, 0) for name in _COUNTS}
            stats[tier.value] = {"blocks": len(index), "max_blocks": index.capacity, **named, "evictions": evictions}
        return stats

    def check_integrity(self) -> None:
        """
        Raises:
            IntegrityError: a tier holds more than it may, or its books do not agree.
        """
        for index in self.tiers.values():
            index.check_integrity()

    def checks(self) -> Iterator[None]:
        """:meth:`check_integrity` in parts; void if anything changes before the last one."""
        for index in self.tiers.values():
            yield from index.checks()

    @property
    def changes(self) -> int:
        """Counts what changed in the tiers."""
        return sum(index.changes for index in self.tiers.values())


_COUNTS = ("queried_tokens", "hit_tokens", "inserted_tokens", "damaged", "refused")
