"""A tier's index: what is read stays, what only this tier has stays, the rest goes by age and by share."""

from __future__ import annotations

import timeit
from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headwise.runtime.kv.blocks import IntegrityError
from headwise.runtime.kv.tier_index import TierBlock, TierIndex
from headwise.workers.kv.transfer import BlockKey, Tier
from tests.effort import examples

CAPACITY = 6
NAMESPACES = (b"a", b"b", b"c")


def entry(name: int, namespace: bytes = b"a") -> TierBlock:
    return TierBlock(BlockKey(bytes([name]), namespace, b"", b""), Tier.HOST, namespace)


class IndexMachine(RuleBasedStateMachine):
    """Beside a list of entries, the least recently used first."""

    @initialize(quota=st.sampled_from([None, 0.01, 0.5, 1.0]))
    def start(self, quota: float | None) -> None:
        self.index = TierIndex(Tier.HOST, CAPACITY, quota)
        self.share = CAPACITY if quota is None else max(1, int(quota * CAPACITY))
        self.entries: list[TierBlock] = []
        self.dirty: list[TierBlock] = []
        self.next_name = 0

    def own(self, namespace: bytes) -> list[TierBlock]:
        return [each for each in self.entries if each.key.namespace == namespace]

    @rule(namespace=st.sampled_from(NAMESPACES), clean=st.booleans())
    def add(self, namespace: bytes, clean: bool) -> None:
        own_full = len(self.own(namespace)) + self.index.incoming[namespace] >= self.share
        full = len(self.entries) + self.index.incoming.total() >= CAPACITY or own_full
        assert self.index.is_full(namespace) == full
        if full:
            candidates = self.own(namespace) if own_full else self.entries
            can_go = (each for each in candidates if each not in self.dirty and not each.readers)
            victim = self.index.victim(namespace)
            assert victim is next(can_go, None)
            if victim is None:
                return
            self.take_out(victim)
            if self.index.is_full(namespace):
                return
        new = entry(self.next_name % 256, namespace)
        if new.key.digest in self.index:
            with pytest.raises(IntegrityError, match="already"):
                self.index.add(new, clean)
            return
        self.next_name += 1
        self.index.add(new, clean)
        self.entries.append(new)
        if not clean:
            self.dirty.append(new)

    def take_out(self, one: TierBlock) -> None:
        self.index.remove(one)
        self.entries.remove(one)
        if one in self.dirty:
            self.dirty.remove(one)

    @precondition(lambda self: self.entries)
    @rule(data=st.data(), what=st.sampled_from(["touch", "clean", "read", "done", "remove"]))
    def use(self, data: st.DataObject, what: str) -> None:
        one = data.draw(st.sampled_from(self.entries))
        if what == "touch":
            self.index.touch(one)
            self.use_last(one)
        elif what == "clean":
            self.index.clean(one)
            if one in self.dirty:
                self.dirty.remove(one)
                # From now on it counts as used last among what can go.
                self.entries.remove(one)
                self.entries.append(one)
                self.index.touch(one)
        elif what == "read":
            self.index.read(one)
        elif what == "done" and one.readers:
            self.index.done(one)
            self.use_last(one)
        elif what == "remove":
            self.take_out(one)

    def use_last(self, one: TierBlock) -> None:
        for order in (self.entries, self.dirty):
            if one in order:
                order.remove(one)
                order.append(one)

    @rule(count=st.integers(0, 2), namespace=st.sampled_from(NAMESPACES))
    def expect(self, count: int, namespace: bytes) -> None:
        room = min(CAPACITY - len(self.entries), self.share - len(self.own(namespace)))
        self.index.incoming = Counter({namespace: min(count, room)})

    @invariant()
    def books_add_up(self) -> None:
        if not hasattr(self, "index"):
            return
        self.index.check_integrity()
        assert len(self.index) == len(self.entries) and set(self.index) == set(self.entries)
        assert all(self.index.get(each.key.digest) is each for each in self.entries)
        assert self.index.num_free == CAPACITY - len(self.entries) - self.index.incoming.total()
        assert self.index.num_clean == len(self.entries) - len(self.dirty)
        assert self.index.dirty(3) == self.dirty[:3]
        assert all(len(self.own(namespace)) <= self.share for namespace in NAMESPACES)


IndexMachine.TestCase.settings = examples(60, stateful_step_count=50)
TestIndex = IndexMachine.TestCase


def test_what_is_busy_is_passed_over() -> None:
    index = TierIndex(Tier.HOST, 2)
    first, second = entry(1), entry(2)
    index.add(first, clean=True)
    index.add(second, clean=True)
    index.read(first)
    index.read(first)
    assert index.victim(b"a") is second
    index.read(second)
    assert index.victim(b"a") is None
    index.done(first)
    assert index.victim(b"a") is None
    index.done(first)
    assert index.victim(b"a") is first
    index.done(second)
    assert index.victim(b"a") is first


