"""BlockPool: which KV blocks are free, idle, active or reserved. The same numbers hold on every shard."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

from headwise.workers.errors import HeadwiseError

T = TypeVar("T")


CHECK_PART = 1024
"""Blocks that a part of a check looks at."""


class OutOfBlocksError(HeadwiseError):
    """More blocks were asked for than are free."""


class IntegrityError(HeadwiseError):
    """The books do not add up: a bug in whoever keeps them, found before it becomes wrong text."""


class Use(enum.IntEnum):
    """Why a block may not be taken: a request computes with it; it is moved; someone asked for it to stay."""

    COMPUTE = 0
    TRANSFER = 1
    PIN = 2


class BlockPool:
    """Counts the uses of block numbers in [0, num_blocks), and knows which are cached.

        used \\ cached    no                          yes
        not at all       free                        idle
        somehow          reserved (TRANSFER only)    active
                         or active

    Invariant, held after every call: free + idle + active + reserved = num_blocks.

    Attributes:
        changes: counts the calls that changed anything.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the block freed last is the warmest in the caches
        self._uses = [[0] * num_blocks for _ in Use]
        self._total = [0] * num_blocks
        self._cached = [False] * num_blocks
        self._num_cached = 0
        self._num_idle = 0
        self._num_reserved = 0
        self.changes = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_idle(self) -> int:
        return self._num_idle

    @property
    def num_cached(self) -> int:
        return self._num_cached

    def is_used(self, block: int) -> bool:
        return self._total[block] > 0

    def is_cached(self, block: int) -> bool:
        return self._cached[block]

    def count(self, block: int, use: Use) -> int:
        return self._uses[use][block]

    def allocate(self, count: int, use: Use = Use.COMPUTE) -> list[int]:
        """Takes so many free blocks, all or none; each has one use then.

        Raises:
            OutOfBlocksError: fewer are free.
        """
        if count > len(self._free):
            raise OutOfBlocksError(f"asked for {count} blocks, {len(self._free)} of {self.num_blocks} are free")
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._uses[use][block] = self._total[block] = 1
        self._num_reserved += count if use is Use.TRANSFER else 0
        self.changes += 1
        return blocks

    def hold(self, block: int, use: Use) -> bool:
        """Adds a use to a block that is not free; returns whether it was idle until now.

        Raises:
            IntegrityError: the block is free, so that what it holds is nobody's.
        """
        if not self._total[block] and not self._cached[block]:
            raise IntegrityError(f"block {block} is free and cannot be held")
        was_idle, was_reserved = not self._total[block], self._is_reserved(block)
        self._num_idle -= was_idle
        self._uses[use][block] += 1
        self._total[block] += 1
        self._count(block, was_reserved)
        return was_idle

    def release(self, block: int, use: Use) -> bool:
        """Takes a use away; a block without any is idle if it is cached, and free if not. Returns whether it is idle.

        Raises:
            IntegrityError: the block has no such use.
        """
        if not self._uses[use][block]:
            raise IntegrityError(f"block {block} has no {use.name} use to release")
        was_reserved = self._is_reserved(block)
        self._uses[use][block] -= 1
        self._total[block] -= 1
        self._count(block, was_reserved)
        return self._settle(block)

    def cache(self, block: int) -> None:
        """Others may find a used block from now on.

        Raises:
            IntegrityError: it is not used, or cached already.
        """
        if not self._total[block] or self._cached[block]:
            raise IntegrityError(f"block {block} is {'cached' if self._cached[block] else 'free'} and cannot be cached")
        was_reserved = self._is_reserved(block)
        self._cached[block] = True
        self._num_cached += 1
        self._count(block, was_reserved)

    def uncache(self, block: int) -> None:
        """Nobody finds a cached block any longer; if it was idle, it is free.

        Raises:
            IntegrityError: it is not cached.
        """
        if not self._cached[block]:
            raise IntegrityError(f"block {block} is not cached")
        self._cached[block] = False
        self._num_cached -= 1
        self._num_idle -= not self._total[block]
        self._count(block, False)
        self._settle(block)

    def states(self) -> dict[str, int]:
        """How many blocks are free, idle, active and reserved."""
        active = self.num_blocks - len(self._free) - self._num_idle - self._num_reserved
        return {"free": len(self._free), "idle": self._num_idle, "active": active, "reserved": self._num_reserved}

    def check_integrity(self, computing: Iterable[int] | None = None) -> None:
        """
        Args:
            computing: the blocks that requests hold for computing, once for each hold; None if they are not known.

        Raises:
            IntegrityError: the invariant does not hold, or the holds are not those counted.
        """
        for _ in self.checks(computing):
            pass

    def checks(self, computing: Iterable[int] | None = None) -> Iterator[None]:
        """:meth:`check_integrity` in parts; void if anything changes before the last one."""
        listed, held = bytearray(self.num_blocks), [0] * self.num_blocks
        for free in parts(self._free):
            yield
            for block in free:
                if listed[block]:
                    raise IntegrityError("a block is free twice")
                listed[block] = 1
        for computed in parts(computing or ()):
            yield
            for block in computed:
                held[block] += 1
        idle = cached = reserved = 0
        for blocks in parts(range(self.num_blocks)):
            yield
            self._check_uses(blocks, listed, None if computing is None else held)
            cached += sum(self._cached[block] for block in blocks)
            idle += sum(self._cached[block] and not self._total[block] for block in blocks)
            reserved += sum(self._is_reserved(block) for block in blocks)
        if (idle, cached) != (self._num_idle, self._num_cached):
            raise IntegrityError(f"{idle} blocks are idle and {cached} cached, but not so many are counted")
        if reserved != self._num_reserved:
            raise IntegrityError(f"{reserved} blocks are reserved, {self._num_reserved} are counted")

    def _check_uses(self, blocks: Iterable[int], listed: bytearray, held: list[int] | None) -> None:
        for block in blocks:
            uses, total = [counts[block] for counts in self._uses], self._total[block]
            if bool(listed[block]) != (not total and not self._cached[block]):
                raise IntegrityError(f"block {block} is free or not, but listed otherwise")
            if min(uses) < 0 or sum(uses) != total:
                raise IntegrityError(f"block {block} has uses {uses}, {total} are counted")
            if held is not None and held[block] != uses[Use.COMPUTE]:
                counted = f"{held[block]} instead of {uses[Use.COMPUTE]}"
                raise IntegrityError(f"block {block} is held by other numbers of requests than are counted: {counted}")

    def _is_reserved(self, block: int) -> bool:
        return not self._cached[block] and 0 < self._total[block] == self._uses[Use.TRANSFER][block]

    def _count(self, block: int, was_reserved: bool) -> None:
        self._num_reserved += self._is_reserved(block) - was_reserved
        self.changes += 1

    def _settle(self, block: int) -> bool:
        """Files a block without uses; returns whether it is idle."""
        if self._total[block]:
            return False
        if self._cached[block]:
            self._num_idle += 1
            return True
        self._free.append(block)
        return False


def parts(items: Iterable[T]) -> Iterator[list[T]]:
    """The items in lists of at most ``CHECK_PART``."""
    iterator = iter(items)
    while part := list(islice(iterator, CHECK_PART)):
        yield part
