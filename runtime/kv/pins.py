"""Pins: prefixes that stay in the cache for a time, whatever else wants their memory."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable
from typing import NamedTuple

from headwise.runtime.kv.blocks import Use
from headwise.runtime.kv.eviction import Chain
from headwise.runtime.kv.identity import TokenBlocks
from headwise.runtime.kv.prefix_cache import PrefixCache
from headwise.workers.errors import InvalidValueError


class Pinned(NamedTuple):
    """A prompt whose first blocks are pinned, and for how many seconds more."""

    prompt: TokenBlocks
    num_blocks: int
    ttl_s: float


class Pins:
    """Chains of one group's cached blocks, each held until its time is over."""

    def __init__(self, cache: PrefixCache, max_blocks: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Args: ``max_blocks``: most blocks that may be pinned, so that a request of the model's full length still
        has room."""
        self._cache, self._max_blocks, self._clock = cache, max_blocks, clock
        self._numbers = itertools.count()
        # A heap: the first expires first.
        self._pins: list[tuple[float, int, Chain, TokenBlocks | None]] = []
        self._num_blocks = 0

    def pin(self, chain: Chain, ttl_s: float, prompt: TokenBlocks | None = None) -> None:
        """Keeps a chain for ``ttl_s`` seconds. Pins of the same blocks do not know of each other.

        Args:
            prompt: begins with the chain's tokens; for :meth:`left`.

        Raises:
            InvalidValueError: as of :meth:`check`.
        """
        self._num_blocks = self.check(chain)
        self._cache.hold(chain, Use.PIN)
        heapq.heappush(self._pins, (self._clock() + ttl_s, next(self._numbers), list(chain), prompt))

    def check(self, chain: Chain) -> int:
        """How many blocks are pinned once a chain is, too.

        Raises:
            InvalidValueError: more than may be.
        """
        self.expire()
        new = sum(node is not None and not self._cache.pool.count(node.block, Use.PIN) for node in chain)
        if (total := self._num_blocks + new) > self._max_blocks:
            raise InvalidValueError(
                "prompt",
                f"{sum(node is not None for node in chain)} blocks",
                f"{total} blocks would be pinned, at most {self._max_blocks} may be: a request of max_model_len tokens "
                "must still have room",
                "raise kv_memory (--kv-memory) or wait until other pins have expired",
            )
        return total

    @property
    def num_blocks(self) -> int:
        """How many blocks are pinned."""
        return self._num_blocks

    def left(self) -> list[Pinned]:
        """What is pinned now and not over, for another to pin; those without a prompt are left out."""
        now = self._clock()
        return [
            Pinned(prompt, len(chain), expires - now)
            for expires, _, chain, prompt in sorted(self._pins, key=lambda pin: pin[:2])
            if prompt is not None and chain and expires > now
        ]

    def expire(self) -> None:
        """Lets go of what is over. Called at every step, so it looks at one number most of the time."""
        while self._pins and self._pins[0][0] <= self._clock():
            self._release_first()

    def clear(self) -> None:
        while self._pins:
            self._release_first()

    def _release_first(self) -> None:
        _, _, chain, _ = heapq.heappop(self._pins)
        self._cache.release(chain, Use.PIN)
        nodes = (node for node in chain if node is not None)
        self._num_blocks -= sum(not self._cache.pool.count(node.block, Use.PIN) for node in nodes)
