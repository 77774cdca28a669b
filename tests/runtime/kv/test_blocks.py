"""The block pool's invariant, with no model."""

from __future__ import annotations

import timeit
from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headwise.runtime.kv.blocks import BlockPool, IntegrityError, OutOfBlocksError, Use
from tests.effort import examples

NUM_BLOCKS = 8
USES = st.sampled_from(list(Use))
BLOCKS = st.integers(0, NUM_BLOCKS - 1)


class PoolMachine(RuleBasedStateMachine):
    """Every call on every block, allowed or not, beside a plain count of who uses what."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.uses: Counter[tuple[int, Use]] = Counter()
        self.cached: set[int] = set()

    def total(self, block: int) -> int:
        return sum(self.uses[block, use] for use in Use)

    def free(self) -> set[int]:
        return {block for block in range(NUM_BLOCKS) if not self.total(block) and block not in self.cached}

    @rule(use=USES, count=st.integers(0, NUM_BLOCKS + 1))
    def allocate(self, use: Use, count: int) -> None:
        free = self.free()
        if count > len(free):
            with pytest.raises(OutOfBlocksError, match=f"asked for {count} blocks, {len(free)} of {NUM_BLOCKS}"):
                self.pool.allocate(count, use)
            return
        blocks = self.pool.allocate(count, use)
        assert len(set(blocks)) == count and set(blocks) <= free
        self.uses.update((block, use) for block in blocks)

    @rule(block=BLOCKS, use=USES)
    def hold(self, block: int, use: Use) -> None:
        if block in self.free():
            with pytest.raises(IntegrityError, match="is free and cannot be held"):
                self.pool.hold(block, use)
            return
        assert self.pool.hold(block, use) == (self.total(block) == 0)
        self.uses[block, use] += 1

    @rule(block=BLOCKS, use=USES)
    def release(self, block: int, use: Use) -> None:
        if not self.uses[block, use]:
            with pytest.raises(IntegrityError, match=f"no {use.name} use"):
                self.pool.release(block, use)
            return
        self.uses[block, use] -= 1
        assert self.pool.release(block, use) == (self.total(block) == 0 and block in self.cached)

    @rule(block=BLOCKS)
    def cache(self, block: int) -> None:
        if not self.total(block) or block in self.cached:
            with pytest.raises(IntegrityError, match="cannot be cached"):
                self.pool.cache(block)
            return
        self.pool.cache(block)
        self.cached.add(block)

    @rule(block=BLOCKS)
    def uncache(self, block: int) -> None:
        if block not in self.cached:
            with pytest.raises(IntegrityError, match="is not cached"):
                self.pool.uncache(block)
            return
        self.pool.uncache(block)
        self.cached.remove(block)

    @precondition(lambda self: any(self.uses[block, Use.COMPUTE] for block in range(NUM_BLOCKS)))
    @rule()
    def miscount_holds(self) -> None:
        held = [block for (block, use), count in self.uses.items() if use is Use.COMPUTE for _ in range(count)]
        with pytest.raises(IntegrityError, match="other numbers of requests"):
            self.pool.check_integrity(held[1:])
        with pytest.raises(IntegrityError, match="other numbers of requests"):
            self.pool.check_integrity([*held, held[0]])

    @invariant()
    def books_add_up(self) -> None:
        held = [block for (block, use), count in self.uses.items() if use is Use.COMPUTE for _ in range(count)]
        self.pool.check_integrity(held)
        states = self.pool.states()
        idle = {block for block in self.cached if not self.total(block)}
        reserved = {
            block
            for block in range(NUM_BLOCKS)
            if block not in self.cached and 0 < self.total(block) == self.uses[block, Use.TRANSFER]
        }
        assert (states["free"], states["idle"], states["reserved"]) == (len(self.free()), len(idle), len(reserved))
        assert sum(states.values()) == NUM_BLOCKS
        assert (self.pool.num_free, self.pool.num_idle) == (len(self.free()), len(idle))
        for block in range(NUM_BLOCKS):
            assert self.pool.is_used(block) == (self.total(block) > 0)
            assert self.pool.is_cached(block) == (block in self.cached)
            assert [self.pool.count(block, use) for use in Use] == [self.uses[block, use] for use in Use]


PoolMachine.TestCase.settings = examples(60, stateful_step_count=50)
TestPool = PoolMachine.TestCase


def test_the_block_freed_last_is_handed_out_first() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(4)
    pool.release(blocks[2], Use.COMPUTE)
    pool.release(blocks[0], Use.COMPUTE)
    assert pool.allocate(2) == [blocks[0], blocks[2]]


def test_states_are_counted_and_not_looked_for() -> None:
    """The engine's thread tells them at every call of stats()."""
    small, large = BlockPool(16), BlockPool(500_000)
    for pool in (small, large):
        pool.allocate(3, Use.TRANSFER)
    seconds = [min(timeit.repeat(pool.states, number=20, repeat=5)) for pool in (small, large)]
    assert seconds[1] < 100 * seconds[0]


def test_an_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(4)
    pool.allocate(2)
    with pytest.raises(OutOfBlocksError):
        pool.allocate(3)
    assert pool.num_free == 2
    pool.check_integrity()


def test_a_block_that_loses_its_last_use_while_shared_no_longer_is_free() -> None:
    pool = BlockPool(1)
    [block] = pool.allocate(1, Use.PIN)
    pool.cache(block)
    pool.uncache(block)
    assert pool.states() == {"free": 0, "idle": 0, "active": 1, "reserved": 0}
    assert pool.release(block, Use.PIN) is False
    assert pool.num_free == 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda pool: pool._free.append(pool._free[0]), "free twice"),
        (lambda pool: pool._free.pop(), "listed otherwise"),
        (lambda pool: pool._free.append(3), "listed otherwise"),
        (lambda pool: setattr(pool, "_num_idle", 0), "idle and 1 cached"),
        (lambda pool: setattr(pool, "_num_cached", 0), "idle and 1 cached"),
        (lambda pool: setattr(pool, "_num_reserved", 1), "0 blocks are reserved, 1"),
        (lambda pool: pool._uses[Use.PIN].__setitem__(3, 1), "has uses"),
        (lambda pool: pool._uses[Use.PIN].__setitem__(3, -1), "has uses"),
    ],
)
def test_books_that_do_not_add_up_are_noticed(spoil: object, message: str) -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(4)
    pool.release(blocks[0], Use.COMPUTE)
    pool.release(blocks[1], Use.COMPUTE)
    pool.cache(blocks[2])
    pool.release(blocks[2], Use.COMPUTE)
    assert blocks[3] == 3
    pool.check_integrity([blocks[3]])
    assert callable(spoil)
    spoil(pool)
    with pytest.raises(IntegrityError, match=message):
        pool.check_integrity()
