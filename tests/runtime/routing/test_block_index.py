"""The index of blocks: the longest beginning of a prompt that each replica has, and nothing kept that nobody has."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headwise.runtime.routing.block_index import BlockIndex
from tests.effort import examples

CHAIN = [bytes([number]) * 32 for number in range(8)]


def test_each_replicas_longest_prefix_is_found() -> None:
    index = BlockIndex()
    index.add(CHAIN[:3], 0b001)
    index.add(CHAIN[:5], 0b010)
    assert index.prefixes(CHAIN) == [(3, 0b001), (5, 0b010)]
    assert index.prefixes(CHAIN[:3]) == [(3, 0b011)]
    assert index.prefixes(CHAIN[1:2]) == [(1, 0b011)]
    assert index.prefixes(CHAIN[6:]) == index.prefixes([]) == []


def test_a_block_behind_one_that_is_missing_counts_for_nothing() -> None:
    index = BlockIndex()
    index.add([CHAIN[0], CHAIN[2]], 0b001)
    assert index.prefixes(CHAIN) == [(1, 0b001)]


def test_what_nobody_has_is_not_kept() -> None:
    index = BlockIndex()
    index.add(CHAIN, 0b001)
    index.add(CHAIN[:2], 0b010)
    index.discard(CHAIN, 0b001)
    assert len(index) == 2
    index.discard(CHAIN, 0b010)
    assert len(index) == 0 and index.slots(CHAIN[0]) == 0


def test_blocks_that_come_together_share_a_bitmap() -> None:
    index = BlockIndex()
    for replica in range(100, 500):
        index.add(CHAIN, 1 << replica)
    assert len({id(index.slots(digest)) for digest in CHAIN}) == 1


def test_the_walk_ends_with_the_last_block_that_anybody_has() -> None:
    class Counting(dict[bytes, int]):
        asked = 0

        def get(self, digest: bytes, default: int = 0) -> int:  # type: ignore[override]
            self.asked += 1
            return super().get(digest, default)

    index = BlockIndex()
    index.add(CHAIN[:3], 0b001)
    index._slots = counting = Counting(index._slots)
    assert index.prefixes(CHAIN) == [(3, 0b001)] and counting.asked == 4


@examples(200)
@given(
    st.lists(st.tuples(st.booleans(), st.lists(st.sampled_from(CHAIN), max_size=8), st.integers(0, 70))),
    st.permutations(CHAIN),
)
def test_index_equals_plain_sets(changes: list[tuple[bool, list[bytes], int]], prompt: list[bytes]) -> None:
    index, sets = BlockIndex(), dict[int, set[bytes]]()
    for adds, digests, slot in changes:
        mine = sets.setdefault(slot, set())
        if adds:
            index.add(digests, 1 << slot)
            mine.update(digests)
        else:
            index.discard(digests, 1 << slot)
            mine.difference_update(digests)
    assert len(index) == len(set().union(*sets.values()))
    for digest in CHAIN:
        assert index.slots(digest) == sum(1 << slot for slot, mine in sets.items() if digest in mine)
    expected: dict[int, int] = {}
    for slot in sets:
        count = next((n for n, digest in enumerate(prompt) if digest not in sets[slot]), len(prompt))
        if count:
            expected[count] = expected.get(count, 0) | 1 << slot
    assert index.prefixes(prompt) == sorted(expected.items())
