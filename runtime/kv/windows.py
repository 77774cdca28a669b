"""What a window makes of a row's blocks: which of them a hit needs, and how many a row has at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from headwise.workers.kv.policy import DENSE, Reach

ENDLESS = 1 << 40
"""Tokens of a text that is longer than any."""


def longest_hit(reach: Reach, block_size: int, limit: int, has: Callable[[int], bool]) -> int:
    """How many first blocks of a sequence need not be computed: the most, up to ``limit``, whose needed ones are there.

    Args:
        has: whether a block is there; asked at most once for each, and for few where the sequence is not there at all.
    """
    sinks = -(-reach.sinks // block_size)
    for index in range(min(sinks, limit)):
        if not has(index):  # whatever goes on after it needs it
            return index
    length = at = limit
    while at > sinks:
        first = reach.first_key(length * block_size) // block_size
        if at <= first:
            return length
        at -= 1
        if not has(at):
            length = at
    return length


@dataclass(frozen=True, slots=True)
class RowRoom:
    """How many blocks a row takes of a group with a window.

    While a prompt is computed, a row has its window, and besides it the tokens that steps in flight compute: blocks
    before the window are given back as new ones are taken.

    Attributes:
        num_blocks: that the group has.
        least: a row of any length can go on with so many, be it in small chunks.
        steady: the most that a row has which computes a token at a time, and waits for it.
        lead: tokens beyond the window that a row gets blocks for when it is admitted, if they are there.
    """

    reach: Reach
    block_size: int
    num_blocks: int
    least: int
    steady: int
    lead: int

    @classmethod
    def of(cls, reach: Reach, block_size: int, num_blocks: int, chunk: int) -> RowRoom:
        """Args: ``chunk``: most tokens of a step."""
        least = reach.most_blocks(block_size, ENDLESS, block_size)
        # At most half of what there is beside a row, so that others, and what is pinned, have the rest.
        lead = max(block_size, min(chunk, (num_blocks - least) // 2 * block_size))
        assert reach.window is not None
        steady = -(-reach.sinks // block_size) + (reach.window + block_size - 2) // block_size + 1
        return cls(reach, block_size, num_blocks, least, steady, lead)

    @property
    def capacity(self) -> int | None:
        """Most tokens of a request that the group can serve; None: any number."""
        return None if self.num_blocks >= self.least else self.num_blocks * self.block_size

    def first_tokens(self, num_tokens: int, num_cached: int) -> tuple[int, int]:
        """For how many tokens a row gets blocks when it is admitted, at least and at most; it goes on after
        ``num_cached``."""
        assert self.reach.span is not None
        start = max(num_cached, self.reach.span)
        return min(num_tokens, start + self.block_size), min(num_tokens, start + self.lead)

    def most_blocks(self, num_tokens: int) -> int:
        """The most that a row of so many tokens has to have at a time."""
        more = -(-self.lead // self.block_size) - 1  # ``least`` has one for a small chunk
        return min(-(-num_tokens // self.block_size), self.least + more)


def row_blocks(reach: Reach, block_size: int, max_tokens: int) -> int:
    """How many blocks a group must have for a row of so many tokens to be computed at all."""
    if reach == DENSE:
        return -(-max_tokens // block_size)
    return reach.most_blocks(block_size, max_tokens, block_size)