def test_what_was_read_while_the_tier_was_cleared_stays_away() -> None:
    index = TierIndex(Tier.HOST, 2, 0.5)
    old, new = entry(1), entry(1)
    index.add(old, clean=True)
    index.read(old)
    index.remove(old)
    index.add(new, clean=True)
    index.done(old)
    assert index.victim(b"a") is new and list(index) == [new]
    index.check_integrity()


def test_what_only_this_tier_has_is_no_victim_until_it_is_clean() -> None:
    index = TierIndex(Tier.HOST, 2)
    first, second = entry(1), entry(2)
    index.add(first, clean=False)
    index.add(second, clean=False)
    assert index.victim(b"a") is None and index.dirty(9) == [first, second] and index.dirty(1) == [first]
    index.clean(second)
    index.clean(second)
    assert index.victim(b"a") is second and index.dirty(9) == [first] and index.num_clean == 1


def test_a_salt_with_its_full_share_gives_up_its_own() -> None:
    index = TierIndex(Tier.HOST, 4, quota=0.5)
    theirs, first, second = entry(1, b"b"), entry(2), entry(3)
    for each in (theirs, first, second):
        index.add(each, clean=True)
    assert index.num_free == 1 and index.is_full(b"a") and not index.is_full(b"b")
    assert index.victim(b"a") is first
    index.touch(first)
    assert index.victim(b"a") is second
    index.read(second)
    assert index.victim(b"a") is first


def test_namespaces_of_one_owner_have_one_share() -> None:
    index = TierIndex(Tier.HOST, 4, 0.5)
    first, second, theirs = (
        TierBlock(BlockKey(bytes([name]), bytes([name]), b"", b""), Tier.HOST, owner)
        for name, owner in ((1, b"a"), (2, b"a"), (3, b"b"))
    )
    for block in (theirs, first, second):
        index.add(block, clean=True)
    index.check_integrity()
    assert index.is_full(b"a") and index.victim(b"a") is first and not index.is_full(b"b")


def test_a_salt_below_its_share_takes_from_anybody_when_all_is_full() -> None:
    index = TierIndex(Tier.HOST, 2, quota=0.5)
    theirs = entry(1, b"b")
    index.add(theirs, clean=True)
    index.add(entry(2, b"c"), clean=True)
    assert index.is_full(b"a") and index.victim(b"a") is theirs


def test_a_share_is_a_block_at_least() -> None:
    index = TierIndex(Tier.HOST, 4, quota=0.01)
    assert not index.is_full(b"a")
    index.add(entry(1), clean=True)
    assert index.is_full(b"a") and not index.is_full(b"b")


def test_room_is_kept_for_what_is_on_its_way() -> None:
    index = TierIndex(Tier.DISK, 2)
    index.incoming = Counter({b"a": 2})
    assert index.num_free == 0 and index.is_full(b"a") and index.victim(b"a") is None


@pytest.mark.parametrize("quota", [None, 0.5])
@pytest.mark.parametrize("busy", ["read", "dirty"])
def test_a_victim_is_not_looked_for_among_what_cannot_go(quota: float | None, busy: str) -> None:
    seconds: list[float] = []
    for size in (16, 100_000):
        index = TierIndex(Tier.HOST, size + 2, quota)
        for number in range(size):
            block = TierBlock(BlockKey(number.to_bytes(32, "big"), b"a", b"", b""), Tier.HOST, b"a")
            index.add(block, clean=busy == "read")
            if busy == "read":
                index.read(block)
        last = entry(1)
        index.add(last, clean=True)
        assert index.victim(b"a") is last
        seconds.append(min(timeit.repeat(lambda: index.victim(b"a"), number=20, repeat=5)))  # noqa: B023
    assert seconds[1] < 100 * seconds[0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda index: setattr(index, "incoming", Counter({b"a": 4})), "at most 4"),
        (lambda index: index._dirty.__setitem__(b"\x01", entry(1)), "or both"),
        (lambda index: index._idle.clear(), "neither"),
        (lambda index: index._num_of.clear(), "owners"),
        (lambda index: index._idle.__setitem__(b"\x01", entry(1)), "neither"),
        (lambda index: index._idle_of.__setitem__(b"b", index._idle_of.pop(b"a")), "could not give up"),
    ],
)
def test_books_that_do_not_add_up_are_noticed(spoil: object, message: str) -> None:
    index = TierIndex(Tier.HOST, 4, quota=0.5)
    index.add(entry(1), clean=True)
    index.check_integrity()
    assert callable(spoil)
    spoil(index)
    with pytest.raises(IntegrityError, match=message):
        index.check_integrity()
