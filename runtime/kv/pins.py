"""Pins: prefixes that stay in the cache for a time, whatever else wants their memory."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

from headwise.runtime.kv.blocks import Use
from headwise.runtime.kv.eviction import CachedBlock
from headwise.runtime.kv.prefix_cache import PrefixCache
from headwise.workers.errors import InvalidValueError


class Pins:
    """Chains of cached blocks, each held until its time is over."""

    def __init__(self, cache: PrefixCache, max_blocks: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Args: ``max_blocks``: most blocks that may be pinned, so that a request of the model's full length still
        has room."""
        self._cache, self._max_blocks, self._clock = cache, max_blocks, clock
        self._numbers = itertools.count()
        self._pins: dict[int, tuple[float, list[CachedBlock]]] = {}
        self._next_expiry = float("inf")

    def pin(self, chain: Sequence[CachedBlock], ttl_s: float) -> None:
        """Keeps a chain for ``ttl_s`` seconds. Pins of the same blocks do not know of each other.

        Raises:
            InvalidValueError: more blocks would be pinned than may be.
        """
        self.expire()
        new = sum(not self._cache.pool.count(node.block, Use.PIN) for node in chain)
        if (total := self.num_blocks + new) > self._max_blocks:
            raise InvalidValueError(
                "prompt",
                f"{len(chain)} blocks",
                f"{total} blocks would be pinned, at most {self._max_blocks} may be: a request of max_model_len tokens "
                "must still have room",
                "raise kv_memory (--kv-memory) or wait until other pins have expired",
            )
        self._cache.hold(chain, Use.PIN)
        self._pins[next(self._numbers)] = (self._clock() + ttl_s, list(chain))
        self._next_expiry = min(expiry for expiry, _ in self._pins.values())

    @property
    def num_blocks(self) -> int:
        """How many blocks are pinned."""
        return len({node.block for _, chain in self._pins.values() for node in chain})

    def expire(self) -> None:
        """Lets go of what is over. Called at every step, so it looks at one number most of the time."""
        now = self._clock()
        if now < self._next_expiry:
            return
        for number in [number for number, (expiry, _) in self._pins.items() if expiry <= now]:
            self._release(number)

    def clear(self) -> None:
        for number in list(self._pins):
            self._release(number)

    def _release(self, number: int) -> None:
        _, chain = self._pins.pop(number)
        self._cache.release(chain, Use.PIN)
        self._next_expiry = min((expiry for expiry, _ in self._pins.values()), default=float("inf"))
