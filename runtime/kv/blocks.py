"""BlockPool: which KV blocks are free and which are owned. The same numbers hold on every shard."""

from __future__ import annotations

from headwise.workers.errors import HeadwiseError


class OutOfBlocksError(HeadwiseError):
    """More blocks were asked for than are free."""


class IntegrityError(HeadwiseError):
    """The pool's books do not add up: a bug in whoever uses it, found before it becomes wrong text."""


class BlockPool:
    """Hands out block numbers in [0, num_blocks); each has one owner or is free.

    Invariant, held after every call: free + active = total, and no block is in both or owned twice.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the block freed last is the warmest in the caches
        self._owner: dict[int, str] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int, owner: str) -> list[int]:
        """Gives ``owner`` that many blocks, all or none.

        Raises:
            OutOfBlocksError: fewer are free.
        """
        if count > len(self._free):
            raise OutOfBlocksError(f"{owner} asked for {count} blocks, {len(self._free)} of {self.num_blocks} are free")
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._owner[block] = owner
        return blocks

    def free(self, blocks: list[int], owner: str) -> None:
        """Takes blocks back.

        Raises:
            IntegrityError: one of them is not the owner's; none is taken then.
        """
        if len(set(blocks)) != len(blocks):
            raise IntegrityError(f"{owner} frees a block twice in {blocks}")
        for block in blocks:
            if self._owner.get(block) != owner:
                raise IntegrityError(f"{owner} frees block {block}, which belongs to {self._owner.get(block)}")
        for block in reversed(blocks):
            del self._owner[block]
            self._free.append(block)

    def check_integrity(self) -> None:
        """
        Raises:
            IntegrityError: the invariant does not hold.
        """
        free = set(self._free)
        if len(free) != len(self._free):
            raise IntegrityError("a block is free twice")
        if free & self._owner.keys():
            raise IntegrityError(f"blocks {sorted(free & self._owner.keys())} are free and owned")
        if free | self._owner.keys() != set(range(self.num_blocks)):
            raise IntegrityError(f"{len(free)} free + {len(self._owner)} owned blocks are not {self.num_blocks}")
