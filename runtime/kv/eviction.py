"""Which idle block of the prefix cache goes first when its memory is wanted.

A policy is told of every idle block and hands out victims. It never hands out a block whose children are cached:
without it they could not be found, and would only take up memory. (Where there is a window blocks have no children.)
Every operation takes constant time.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from typing import Literal, TypeAlias

from headwise.runtime.kv.identity import ROOT

EvictionName = Literal["lru", "cost_aware"]


class CachedBlock:
    """A full block of tokens whose keys and values are on the device.

    Attributes:
        digest, namespace, tokens, parent_digest: its identity, see :mod:`headwise.runtime.kv.identity`.
        owner: whose quota it counts for.
        parent: the block before; None for a sequence's first, and for all where the group has a window.
        index: how many blocks come before it.
        block: the number of its memory.
        children: cached blocks that continue it.
        cached: whether it is (still) in the cache; once it is not, it never is again.
        verified: a finite token was sampled after it. Until then nobody finds it.
        hits: requests that found it.
        unwanted: no tier could take it, or one preferred others to it; so until it is used again.
    """

    __slots__ = (
        "block",
        "cached",
        "children",
        "digest",
        "eviction_key",
        "hits",
        "index",
        "namespace",
        "owner",
        "parent",
        "parent_digest",
        "tokens",
        "unwanted",
        "verified",
    )

    def __init__(
        self,
        digest: bytes,
        namespace: bytes,
        tokens: bytes,
        parent: CachedBlock | None,
        block: int,
        owner: bytes | None = None,
    ) -> None:
        """Args: ``owner``: None is the namespace."""
        self.digest, self.namespace, self.tokens, self.parent, self.block = digest, namespace, tokens, parent, block
        self.owner = namespace if owner is None else owner
        self.index: int = 0 if parent is None else parent.index + 1
        self.parent_digest = ROOT if parent is None else parent.digest
        self.children: set[CachedBlock] = set()
        self.cached, self.verified, self.unwanted, self.hits = True, True, False, 0
        self.eviction_key = 0


Chain: TypeAlias = list[CachedBlock | None]
"""The cached blocks that hold a sequence's first tokens, in order; None where a window needs none."""


class EvictionPolicy(ABC):
    """Orders the idle blocks. Blocks become idle last block of a sequence first, so a parent never before a child."""

    @abstractmethod
    def add(self, node: CachedBlock) -> None:
        """The block has become idle."""

    @abstractmethod
    def remove(self, node: CachedBlock) -> None:
        """The block is idle no longer, or not cached any more."""

    @abstractmethod
    def childless(self, node: CachedBlock) -> None:
        """An idle block has lost its last child."""

    @abstractmethod
    def victim(self) -> CachedBlock | None:
        """The block to evict next, which stays where it is until it is removed; None if there is none."""

    @abstractmethod
    def __len__(self) -> int:
        """How many blocks are idle."""


class Lru(EvictionPolicy):
    """The block that has been idle for the longest time."""

    def __init__(self) -> None:
        self._idle: OrderedDict[CachedBlock, None] = OrderedDict()

    def add(self, node: CachedBlock) -> None:
        self._idle[node] = None

    def remove(self, node: CachedBlock) -> None:
        self._idle.pop(node, None)

    def childless(self, node: CachedBlock) -> None:
        pass  # children became idle before it and come first anyway

    def victim(self) -> CachedBlock | None:
        return next(iter(self._idle), None)

    def __len__(self) -> int:
        return len(self._idle)


class CostAware(EvictionPolicy):
    """The block whose loss costs least: (time to compute it again × how often it was found) ÷ its bytes.

    GreedyDual-Size (Cao and Irani, 1997) with the value in steps of a factor of √2: a block's key is the clock plus
    its value when it became idle, the lowest key goes first, the longest idle among equals, and the clock moves on to
    that key, so that a block that was once worth much does not stay for ever.

    Computing a block again takes time for its products, the same for all, and for attending to the blocks before it.
    All blocks have the same bytes, which therefore change no order.
    """

    LEVELS = 64
    ATTENTION_SHARE = 1 / 64
    """What attending to one block before costs, of what a block's products cost: about so for models of a billion
    parameters, more for smaller ones."""

    def __init__(self) -> None:
        self._idle: set[CachedBlock] = set()
        self._leaves: dict[int, OrderedDict[CachedBlock, None]] = {}
        self._clock = 0

    def add(self, node: CachedBlock) -> None:
        value = (1.0 + node.index * self.ATTENTION_SHARE) * (1 + node.hits)
        node.eviction_key = self._clock + min(self.LEVELS - 1, int(2 * math.log2(value)))
        self._idle.add(node)
        if not node.children:
            self._file(node)

    def remove(self, node: CachedBlock) -> None:
        self._idle.discard(node)
        leaves = self._leaves.get(node.eviction_key)
        if leaves is not None and node in leaves:
            del leaves[node]
            if not leaves:
                del self._leaves[node.eviction_key]

    def childless(self, node: CachedBlock) -> None:
        if node in self._idle:
            node.eviction_key = max(node.eviction_key, self._clock)
            self._file(node)

    def victim(self) -> CachedBlock | None:
        # All keys are within LEVELS of the clock.
        for key in range(self._clock, self._clock + self.LEVELS):
            if key in self._leaves:
                self._clock = key
                return next(iter(self._leaves[key]))
        return None

    def __len__(self) -> int:
        return len(self._idle)

    def _file(self, node: CachedBlock) -> None:
        self._leaves.setdefault(node.eviction_key, OrderedDict())[node] = None


POLICIES: dict[EvictionName, type[EvictionPolicy]] = {"lru": Lru, "cost_aware": CostAware}
