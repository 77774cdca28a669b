"""PrefixCache: full blocks of tokens on the device, found by what they hold and shared between requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from headwise.runtime.kv.blocks import BlockPool, IntegrityError, Use, parts
from headwise.runtime.kv.events import KvEvents
from headwise.runtime.kv.eviction import POLICIES, CachedBlock, Chain, EvictionName, EvictionPolicy, Lru
from headwise.runtime.kv.identity import TokenBlocks
from headwise.runtime.kv.windows import longest_hit
from headwise.workers.kv.policy import DENSE, Reach


class PrefixCache:
    """Owns the block pool of one group of heads: whoever wants blocks asks here, and idle ones are evicted for them.

    Where every token attends to all before it, cached blocks form trees: a block's parent is the block before it, and
    whoever holds a block holds all its ancestors. Where there is a window, each block stands for itself: a hit needs
    the sinks and the window before its end, and no other. A block is idle while nobody holds it.

    Blocks may leave a window before a finite token was sampled after them. They are cached all the same, and found
    once one was; until then they are idle.

    Attributes:
        reach: which tokens the group's heads attend to.
        max_blocks_per_owner: most cached blocks of one owner; None is no limit of its own.
        counts: since the start, by name; see :meth:`stats`.
        on_idle, on_busy: told when a cached block becomes idle, and when it is idle no longer (evicted included).
    """

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        eviction: EvictionName = "lru",
        events: KvEvents | None = None,
        max_blocks_per_owner: int | None = None,
        reach: Reach = DENSE,
    ) -> None:
        self.pool, self.block_size, self.reach = pool, block_size, reach
        self._windowed = reach.window is not None
        self.counts: Counter[str] = Counter()
        self.on_idle: Callable[[CachedBlock], None] = _ignore
        self.on_busy: Callable[[CachedBlock], None] = _ignore
        self._events = events
        self._index: dict[bytes, CachedBlock] = {}
        self._policy: EvictionPolicy = POLICIES[eviction]()
        self.max_blocks_per_owner = max_blocks_per_owner
        self._of_owner: dict[bytes, Lru] = {}  # the idle blocks of each, kept only where there is a quota
        self._kept: Counter[bytes] = Counter()  # cached blocks of each owner

    @property
    def num_available(self) -> int:
        """Blocks that can be had now: free ones, and idle ones that can be evicted."""
        return self.pool.num_free + self.pool.num_idle

    def __len__(self) -> int:
        return len(self._index)

    def get(self, digest: bytes) -> CachedBlock | None:
        """A block that requests find, so a verified one."""
        node = self._index.get(digest)
        return node if node is not None and node.verified else None

    def match(self, blocks: TokenBlocks, limit: int, chain: Chain, whole: bool = False) -> None:
        """Makes ``chain`` the longest chain of cached blocks that ``blocks`` starts with. Where there is a window, the
        chain has None for the blocks that nobody needs who goes on after it.

        Args:
            limit: at most so many.
            chain: empty, or what an earlier call left in it for the same ``blocks``, which is not compared again as
                far as it is still cached.
            whole: no block of the chain may be missing, whatever the window.
        """
        if self._windowed:
            chain[:] = self._whole(blocks, limit) if whole else self._in_window(blocks, limit)
            return
        del chain[limit:]
        while chain and (last := chain[-1]) is not None and not last.cached:
            chain.pop()
        while len(chain) < limit:
            node = self._find(blocks, len(chain), chain[-1] if chain else None)
            if node is None:
                return
            chain.append(node)

    def find(self, blocks: TokenBlocks, index: int) -> CachedBlock | None:
        """A block of a sequence, where there is a window."""
        return self._find(blocks, index, None)

    def add_before_last(self, blocks: TokenBlocks, chain: Chain) -> None:
        """Adds to a chain what whoever goes on before its last block needs: a request with these very tokens, which has
        one left to compute. That is a block more where there is a window, if it is still there."""
        for index in self.reach.needed_blocks(len(chain) - 1, self.block_size) if self._windowed and chain else ():
            if chain[index] is None:
                chain[index] = self.find(blocks, index)

    def num_idle_in(self, chain: Chain) -> int:
        """How many blocks of a chain are idle; without a window they are its last ones."""
        if self._windowed:
            return sum(node is not None and not self.pool.is_used(node.block) for node in chain)
        for count, node in enumerate(reversed(chain)):
            if node is not None and self.pool.is_used(node.block):
                return count
        return len(chain)

    def allocate(self, count: int, use: Use = Use.COMPUTE, owner: bytes = b"") -> list[int]:
        """Takes so many blocks, for which idle ones are evicted; those of ``owner`` first if it has its full quota, or
        will have it once these are cached.

        Raises:
            OutOfBlocksError: fewer than that are available; none is evicted then.
        """
        if count <= self.num_available:
            full = self.max_blocks_per_owner is not None and self._kept[owner] + count > self.max_blocks_per_owner
            while self.pool.num_free < count:
                own = self._own_victim(owner) if full else None
                node = own or self._policy.victim()
                if node is None:
                    raise IntegrityError(f"{self.pool.num_idle} blocks are idle, but none can be evicted")
                self._evict(node, "quota" if own else "room")
        return self.pool.allocate(count, use)

    def insert(
        self, blocks: TokenBlocks, index: int, parent: CachedBlock | None, block: int, verified: bool = True
    ) -> CachedBlock | None:
        """Caches a used block that holds the ``index``-th block of a sequence.

        Args:
            parent: the block before; None, too, where there is a window.
            verified: a finite token was sampled after it. If not, :meth:`verify` or :meth:`withdraw` follows.

        Returns:
            What the cache holds for it: the block itself, or a block that another request computed, which the caller
            then holds beside its own to keep its chain. None if the block is not cached: its parent is not any more,
            its digest is that of other tokens, or the owner has its full quota and all of that is used.
        """
        digest = blocks.digests[index]
        if parent is not None and not parent.cached:
            return None
        if (there := self._index.get(digest)) is not None:
            if there.verified or not verified:
                found = self._find(blocks, index, parent)
                self.counts["duplicate_blocks"] += found is not None
                return found
            self._evict(there, "replaced")
        if self._has_full_quota(blocks.owner):
            victim = self._own_victim(blocks.owner)
            if victim is None:
                self.counts["quota_refused_blocks"] += 1
                return None
            self._evict(victim, "quota")
        self.pool.cache(block)
        node = CachedBlock(digest, blocks.namespace, blocks.block(index), parent, block, blocks.owner)
        node.index, node.parent_digest, node.verified = index, blocks.parent(index), verified
        self._index[digest] = node
        self._kept[node.owner] += 1
        if parent is not None:
            parent.children.add(node)
        if verified:
            self._stored(node)
        return node

    def verify(self, nodes: Iterable[CachedBlock]) -> None:
        """A finite token was sampled after these blocks; some may have been evicted meanwhile."""
        for node in nodes:
            if node.cached and not node.verified:
                node.verified = True
                self._stored(node)
                self.on_idle(node)

    def withdraw(self, nodes: Iterable[CachedBlock]) -> None:
        """No finite token will be sampled after those of these blocks that are not verified."""
        for node in nodes:
            if node.cached and not node.verified:
                self._evict(node, "unverified")

    def hold(self, chain: Iterable[CachedBlock | None], use: Use) -> None:
        """Adds a use to each block of a chain, first to last."""
        for node in chain:
            if node is not None and self.pool.hold(node.block, use):
                self._busy(node)

    def release(self, chain: Sequence[CachedBlock | None], use: Use) -> None:
        """Takes it away again, last to first."""
        for node in reversed(chain):
            if node is not None:
                self.release_block(node.block, use, node)

    def release_block(self, block: int, use: Use, node: CachedBlock | None) -> None:
        """Takes a use of a block away; ``node``: the cached block whose memory it is, or was, if any."""
        if self.pool.release(block, use) and node is not None:
            self._policy.add(node)
            if self.max_blocks_per_owner is not None:
                self._of_owner.setdefault(node.owner, Lru()).add(node)
            if node.verified:
                self.on_idle(node)

    def clear(self, cause: str = "reset") -> None:
        """Forgets everything; blocks in use stay with their users alone."""
        for node in self._index.values():
            if node.verified and not self.pool.is_used(node.block):
                self.on_busy(node)
            node.cached = False
            node.children.clear()
            self.pool.uncache(node.block)
        if self._index:
            self.counts[f"evicted_{cause}"] += len(self._index)
        self._index.clear()
        self._kept.clear()
        self._of_owner.clear()
        self._policy = type(self._policy)()
        if self._events is not None:
            self._events.cleared("device")

    def count_lookup(self, num_tokens: int, chain: Sequence[CachedBlock | None]) -> None:
        """A request was admitted that has so many tokens, and found this chain."""
        self.counts["queried_tokens"] += num_tokens
        self.counts["hit_tokens"] += len(chain) * self.block_size
        for node in chain:
            if node is not None:
                node.hits += 1

    def stats(self) -> dict[str, Any]:
        """Blocks by state, and counts since the start: tokens ``queried``, ``hit`` and ``inserted``;
        ``duplicate_blocks``, computed twice and kept once; ``collisions``, digests met that stood for other tokens;
        ``quota_refused_blocks``, not cached for the quota of their owner was full and in use;
        ``evictions`` in blocks by cause; ``integrity_checks`` passed."""
        evictions = {name.removeprefix("evicted_"): n for name, n in self.counts.items() if name.startswith("evicted_")}
        return {
            **{name: self.counts[name] for name in _COUNTS},
            "evictions": evictions,
            "blocks": self.pool.states(),
            "cached_blocks": len(self._index),
        }

    def check_integrity(self, computing: Iterable[int] | None = None) -> None:
        """
        Args:
            computing: as of :meth:`BlockPool.check_integrity <headwise.runtime.kv.blocks.BlockPool.check_integrity>`.

        Raises:
            IntegrityError: the books of the pool, the index and the eviction policy do not agree.
        """
        for _ in self.checks(computing):
            pass

    def checks(self, computing: Iterable[int] | None = None) -> Iterator[None]:
        """:meth:`check_integrity` in parts; void if anything changes before the last one."""
        yield from self.pool.checks(computing)
        blocks, kept = bytearray(self.pool.num_blocks), Counter[bytes]()
        for nodes in parts(self._index.items()):
            yield
            for digest, node in nodes:
                self._check_node(digest, node)
                blocks[node.block] = 1
            kept.update(node.owner for _, node in nodes)
        if not len(self._index) == sum(blocks) == self.pool.num_cached:
            raise IntegrityError(
                f"{len(self._index)} cached blocks, {sum(blocks)} numbers of them and the pool's cached ones differ"
            )
        if len(self._policy) != self.pool.num_idle:
            raise IntegrityError(f"{self.pool.num_idle} blocks are idle, {len(self._policy)} can be evicted")
        if +self._kept != kept:
            raise IntegrityError("the blocks of an owner are not as many as counted")
        self.counts["integrity_checks"] += 1

    def _check_node(self, digest: bytes, node: CachedBlock) -> None:
        parent = node.parent
        if not node.cached or node.digest != digest or not self.pool.is_cached(node.block):
            raise IntegrityError(f"cached block {digest.hex()} is not what its block {node.block} says")
        if not node.verified and self.pool.is_used(node.block):
            raise IntegrityError(f"block {node.block} is used, and no finite token was sampled after it")
        if parent is not None and (not parent.cached or node not in parent.children):
            raise IntegrityError(f"block {node.block} continues block {parent.block}, which does not know of it")
        if parent is not None and self.pool.is_used(node.block) and not self.pool.is_used(parent.block):
            raise IntegrityError(f"block {node.block} is used, block {parent.block} before it is not")

    def _in_window(self, blocks: TokenBlocks, limit: int) -> Chain:
        """The longest chain whose needed blocks are there."""
        length = longest_hit(self.reach, self.block_size, limit, lambda index: self.find(blocks, index) is not None)
        chain: Chain = [None] * length
        for index in self.reach.needed_blocks(length, self.block_size):
            chain[index] = self.find(blocks, index)
        return chain

    def _whole(self, blocks: TokenBlocks, limit: int) -> Chain:
        chain: Chain = []
        while len(chain) < limit and (node := self.find(blocks, len(chain))) is not None:
            chain.append(node)
        return chain

    def _find(self, blocks: TokenBlocks, index: int, parent: CachedBlock | None) -> CachedBlock | None:
        """A digest alone proves nothing: the tokens must be the same, and all before them. (Where there is a window
        those may be there no longer: then the digest of the block before must be the same.)"""
        node = self._index.get(blocks.digests[index])
        if node is None or not node.verified:
            return None
        if (
            node.parent is parent
            and node.tokens == blocks.block(index)
            and node.namespace == blocks.namespace
            and (not self._windowed or node.parent_digest == blocks.parent(index))
        ):
            return node
        self.counts["collisions"] += 1
        return None

    def _has_full_quota(self, owner: bytes) -> bool:
        return self.max_blocks_per_owner is not None and self._kept[owner] >= self.max_blocks_per_owner

    def _own_victim(self, owner: bytes) -> CachedBlock | None:
        """What an owner that has its full quota loses next; None if all of it is used."""
        idle = self._of_owner.get(owner)
        return idle.victim() if idle is not None else None

    def _evict(self, node: CachedBlock, cause: str) -> None:
        if node.children:
            raise IntegrityError(f"block {node.block} was to be evicted before the blocks that continue it")
        if not self.pool.is_used(node.block):
            self._busy(node)
        node.cached = False
        del self._index[node.digest]
        self._kept[node.owner] -= 1
        if not self._kept[node.owner]:
            del self._kept[node.owner]
            self._of_owner.pop(node.owner, None)
        self.pool.uncache(node.block)
        if node.parent is not None:
            node.parent.children.discard(node)
            if not node.parent.children:
                self._policy.childless(node.parent)
        self.counts[f"evicted_{cause}"] += 1
        if self._events is not None and node.verified:
            self._events.removed([node.digest], "device")

    def _stored(self, node: CachedBlock) -> None:
        """Others find it from now on."""
        if self._events is not None:
            self._events.stored([node.digest], node.parent_digest, "device")
        self.counts["inserted_tokens"] += self.block_size

    def _busy(self, node: CachedBlock) -> None:
        self._policy.remove(node)
        if self.max_blocks_per_owner is not None and (own := self._of_owner.get(node.owner)) is not None:
            own.remove(node)
        if node.verified:
            self.on_busy(node)


_COUNTS = (
    "queried_tokens",
    "hit_tokens",
    "inserted_tokens",
    "duplicate_blocks",
    "collisions",
    "quota_refused_blocks",
    "integrity_checks",
)


def match_all(
    caches: Sequence[PrefixCache], blocks: TokenBlocks, limit: int, chains: Sequence[Chain], whole: bool = False
) -> None:
    """Makes ``chains``, one for each group, the longest that are there in all groups: each of the same length.
    Arguments as of :meth:`PrefixCache.match`."""
    while True:
        for cache, chain in zip(caches, chains, strict=True):
            cache.match(blocks, limit, chain, whole)
        if len(caches) == 1 or all(len(chain) == limit for chain in chains):
            return
        limit = min(len(chain) for chain in chains)


def _ignore(node: CachedBlock) -> None:
    pass
