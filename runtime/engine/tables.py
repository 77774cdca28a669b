"""Table: the blocks of one request in one group of heads, while it has a seat."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from headwise.runtime.kv.blocks import Use
from headwise.runtime.kv.eviction import CachedBlock, Chain
from headwise.runtime.kv.identity import TokenBlocks
from headwise.runtime.kv.prefix_cache import PrefixCache
from headwise.workers.kv.policy import Reach

NEVER = sys.maxsize
"""More tokens than any text has."""

GONE = -1
"""In place of a block that has left the window."""


@dataclass(slots=True, eq=False)
class Table:
    """A block table, in the order of the text.

    With a window, blocks that no token to come attends to are given back:

        sinks | GONE ... GONE | first ... the window, and what comes
        ceil(sinks / block_size)

    Attributes:
        reach: dense where all blocks are kept until the seat is given up, whatever the group's window.
        block_ids: GONE where a block was given back.
        chain: the cached blocks that hold the first tokens; None where a block was given back, or was not cached.
            Usually they are those of ``block_ids``; where another request computed the same block first, both are
            held.
        first: blocks before it, but for the sinks, were given back.
        early: those of them that were cached before a finite token was sampled after them.
    """

    cache: PrefixCache
    reach: Reach
    block_ids: list[int]
    chain: Chain
    first: int = 0
    early: list[CachedBlock] = field(default_factory=list)

    @classmethod
    def after(cls, cache: PrefixCache, reach: Reach, chain: Chain) -> Table:
        """Of a request that has found a chain, which is held."""
        table = cls(cache, reach, [GONE if node is None else node.block for node in chain], chain)
        table.first = reach.first_key(len(chain) * cache.block_size) // cache.block_size
        return table

    @property
    def num_held(self) -> int:
        """How many blocks it has now."""
        return len(self.block_ids) - max(0, self.first - self.sinks)

    @property
    def sinks(self) -> int:
        """How many blocks hold the sinks."""
        return -(-self.reach.sinks // self.cache.block_size)

    @property
    def has_moved(self) -> bool:
        """Whether it has given back blocks: from then on it gives one back for each that it gets."""
        return self.first > self.sinks

    def num_given_back(self, num_done: int) -> int:
        """How many blocks it will have given back when so many tokens are done, and has not yet."""
        return max(0, self.reach.first_key(num_done) // self.cache.block_size - max(self.first, self.sinks))

    @property
    def gives_at(self) -> int:
        """How many tokens are done when the next block is to be given back."""
        if self.reach.window is None:
            return NEVER
        end = (max(self.first, self.sinks) + 1) * self.cache.block_size
        return max(self.reach.sinks + self.reach.window, end + self.reach.window - 1)

    def grow(self, num_blocks: int, owner: bytes) -> list[int]:
        """Adds blocks until it has so many, given back ones among them; returns the new ones.

        Raises:
            OutOfBlocksError: there is no room.
        """
        new = self.cache.allocate(max(0, num_blocks - len(self.block_ids)), Use.COMPUTE, owner)
        self.block_ids += new
        return new

    def publish(self, blocks: TokenBlocks, full: int) -> None:
        """Caches the first ``full`` blocks: a finite token was sampled after them."""
        windowed = self.cache.reach.window is not None
        if self.early:
            self.cache.verify(self.early)
            self.early = []
        for index in range(len(self.chain), full):
            own = self.block_ids[index]
            if windowed:
                self.chain.append(self._insert(blocks, index, None, own) if own != GONE else None)
                continue
            node = self._insert(blocks, index, self.chain[-1] if self.chain else None, own)
            if node is None:
                break
            self.chain.append(node)

    def give_back(self, num_done: int, blocks: TokenBlocks | None, known: int) -> None:
        """Gives back the blocks that no token after the first ``num_done`` attends to. Full ones are cached all the
        same, so that they are found once a finite token was sampled after them.

        Args:
            blocks: the request's, told of all its tokens; None takes no part in the prefix cache.
            known: how many full blocks have known tokens.
        """
        first = self.reach.first_key(num_done) // self.cache.block_size
        for index in range(max(self.first, self.sinks), first):
            own, offered = self.block_ids[index], index < len(self.chain)
            if offered or blocks is None or index >= known:
                self._release(index)
            else:
                node = self.cache.insert(blocks, index, None, own, verified=False)
                mine = node if node is not None and node.block == own else None
                if mine is not None:
                    self.early.append(mine)
                self.cache.release_block(own, Use.COMPUTE, mine)
            self.block_ids[index] = GONE
            if offered:
                self.chain[index] = None
        self.first = max(self.first, first)

    def leave(self) -> None:
        """Gives back all blocks, the last first."""
        for index in reversed(range(len(self.block_ids))):
            if self.block_ids[index] != GONE:
                self._release(index)
        self.cache.withdraw(self.early)

    def held(self) -> list[int]:
        """The blocks that it holds, once for each hold."""
        own = [block for block in self.block_ids if block != GONE]
        pairs = zip(self.chain, self.block_ids, strict=False)
        return own + [node.block for node, block in pairs if node is not None and node.block != block]

    def _insert(self, blocks: TokenBlocks, index: int, parent: CachedBlock | None, own: int) -> CachedBlock | None:
        node = self.cache.insert(blocks, index, parent, own)
        if node is not None and node.block != own:
            self.cache.hold([node], Use.COMPUTE)
        return node

    def _release(self, index: int) -> None:
        own, node = self.block_ids[index], self.chain[index] if index < len(self.chain) else None
        if node is not None and node.block != own:
            self.cache.release_block(own, Use.COMPUTE, None)
            self.cache.release_block(node.block, Use.COMPUTE, node)
        else:
            self.cache.release_block(own, Use.COMPUTE, node)
