"""The rules of the prefix cache, one by one; test_prefix_cache.py has them all at once."""

from __future__ import annotations

from collections.abc import Iterator

from headwise.runtime.kv.blocks import BlockPool, Use
from headwise.runtime.kv.eviction import CachedBlock
from headwise.runtime.kv.prefix_cache import PrefixCache
from tests.runtime.kv.test_prefix_cache import SIZE, Key, token_blocks


def compute(cache: PrefixCache, key: Key, count: int) -> list[CachedBlock]:
    """A request finds and computes so many blocks, and leaves."""
    blocks, chain = token_blocks(key), list[CachedBlock]()
    cache.match(blocks, count, chain)
    cache.hold(chain, Use.COMPUTE)
    held = len(chain)
    memory = cache.allocate(count - held, Use.COMPUTE, blocks.namespace)
    for index, own in enumerate(memory, held):
        node = cache.insert(blocks, index, chain[-1] if chain else None, own)
        if node is None:
            break
        chain.append(node)
    for own in reversed(memory[len(chain) - held :]):
        cache.release_block(own, Use.COMPUTE, None)
    cache.release(chain, Use.COMPUTE)
    cache.check_integrity([])
    return chain


def salted(salt: str, first: int, length: int = 8) -> Key:
    return salt, (first, *range(1, length * SIZE))


def test_another_salts_block_is_never_found() -> None:
    cache = PrefixCache(BlockPool(8), SIZE)
    compute(cache, salted("a", 0), 3)
    chain: list[CachedBlock] = []
    cache.match(token_blocks(salted("b", 0)), 3, chain)
    assert chain == [] and cache.counts["collisions"] == 0


def test_a_forged_digest_is_a_miss_and_counted() -> None:
    cache = PrefixCache(BlockPool(8), SIZE)
    compute(cache, salted("a", 0), 3)
    forged = token_blocks(salted("a", 9))
    forged.digests[:3] = token_blocks(salted("a", 0)).digests[:3]
    chain: list[CachedBlock] = []
    cache.match(forged, 3, chain)
    assert chain == [] and cache.stats()["collisions"] == 1
    [own] = cache.allocate(1)
    assert cache.insert(forged, 0, None, own) is None and cache.stats()["collisions"] == 2
    same_tokens_other_parent = token_blocks(salted("a", 9))
    same_tokens_other_parent.digests[1] = token_blocks(salted("a", 0)).digests[1]
    node = cache.insert(same_tokens_other_parent, 0, None, own)
    cache.match(same_tokens_other_parent, 2, chain)
    assert chain == [node] and cache.stats()["collisions"] == 3


def test_an_earlier_match_is_gone_on_with_and_its_lost_end_is_not() -> None:
    cache = PrefixCache(BlockPool(8), SIZE)
    nodes = compute(cache, salted("a", 0), 4)
    blocks, chain = token_blocks(salted("a", 0)), list[CachedBlock]()
    cache.match(blocks, 2, chain)
    assert chain == nodes[:2]
    cache.match(blocks, 8, chain)
    assert chain == nodes
    for block in cache.allocate(7):  # evicts all but the first
        cache.release_block(block, Use.COMPUTE, None)
    again = compute(cache, salted("a", 0), 3)
    cache.match(blocks, 8, chain)
    assert chain == again and chain[0] is nodes[0] and chain[1] is not nodes[1]


def test_one_salts_churn_takes_no_others_blocks_but_for_what_it_holds() -> None:
    cache = PrefixCache(BlockPool(12), SIZE, max_blocks_per_owner=4)
    theirs = compute(cache, salted("b", 0), 4)
    for first in range(20):
        compute(cache, salted("a", first), 4)
    assert all(node.cached for node in theirs)
    assert cache.stats()["evictions"].keys() <= {"quota"}


def test_all_of_ones_own_go_before_any_of_the_others() -> None:
    cache = PrefixCache(BlockPool(8), SIZE, max_blocks_per_owner=4)
    theirs = compute(cache, salted("b", 0), 4)
    mine = compute(cache, salted("a", 0), 4)
    cache.allocate(4, Use.COMPUTE, mine[0].namespace)
    assert all(node.cached for node in theirs)


def test_lookups_are_counted_and_hits_noted() -> None:
    cache = PrefixCache(BlockPool(8), SIZE)
    chain = compute(cache, salted("a", 0), 3)
    cache.count_lookup(7, chain[:2])
    stats = cache.stats()
    assert (stats["queried_tokens"], stats["hit_tokens"], stats["inserted_tokens"]) == (7, 4, 6)
    assert [node.hits for node in chain] == [1, 1, 0]
    assert stats["blocks"] == {"free": 5, "idle": 3, "active": 0, "reserved": 0} and stats["cached_blocks"] == 3


class Counting(dict[bytes, CachedBlock]):
    """Counts what is asked of it; a walk is not allowed."""

    asked = 0

    def get(self, digest: bytes, default: object = None) -> CachedBlock | None:  # type: ignore[override]
        self.asked += 1
        return super().get(digest)

    def __iter__(self) -> Iterator[bytes]:
        raise AssertionError("walked")

    def values(self) -> None:  # type: ignore[override]
        raise AssertionError("walked")


def test_matching_looks_once_at_each_block_and_evicting_at_none() -> None:
    cache = PrefixCache(BlockPool(400), SIZE)
    chain = compute(cache, salted("a", 0, 300), 300)
    cache._index = index = Counting(cache._index)
    found: list[CachedBlock] = []
    cache.match(token_blocks(salted("a", 0, 300)), 299, found)
    assert found == chain[:299] and index.asked == 299
    cache.allocate(300)
    assert index.asked == 299 and [node.cached for node in chain] == [True] * 100 + [False] * 200
