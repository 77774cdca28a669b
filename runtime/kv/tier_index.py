"""TierIndex: the blocks that one tier holds on every rank, least recently used first."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from headwise.runtime.kv.blocks import IntegrityError
from headwise.workers.kv.transfer import BlockKey, Tier


@dataclass(slots=True, eq=False)
class TierBlock:
    """A block in a tier.

    Attributes:
        owner: whose quota it counts for.
        readers: jobs in flight that read it; the tier keeps it meanwhile.
    """

    key: BlockKey
    tier: Tier
    owner: bytes
    readers: int = 0


class TierIndex:
    """What a tier holds, and what it would part with.

    Attributes:
        incoming: blocks on their way to it by owner, for which room is kept.
    """

    def __init__(self, tier: Tier, capacity: int, quota: float | None = None) -> None:
        """Args: ``capacity``: most blocks; ``quota``: the share of them one owner may have."""
        self.tier, self.capacity = tier, capacity
        self.incoming: Counter[bytes] = Counter()
        self._quota = None if quota is None else max(1, int(quota * capacity))
        self._blocks: dict[bytes, TierBlock] = {}
        self._clean: OrderedDict[bytes, None] = OrderedDict()  # can go: a tier below has them, or there is none
        self._dirty: OrderedDict[bytes, None] = OrderedDict()
        self._of_owner: dict[bytes, OrderedDict[bytes, None]] = {}

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
        return len(self._clean)

    def is_full(self, owner: bytes) -> bool:
        """Whether something must go before one more block of an owner comes."""
        return self.num_free <= 0 or self._has_full_quota(owner)

    def victim(self, owner: bytes) -> TierBlock | None:
        """What goes for one more block of an owner: its own least recently used if it has its full quota, else
        anybody's. None if nothing can go now, since it is read, or not yet in the tier below."""
        own = self._of_owner.get(owner, OrderedDict())
        candidates = own if self._has_full_quota(owner) else self._clean
        # What is read is passed over: as many blocks as the jobs in flight have, at most.
        for digest in candidates:
            if digest in self._clean and not self._blocks[digest].readers:
                return self._blocks[digest]
        return None

    def dirty(self, count: int) -> list[TierBlock]:
        """Up to so many that only this tier has, the least recently used first."""
        return [self._blocks[digest] for digest in islice(self._dirty, count)]

    def clean(self, block: TierBlock) -> None:
        """It can go, once no job reads it."""
        if block.key.digest in self._dirty:
            del self._dirty[block.key.digest]
            self._clean[block.key.digest] = None

    def add(self, block: TierBlock, clean: bool) -> None:
        digest = block.key.digest
        if digest in self._blocks:
            raise IntegrityError(f"{self.tier} holds {digest.hex()} already")
        self._blocks[digest] = block
        (self._clean if clean else self._dirty)[digest] = None
        self._of_owner.setdefault(block.owner, OrderedDict())[digest] = None

    def touch(self, block: TierBlock) -> None:
        """It was used."""
        digest = block.key.digest
        (self._clean if digest in self._clean else self._dirty).move_to_end(digest)
        self._of_owner[block.owner].move_to_end(digest)

    def remove(self, block: TierBlock) -> None:
        digest = block.key.digest
        del self._blocks[digest]
        self._clean.pop(digest, None)
        self._dirty.pop(digest, None)
        own = self._of_owner[block.owner]
        del own[digest]
        if not own:
            del self._of_owner[block.owner]

    def check_integrity(self) -> None:
        """
        Raises:
            IntegrityError: it holds more than its capacity, or its books do not agree.
        """
        incoming = self.incoming.total()
        if len(self) + incoming > self.capacity:
            raise IntegrityError(f"{self.tier} holds {len(self)} + {incoming} blocks, at most {self.capacity}")
        for owner, own in self._of_owner.items():
            if self._quota is not None and len(own) + self.incoming[owner] > self._quota:
                raise IntegrityError(f"{self.tier} holds {len(own)} blocks of an owner, at most {self._quota}")
        if self._clean.keys() & self._dirty.keys() or self._clean.keys() | self._dirty.keys() != self._blocks.keys():
            raise IntegrityError(f"{self.tier} holds blocks that are neither clean nor dirty, or both")
        if sum(map(len, self._of_owner.values())) != len(self):
            raise IntegrityError(f"{self.tier}'s blocks are not those of its owners")

    def _has_full_quota(self, owner: bytes) -> bool:
        own = len(self._of_owner.get(owner, ())) + self.incoming[owner]
        return self._quota is not None and own >= self._quota
