"""BlockTables: every request's blocks; which it found, which it computes itself, and which it shares."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from functools import partial

from headwise.runtime.engine.request import Request
from headwise.runtime.kv.blocks import Use
from headwise.runtime.kv.eviction import CachedBlock
from headwise.runtime.kv.prefix_cache import PrefixCache
from headwise.runtime.kv.tiers import Tiers


class Entry(enum.Enum):
    """Whether a waiting request got its blocks: it did; others compute or restore what it waits for, and those behind
    it may go first; or there is no room."""

    ENTERED = enum.auto()
    LATER = enum.auto()
    NO_ROOM = enum.auto()


class BlockTables:
    """Gives requests their blocks and takes them back. Only the scheduler calls it.

    A request's table is ``block_ids``. Its ``chain`` is what the cache holds for the first of them: usually the same
    memory; where another request computed the same block first, both are held until the request leaves.
    """

    def __init__(self, cache: PrefixCache, tiers: Tiers | None = None) -> None:
        self.cache, self.tiers = cache, tiers
        self._block_size = cache.block_size
        self._computing: dict[bytes, Request] = {}  # who computes or restores a block that is not cached yet

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def enter(self, request: Request) -> Entry:
        """Gives a request blocks for all its tokens and the next one, the first of them from the cache if they are
        there, and sets ``num_computed``. At least one token is left to compute."""
        if request.restoring or (request.awaits is not None and self._is_coming(request.awaits)):
            return Entry.LATER
        limit = self._match(request)
        chain = request.chain
        if self._is_computed_by_another(request, limit):
            return Entry.LATER
        # So that no prefill is preempted half-way by a later one.
        missing = self.blocks_for(request.num_tokens + 1) - len(chain)
        if missing > self.cache.num_available - self.cache.num_idle_in(chain):
            return Entry.NO_ROOM
        self.cache.hold(chain, Use.COMPUTE)
        if self.tiers is not None and (entry := self._restore(request, limit, missing)) is not None:
            self.cache.release(chain, Use.COMPUTE)
            return entry
        self._enter(request, missing)
        return Entry.ENTERED

    def grow(self, request: Request, num_tokens: int) -> list[int]:
        """Makes the table long enough for so many tokens; returns the new blocks.

        Raises:
            OutOfBlocksError: there is no room.
        """
        new = self.cache.allocate(max(0, self.missing(request, num_tokens)), Use.COMPUTE, _namespace(request))
        request.block_ids += new
        return new

    def missing(self, request: Request, num_tokens: int) -> int:
        """How many blocks more it needs for so many tokens; not above 0 if none."""
        return self.blocks_for(num_tokens) - len(request.block_ids)

    def share(self, request: Request) -> None:
        """Caches the blocks that are full once the steps submitted are done, as far as their tokens are known."""
        blocks = request.token_blocks
        known = len(request.prompt_token_ids) + len(request.generated)
        full = min(request.num_computed, known) // self._block_size
        if blocks is None or full <= request.num_offered:
            return
        self._read_tokens(request)
        self._no_longer_computes(request, request.num_offered, full)
        request.num_offered = full
        chain = request.chain
        for index in range(len(chain), full):
            own = request.block_ids[index]
            verified = (index + 1) * self._block_size <= request.num_verified
            node = self.cache.insert(blocks, index, chain[-1] if chain else None, own, verified)
            if node is None:
                break
            if node.block != own:
                self.cache.hold([node], Use.COMPUTE)
            chain.append(node)

    def verify(self, request: Request, num_tokens: int) -> None:
        """A finite token was sampled from its first ``num_tokens``."""
        if num_tokens > request.num_verified:
            first, last = request.num_verified // self._block_size, num_tokens // self._block_size
            self.cache.verify(request.chain[first:last])
            request.num_verified = num_tokens

    def fail(self, request: Request, failed: Sequence[Request]) -> tuple[set[CachedBlock], bool]:
        """What was sampled is not finite: takes what it computed, and nobody has verified, out of the cache; and what
        others computed if nobody computes with it but those who ``failed`` in this step.

        Returns:
            All that was taken out, for others may compute with it; and whether the request itself relied on blocks of
            others that are not verified, so that the fault may be theirs.
        """
        chain = request.chain
        unverified = [index for index, node in enumerate(chain) if not node.verified]
        alone = (i for i in unverified if i >= request.num_matched or self._is_held_by(failed, chain[i]))
        first = next(alone, None)
        withdrawn = self.cache.withdraw(chain[first], "not_finite") if first is not None else set()
        return withdrawn, bool(unverified) and unverified[0] < request.num_matched

    def leave(self, request: Request) -> None:
        """Takes a request's blocks back, the last first."""
        chain = request.chain
        self._no_longer_computes(request, request.num_offered, self._num_known_blocks(request))
        for index in reversed(range(len(request.block_ids))):
            own, node = request.block_ids[index], chain[index] if index < len(chain) else None
            if node is not None and node.block != own:
                self.cache.release_block(own, Use.COMPUTE, None)
                self.cache.release_block(node.block, Use.COMPUTE, node)
            else:
                self.cache.release_block(own, Use.COMPUTE, node)
        if request.finish_reason is not None:
            self._forget_unverified(chain)
        request.block_ids, request.chain = [], []
        request.num_matched = request.num_offered = request.num_verified = 0

    def computing(self, requests: Iterable[Request]) -> list[int]:
        """The blocks that these requests hold, once for each hold."""
        held: list[int] = []
        for request in requests:
            held += request.block_ids
            held += [n.block for n, own in zip(request.chain, request.block_ids, strict=False) if n.block != own]
        return held

    def _match(self, request: Request) -> int:
        """Finds its chain; returns how long it may be at most."""
        blocks = request.token_blocks
        if blocks is None:
            return 0
        self._read_tokens(request)
        limit = (request.num_tokens - 1) // self._block_size
        self.cache.match(blocks, limit, request.chain)
        if request.only_verified:
            unverified = (index for index, node in enumerate(request.chain) if not node.verified)
            del request.chain[next(unverified, limit) :]
        return limit

    def _is_computed_by_another(self, request: Request, limit: int) -> bool:
        blocks, length = request.token_blocks, len(request.chain)
        if blocks is None or length >= limit or request.only_verified:
            return False
        request.awaits = blocks.digests[length]
        return self._is_coming(request.awaits)

    def _is_coming(self, digest: bytes) -> bool:
        """Whether a request computes or restores a block. One that is paused may never come to compute it."""
        owner = self._computing.get(digest)
        return owner is not None and (owner.restoring or not owner.paused)

    def _restore(self, request: Request, limit: int, missing: int) -> Entry | None:
        """Starts to restore what the tiers have of a request whose chain is held; None if it is to enter now."""
        assert self.tiers is not None
        blocks, chain = request.token_blocks, request.chain
        wanted = missing
        entries = []
        if blocks is not None and len(chain) < limit and not request.restored_short:
            entries = self.tiers.find(blocks, len(chain), limit)
            if entries and self.tiers.worth(entries):
                wanted = len(entries)
            else:
                entries = []
        if not self.tiers.can_take(wanted):
            return Entry.NO_ROOM
        if blocks is None or not entries:
            return None
        for entry in entries:
            self._computing.setdefault(entry.key.digest, request)
        request.restoring = True
        digests = [entry.key.digest for entry in entries]
        self.tiers.restore(blocks, chain, entries, partial(self._restored, request, digests))
        return Entry.LATER

    def _restored(self, request: Request, digests: list[bytes], arrived: int) -> None:
        for digest in digests:
            if self._computing.get(digest) is request:
                del self._computing[digest]
        request.restoring, request.restored_short = False, arrived < len(digests)
        if not request.generated:
            request.metrics.num_restored_tokens = arrived * self._block_size

    def _enter(self, request: Request, missing: int) -> None:
        """Gives a request whose chain is held the rest of its blocks."""
        chain = request.chain
        request.block_ids = [node.block for node in chain]
        request.block_ids += self.cache.allocate(missing, Use.COMPUTE, _namespace(request))
        request.num_matched = request.num_offered = len(chain)
        request.num_computed = len(chain) * self._block_size
        request.awaits, request.restored_short = None, False
        if request.token_blocks is None:
            return
        for digest in request.token_blocks.digests[len(chain) : self._num_known_blocks(request)]:
            if not self._is_coming(digest):
                self._computing[digest] = request
        if not request.metrics.num_preemptions:
            metrics = request.metrics
            metrics.num_cached_tokens = request.num_computed
            metrics.num_restored_tokens = min(metrics.num_restored_tokens, request.num_computed)
            on_device = (metrics.num_cached_tokens - metrics.num_restored_tokens) // self._block_size
            self.cache.count_lookup(request.num_tokens, chain[:on_device])
            if self.tiers is not None:
                self.tiers.count_lookup(request.num_tokens - on_device * self._block_size)

    def _read_tokens(self, request: Request) -> None:
        """Tells its blocks of the tokens that were generated since."""
        blocks = request.token_blocks
        assert blocks is not None
        read = blocks.num_tokens - len(request.prompt_token_ids)
        if read < len(request.generated):
            blocks.extend(request.generated[read:])

    def _num_known_blocks(self, request: Request) -> int:
        return len(request.token_blocks.digests) if request.token_blocks is not None else 0

    def _no_longer_computes(self, request: Request, first: int, stop: int) -> None:
        if request.token_blocks is not None:
            for digest in request.token_blocks.digests[first:stop]:
                if self._computing.get(digest) is request:
                    del self._computing[digest]

    def _is_held_by(self, requests: Sequence[Request], node: CachedBlock) -> bool:
        """Whether nobody else computes with a block."""
        return self.cache.pool.count(node.block, Use.COMPUTE) == sum(node in request.chain for request in requests)

    def _forget_unverified(self, chain: list[CachedBlock]) -> None:
        """What an ended request left unverified stays only if somebody else computes with it, and so will tell."""
        for node in chain:
            if not node.verified and node.cached and not self.cache.pool.count(node.block, Use.COMPUTE):
                self.cache.withdraw(node, "unverified")
                return


def _namespace(request: Request) -> bytes:
    return request.token_blocks.namespace if request.token_blocks is not None else b""
