"""What a window makes of a row's blocks, and of the blocks that are found."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headwise.runtime.kv.blocks import BlockPool, Use
from headwise.runtime.kv.eviction import CachedBlock, Chain
from headwise.runtime.kv.identity import TokenBlocks
from headwise.runtime.kv.prefix_cache import PrefixCache
from headwise.runtime.kv.windows import ENDLESS, RowRoom, longest_hit, row_blocks
from headwise.workers.kv.policy import DENSE, Reach
from tests.effort import examples
from tests.runtime.kv.test_prefix_cache import SIZE, token_blocks

REACHES = st.builds(Reach, st.integers(0, 9), st.integers(1, 20))


@examples(500)
@given(reach=REACHES, size=st.integers(1, 5), limit=st.integers(0, 20), there=st.sets(st.integers(0, 20)))
def test_the_longest_hit_is_the_longest_whose_blocks_are_there(
    reach: Reach, size: int, limit: int, there: set[int]
) -> None:
    asked: list[int] = []

    def has(index: int) -> bool:
        asked.append(index)
        return index in there

    lengths = (length for length in range(limit, -1, -1) if set(reach.needed_blocks(length, size)) <= there)
    assert longest_hit(reach, size, limit, has) == next(lengths)
    assert len(asked) == len(set(asked)), "no block is looked at twice"


@examples(300)
@given(
    reach=REACHES,
    size=st.integers(1, 5),
    blocks=st.integers(1, 40),
    chunk=st.integers(1, 64),
    tokens=st.integers(1, 300),
    found=st.integers(0, 300),
)
def test_a_row_gets_room_for_its_first_tokens_and_always_finds_it(
    reach: Reach, size: int, blocks: int, chunk: int, tokens: int, found: int
) -> None:
    """Where nobody else has blocks. ``found``: first blocks, as many of them as leave a token."""
    room = RowRoom.of(reach, size, blocks, chunk)
    if room.capacity is not None:
        tokens = min(tokens, room.capacity - 1)
    found = min(found, max(0, tokens - 1) // size)
    held = len(reach.needed_blocks(found, size))
    least, first = room.first_tokens(tokens + 1, found * size)
    assert found * size < least <= first <= tokens + 1 or not tokens
    assert held + -(-first // size) - found <= blocks
    assert room.most_blocks(tokens) <= blocks or room.capacity is not None
    assert min(room.steady, -(-(tokens + 1) // size)) <= blocks


@examples(100)
@given(reach=REACHES, size=st.integers(1, 5))
def test_a_row_that_computes_a_token_at_a_time_goes_on_with_so_many_blocks(reach: Reach, size: int) -> None:
    sinks = range(-(-reach.sinks // size))
    held = [
        len({*sinks, *range(reach.first_key(position) // size, position // size + 1)})
        for position in range(reach.span or 0, 10 * size + 2 * (reach.span or 0))
    ]
    assert max(held) == RowRoom.of(reach, size, 40, 64).steady


def test_the_least_memory_is_a_window_and_a_block_besides_or_a_whole_text() -> None:
    assert row_blocks(DENSE, 16, 100) == 7
    assert row_blocks(Reach(4, 1020), 16, 100) == 7
    assert row_blocks(Reach(4, 1020), 16, ENDLESS) == 1 + 65 + 1
    assert RowRoom.of(Reach(0, 32), 16, 3, 64).capacity == 48
    assert RowRoom.of(Reach(0, 32), 16, 4, 64).capacity is None


def cached(cache: PrefixCache, blocks: TokenBlocks, count: int, verified: bool = True) -> list[CachedBlock]:
    """The first blocks of a sequence, idle."""
    nodes = []
    for index, block in enumerate(cache.allocate(count)):
        node = cache.insert(blocks, index, None, block, verified)
        assert node is not None
        cache.release_block(block, Use.COMPUTE, node if node.block == block else None)
        nodes.append(node)
    return nodes


def sequence(first: int = 0) -> TokenBlocks:
    return token_blocks(("", (first, *range(1, 8 * SIZE))))


def test_blocks_with_a_window_go_in_any_order() -> None:
    cache = PrefixCache(BlockPool(8), SIZE, reach=Reach(0, 4))
    nodes = cached(cache, sequence(), 6)
    cache.hold([nodes[5]], Use.PIN)
    for block in cache.allocate(4):
        cache.release_block(block, Use.COMPUTE, None)
    cache.check_integrity([])
    assert [node.cached for node in nodes] == [False, False, True, True, True, True], "the longest idle go first"
    chain: Chain = []
    cache.match(sequence(), 6, chain)
    assert chain == [None, None, None, None, nodes[4], nodes[5]]
    assert cache.num_idle_in(chain) == 1
    cache.release([nodes[5]], Use.PIN)
    cache.check_integrity([])


def test_another_text_before_it_makes_another_block() -> None:
    cache = PrefixCache(BlockPool(8), SIZE, reach=Reach(0, 2))
    cached(cache, sequence(1), 4)
    forged = sequence(2)
    forged.digests[3] = sequence(1).digests[3]  # whose tokens are the same, and the digest before is not
    assert cache.find(forged, 3) is None and cache.stats()["collisions"] == 1
    assert cache.find(sequence(1), 3) is not None


def test_what_is_verified_takes_the_place_of_what_is_not() -> None:
    cache = PrefixCache(BlockPool(8), SIZE, reach=Reach(0, 4))
    early = cached(cache, sequence(), 2, verified=False)
    assert cache.find(sequence(), 0) is None
    late = cached(cache, sequence(), 1)
    assert not early[0].cached and cache.find(sequence(), 0) is late[0] and late[0].block != early[0].block
    again = cached(cache, sequence(), 1, verified=False)
    assert again == late, "found, and not cached twice"
    cache.verify(early)
    assert cache.find(sequence(), 1) is early[1] and not early[0].cached
    cache.withdraw(early)
    assert cache.find(sequence(), 1) is early[1], "it is verified by now"
    cache.check_integrity([])
    assert cache.stats()["inserted_tokens"] == 2 * SIZE
