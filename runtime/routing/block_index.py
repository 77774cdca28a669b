"""Which replicas have which blocks: by digest a bitmap, in which each replica has a bit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class BlockIndex:
    """
    A digest covers all tokens up to its block's end, the model, and the tenant's salt (runtime/kv/identity.py). So
    equal digests are equal beginnings of one tenant's prompts, and no tenant's prompt finds another's blocks.

    A block costs its digest, an entry of a dict and a bitmap. Blocks that come together share one bitmap, and so do
    all blocks that only one replica has.
    """

    def __init__(self) -> None:
        self._slots: dict[bytes, int] = {}

    def __len__(self) -> int:
        """Blocks that at least one replica has."""
        return len(self._slots)

    def slots(self, digest: bytes) -> int:
        """The bitmap of the replicas that have a block."""
        return self._slots.get(digest, 0)

    def add(self, digests: Iterable[bytes], bit: int) -> None:
        """A replica has blocks; one that it had already changes nothing."""
        slots = self._slots
        old, new = 0, bit
        for digest in digests:
            before = slots.get(digest, 0)
            if before != old:
                old, new = before, before | bit
            slots[digest] = new

    def discard(self, digests: Iterable[bytes], bit: int) -> None:
        """A replica has blocks no more; one that it had not changes nothing."""
        slots, others = self._slots, ~bit
        old, new = 0, 0
        for digest in digests:
            before = slots.get(digest, 0)
            if before != old:
                old, new = before, before & others
            if new:
                slots[digest] = new
            elif before:
                del slots[digest]

    def prefixes(self, digests: Sequence[bytes]) -> list[tuple[int, int]]:
        """How many leading blocks of a prompt replicas have, from the fewest to the most.

        Walks the prompt's digests with the set of replicas that have all of them so far, and ends with the last
        block that any of them has.

        Args:
            digests: of the prompt's full blocks, in order.

        Returns:
            (number of blocks, bitmap of the replicas that have just so many), for each number that occurs but 0.
        """
        found: list[tuple[int, int]] = []
        get, left, last = self._slots.get, -1, None  # all replicas
        for count, digest in enumerate(digests):
            here = get(digest, 0)
            if here is last:  # blocks that came together
                continue
            last, rest = here, left & here
            if rest == left:
                continue
            if count:
                found.append((count, left ^ rest))
            if not rest:
                return found
            left = rest
        if left and digests:
            found.append((len(digests), left))
        return found
