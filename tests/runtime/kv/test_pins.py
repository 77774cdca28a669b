"""Pinned prefixes stay as long as they were promised to, and no longer."""

from __future__ import annotations

import timeit
from typing import Any

import pytest

from headwise.runtime.kv.blocks import BlockPool, OutOfBlocksError, Use
from headwise.runtime.kv.eviction import CachedBlock
from headwise.runtime.kv.identity import TokenBlocks, sha256
from headwise.runtime.kv.pins import Pins
from headwise.runtime.kv.prefix_cache import PrefixCache
from headwise.workers.errors import InvalidValueError


class Bed:
    def __init__(self, blocks: int = 8, max_blocks: int = 4) -> None:
        self.now = 100.0
        self.cache = PrefixCache(BlockPool(blocks), 1)
        self.pins = Pins(self.cache, max_blocks, lambda: self.now)

    def chain(self, *tokens: int) -> list[CachedBlock]:
        blocks, chain = TokenBlocks(sha256(b""), 1, tokens), list[CachedBlock]()
        self.cache.match(blocks, len(tokens), chain)
        self.cache.hold(chain, Use.COMPUTE)
        for index in range(len(chain), len(tokens)):
            [own] = self.cache.allocate(1)
            node = self.cache.insert(blocks, index, chain[-1] if chain else None, own)
            assert node is not None
            chain.append(node)
        self.cache.release(chain, Use.COMPUTE)
        return chain


def test_a_pinned_chain_is_not_evicted_and_an_expired_one_is() -> None:
    bed = Bed(blocks=4)
    chain = bed.chain(1, 2)
    bed.pins.pin(chain, 10.0)
    bed.now += 9.9
    bed.pins.expire()
    with pytest.raises(OutOfBlocksError):
        bed.cache.allocate(3)
    assert bed.pins.num_blocks == 2 and all(node.cached for node in chain)
    bed.now += 0.1
    bed.pins.expire()
    assert bed.pins.num_blocks == 0 and bed.cache.num_available == 4
    bed.cache.allocate(4)
    assert not any(node.cached for node in chain)


def test_many_pins_of_the_same_blocks_are_counted_and_not_looked_through() -> None:
    """The engine's thread tells their number at every call of stats()."""
    seconds: list[float] = []
    for pins in (1, 2000):
        bed = Bed(blocks=201, max_blocks=200)
        chain = bed.chain(*range(200))
        for _ in range(pins):
            bed.pins.pin(chain, 10.0)
        assert bed.pins.num_blocks == 200
        seconds.append(min(timeit.repeat(lambda: bed.pins.num_blocks, number=5, repeat=5)))  # noqa: B023
        bed.pins.clear()
        assert bed.pins.num_blocks == 0 and bed.cache.pool.num_idle == 200
    assert seconds[1] < 100 * seconds[0]


def test_pins_of_the_same_blocks_do_not_know_of_each_other() -> None:
    bed = Bed()
    chain = bed.chain(1, 2, 3)
    bed.pins.pin(chain, 5.0)
    bed.pins.pin(chain[:1], 9.0)
    assert bed.pins.num_blocks == 3
    bed.now += 5.0
    bed.pins.expire()
    assert bed.pins.num_blocks == 1 and bed.cache.pool.num_idle == 2
    bed.now += 4.0
    bed.pins.expire()
    assert bed.pins.num_blocks == 0 and bed.cache.pool.num_idle == 3


def test_no_more_may_be_pinned_than_leaves_room_for_a_request() -> None:
    bed = Bed()
    bed.pins.pin(bed.chain(1, 2, 3), 5.0)
    with pytest.raises(InvalidValueError, match="5 blocks would be pinned, at most 4"):
        bed.pins.pin(bed.chain(1, 8, 9), 5.0)
    assert bed.pins.num_blocks == 3
    bed.cache.check_integrity([])
    bed.pins.pin(bed.chain(1, 8), 5.0)  # one of them is pinned already
    assert bed.pins.num_blocks == 4


def test_what_is_over_makes_room_for_a_new_pin() -> None:
    bed = Bed()
    bed.pins.pin(bed.chain(1, 2, 3), 5.0)
    bed.now += 5.0
    bed.pins.pin(bed.chain(4, 5, 6), 5.0)
    assert bed.pins.num_blocks == 3


def test_only_the_pin_that_is_over_first_is_looked_at() -> None:
    bed = Bed()
    for token, ttl in enumerate((50.0, 5.0, 20.0)):
        bed.pins.pin(bed.chain(token), ttl)
    bed.pins._pins = FirstOnly(bed.pins._pins)
    for _ in range(2):
        bed.now += 4.9
        bed.pins.expire()
        assert bed.pins.num_blocks == (3 if bed.now < 105.0 else 2)


class FirstOnly(list[tuple[float, int, list[CachedBlock]]]):
    def __getitem__(self, index: Any) -> Any:
        assert index == 0, "looked at"
        return super().__getitem__(index)

    def __iter__(self) -> Any:
        raise AssertionError("looked at")


def test_the_next_expiry_is_found_in_whatever_order_they_were_pinned() -> None:
    bed = Bed()
    for token, ttl in enumerate((7.0, 3.0, 5.0)):
        bed.pins.pin(bed.chain(token), ttl)
    left = []
    for _ in range(7):
        bed.now += 1.0
        bed.pins.expire()
        left.append(bed.pins.num_blocks)
    assert left == [3, 3, 2, 2, 1, 1, 0]


def test_a_block_that_is_cached_no_longer_is_free_once_its_pin_is_over() -> None:
    bed = Bed()
    chain = bed.chain(1, 2)
    bed.pins.pin(chain, 5.0)
    bed.cache.clear()
    assert bed.cache.num_available == 6 and bed.pins.num_blocks == 2
    again = bed.chain(1, 2)
    assert not {node.block for node in again} & {node.block for node in chain}
    bed.now += 5.0
    bed.pins.expire()
    assert bed.cache.num_available == 8 and all(node.cached for node in again)
    bed.cache.check_integrity([])


def test_clearing_lets_go_of_all() -> None:
    bed = Bed()
    bed.pins.pin(bed.chain(1, 2), 5.0)
    bed.pins.pin(bed.chain(1), 9.0)
    bed.pins.clear()
    assert bed.pins.num_blocks == 0 and bed.cache.pool.num_idle == 2
    bed.now += 99.0
    bed.pins.expire()
    bed.cache.check_integrity([])


def test_a_pin_of_nothing_and_one_for_no_time_hold_nothing_up() -> None:
    bed = Bed()
    bed.pins.pin([], 5.0)
    bed.pins.pin(bed.chain(1), 0.0)
    bed.pins.expire()
    assert bed.pins.num_blocks == 0 and bed.cache.num_available == 8
