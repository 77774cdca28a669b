"""TierIndex: the blocks that one tier holds on every rank, least recently used first."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias

from headwise.runtime.kv.blocks import IntegrityError, parts
from headwise.workers.kv.transfer import BlockKey, Tier


@dataclass(slots=True, eq=False)
class TierBlock:
    """A block in a tier.

    Attributes:
        owner: whose quota it counts for.
        readers: jobs in flight that read it, which the index counts.
    """

    key: BlockKey
    tier: Tier
    owner: bytes
    readers: int = 0


_Order: TypeAlias = OrderedDict[bytes, TierBlock]
"""Blocks by digest, least recently used first."""


class TierIndex:
    """What a tier holds, and what it would part with.

    Attributes:
        incoming: blocks on their way to it by owner, for which room is kept.
        changes: counts what changed, but for ``incoming`` and the order of blocks.
    """

    def __init__(self, tier: Tier, capacity: int, quota: float | None = None) -> None:
        """Args: ``capacity``: most blocks; ``quota``: the share of them one owner may have."""
        self.tier, self.capacity = tier, capacity
        self.incoming: Counter[bytes] = Counter()
        self.changes = 0
        self._quota = None if quota is None else max(1, int(quota * capacity))
        self._blocks: dict[bytes, TierBlock] = {}
        self._dirty: _Order = OrderedDict()  # only this tier has them, and there is one below
        self._idle: _Order = OrderedDict()  # can go: not dirty, and no job reads them
        self._idle_of: dict[bytes, _Order] = {}  # the same by owner, kept only where there is a quota
        self._num_of: Counter[bytes] = Counter()  # all blocks of each owner

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._blocks

    def __iter__(self) -> Iterator[TierBlock]:
        return iter(self._blocks.values())

    def get(self, digest: bytes) -> TierBlock | None:
        return self._blocks.get(digest)

    @property
    def num_free(self) -> int:
        return self.capacity - len(self._blocks) - self.incoming.total()

    @property
    def num_clean(self) -> int:
        """Blocks that can go, once no job reads them."""
        return len(self._blocks) - len(self._dirty)

    def is_full(self, owner: bytes) -> bool:
        """Whether something must go before one more block of an owner comes."""
        return self.num_free <= 0 or self._has_full_quota(owner)

    def victim(self, owner: bytes) -> TierBlock | None:
        """What goes for one more block of an owner: its own least recently used if it has its full quota, else
        anybody's. None if nothing can go now, since it is read, or not yet in the tier below."""
        idle = self._idle_of.get(owner) if self._has_full_quota(owner) else self._idle
        return next(iter(idle.values()), None) if idle else None

    def dirty(self, count: int) -> list[TierBlock]:
        """Up to so many that only this tier has, the least recently used first."""
        return list(islice(self._dirty.values(), count))

    def clean(self, block: TierBlock) -> None:
        """It can go, once no job reads it."""
        if self._dirty.pop(block.key.digest, None) is not None:
            self._file(block)

    def add(self, block: TierBlock, clean: bool) -> None:
        digest = block.key.digest
        if digest in self._blocks:
            raise IntegrityError(f"{self.tier} holds {digest.hex()} already")
        self._blocks[digest] = block
        self._num_of[block.owner] += 1
        if not clean:
            self._dirty[digest] = block
        self._file(block)

    def touch(self, block: TierBlock) -> None:
        """It was used."""
        if block.key.digest in self._dirty:
            self._dirty.move_to_end(block.key.digest)
        else:
            self._file(block)

    def read(self, block: TierBlock) -> None:
        """A job reads it from now on: the tier keeps it meanwhile."""
        block.readers += 1
        self._unfile(block)

    def done(self, block: TierBlock) -> None:
        """A job reads it no longer. The tier may have been cleared meanwhile."""
        block.readers -= 1
        self.changes += 1
        if self._blocks.get(block.key.digest) is block:
            self.touch(block)

    def remove(self, block: TierBlock) -> None:
        digest, owner = block.key.digest, block.owner
        del self._blocks[digest]
        self._dirty.pop(digest, None)
        self._unfile(block)
        self._num_of[owner] -= 1
        if not self._num_of[owner]:
            del self._num_of[owner]

    def check_integrity(self) -> None:
        """
        Raises:
            IntegrityError: it holds more than its capacity, or its books do not agree.
        """
        for _ in self.checks():
            pass

    def checks(self) -> Iterator[None]:
        """:meth:`check_integrity` in parts; void if anything changes before the last one."""
        incoming = self.incoming.total()
        if len(self) + incoming > self.capacity:
            raise IntegrityError(f"{self.tier} holds {len(self)} + {incoming} blocks, at most {self.capacity}")
        for owners in parts(self._num_of.items()):
            yield
            for owner, own in owners:
                if self._quota is not None and own + self.incoming[owner] > self._quota:
                    raise IntegrityError(f"{self.tier} holds {own} blocks of an owner, at most {self._quota}")
        dirty, idle, num_of = 0, 0, Counter[bytes]()
        for blocks in parts(self._blocks.items()):
            yield
            for digest, block in blocks:
                is_dirty, is_idle = digest in self._dirty, self._idle.get(digest) is block
                if is_idle != (not is_dirty and not block.readers):
                    raise IntegrityError(f"{self.tier} holds a block that is neither clean nor dirty, or both")
                own_idle = self._idle_of.get(block.owner)
                if is_idle and self._quota and (own_idle is None or own_idle.get(digest) is not block):
                    raise IntegrityError(f"{self.tier} holds a block that its owner could not give up")
                dirty, idle = dirty + is_dirty, idle + is_idle
            num_of.update(block.owner for _, block in blocks)
        if (dirty, idle) != (len(self._dirty), len(self._idle)):
            raise IntegrityError(f"{self.tier} does not hold all that is clean or dirty")
        if num_of != self._num_of or (self._quota and sum(map(len, self._idle_of.values())) != idle):
            raise IntegrityError(f"{self.tier}'s blocks are not those of its owners")

    def _has_full_quota(self, owner: bytes) -> bool:
        return self._quota is not None and self._num_of[owner] + self.incoming[owner] >= self._quota

    def _orders(self, owner: bytes) -> list[_Order]:
        return [self._idle] if self._quota is None else [self._idle, self._idle_of.setdefault(owner, OrderedDict())]

    def _file(self, block: TierBlock) -> None:
        """Puts a block last among those that can go, if it is one of them."""
        self.changes += 1
        digest = block.key.digest
        if block.readers or digest in self._dirty:
            return
        for order in self._orders(block.owner):
            order[digest] = block
            order.move_to_end(digest)

    def _unfile(self, block: TierBlock) -> None:
        self.changes += 1
        for order in self._orders(block.owner):
            order.pop(block.key.digest, None)
        if not self._idle_of.get(block.owner, True):
            del self._idle_of[block.owner]
