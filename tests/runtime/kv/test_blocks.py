"""The block pool's invariant, with no model."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headwise.runtime.kv.blocks import BlockPool, IntegrityError, OutOfBlocksError

NUM_BLOCKS = 12


class PoolMachine(RuleBasedStateMachine):
    """Allocates and frees at random beside a plain dict of who owns what."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.owned: dict[str, list[int]] = {}

    @rule(owner=st.sampled_from("abcd"), count=st.integers(0, NUM_BLOCKS + 1))
    def allocate(self, owner: str, count: int) -> None:
        free = NUM_BLOCKS - sum(map(len, self.owned.values()))
        if count > free:
            with pytest.raises(OutOfBlocksError, match=f"asked for {count} blocks, {free} of {NUM_BLOCKS}"):
                self.pool.allocate(count, owner)
        else:
            self.owned.setdefault(owner, []).extend(self.pool.allocate(count, owner))

    @precondition(lambda self: any(self.owned.values()))
    @rule(data=st.data())
    def free_some(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(o for o, blocks in self.owned.items() if blocks)))
        blocks = data.draw(st.lists(st.sampled_from(self.owned[owner]), unique=True))
        self.pool.free(blocks, owner)
        self.owned[owner] = [block for block in self.owned[owner] if block not in blocks]

    @precondition(lambda self: any(self.owned.values()))
    @rule(data=st.data())
    def free_anothers(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(o for o, blocks in self.owned.items() if blocks)))
        with pytest.raises(IntegrityError, match=f"belongs to {owner}"):
            self.pool.free(self.owned[owner], "nobody")

    @invariant()
    def books_add_up(self) -> None:
        self.pool.check_integrity()
        blocks = [block for owned in self.owned.values() for block in owned]
        assert len(set(blocks)) == len(blocks)
        assert self.pool.num_free == NUM_BLOCKS - len(blocks)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def test_freeing_twice_is_noticed() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2, "a")
    with pytest.raises(IntegrityError, match="twice"):
        pool.free([blocks[0], blocks[0]], "a")
    pool.free(blocks, "a")
    with pytest.raises(IntegrityError, match="belongs to None"):
        pool.free(blocks, "a")
    pool.check_integrity()


def test_books_that_do_not_add_up_are_noticed() -> None:
    pool = BlockPool(4)
    pool._free.append(pool._free[0])
    with pytest.raises(IntegrityError, match="free twice"):
        pool.check_integrity()
    pool = BlockPool(4)
    pool._free.pop()
    with pytest.raises(IntegrityError, match="are not 4"):
        pool.check_integrity()
