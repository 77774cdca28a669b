"""Which idle block goes first."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.runtime.kv.eviction import POLICIES, CachedBlock, CostAware, EvictionName, EvictionPolicy, Lru
from tests.effort import examples


def block(parent: CachedBlock | None = None, hits: int = 0) -> CachedBlock:
    node = CachedBlock(b"digest", b"namespace", b"tokens", parent, 0)
    node.hits = hits
    if parent is not None:
        parent.children.add(node)
    return node


def chain(length: int, hits: int = 0) -> list[CachedBlock]:
    nodes: list[CachedBlock] = []
    for _ in range(length):
        nodes.append(block(nodes[-1] if nodes else None, hits))
    return nodes


def idle(policy: EvictionPolicy, nodes: list[CachedBlock]) -> None:
    """As a request leaves: the last block first."""
    for node in reversed(nodes):
        policy.add(node)


def evict(policy: EvictionPolicy) -> CachedBlock | None:
    node = policy.victim()
    if node is None:
        return None
    policy.remove(node)
    node.cached = False
    if node.parent is not None:
        node.parent.children.discard(node)
        if not node.parent.children:
            policy.childless(node.parent)
    return node


def test_a_block_knows_its_place() -> None:
    nodes = chain(3)
    assert [node.index for node in nodes] == [0, 1, 2]
    assert nodes[0].parent is None and nodes[2].parent is nodes[1] and nodes[1].children == {nodes[2]}
    assert nodes[0].cached and nodes[0].hits == 0


@pytest.mark.parametrize("name", ["lru", "cost_aware"])
def test_nothing_idle_is_no_victim(name: EvictionName) -> None:
    policy = POLICIES[name]()
    assert policy.victim() is None and len(policy) == 0
    node = block()
    policy.remove(node)
    policy.childless(node)
    assert policy.victim() is None and len(policy) == 0


@pytest.mark.parametrize("name", ["lru", "cost_aware"])
def test_a_victim_stays_until_it_is_removed(name: EvictionName) -> None:
    policy = POLICIES[name]()
    nodes = chain(2)
    idle(policy, nodes)
    assert policy.victim() is policy.victim() is nodes[1]
    assert len(policy) == 2


def test_lru_is_the_order_of_becoming_idle() -> None:
    policy = Lru()
    first, second = chain(2), chain(2)
    idle(policy, first)
    idle(policy, second)
    for node in first:
        policy.remove(node)
    idle(policy, first)
    assert [evict(policy) for _ in range(4)] == [second[1], second[0], first[1], first[0]]


def test_more_hits_stay_longer() -> None:
    policy = CostAware()
    liked, plain = block(hits=3), block()
    policy.add(liked)
    policy.add(plain)
    assert [evict(policy), evict(policy)] == [plain, liked]


def test_what_took_longer_to_compute_stays_longer() -> None:
    policy = CostAware()
    late = chain(200)[-1]
    policy.add(late)
    policy.add(early := block())
    assert [evict(policy), evict(policy)] == [early, late]


def test_among_equals_the_longest_idle_goes_first() -> None:
    policy = CostAware()
    nodes = [block() for _ in range(5)]
    for node in nodes:
        policy.add(node)
    assert [evict(policy) for _ in range(5)] == nodes


def test_an_old_favourite_leaves_in_the_end() -> None:
    policy = CostAware()
    favourite = block(hits=10_000)
    policy.add(favourite)
    gone: list[CachedBlock | None] = []
    while favourite not in gone and len(gone) < 100:
        # Each is worth more than nothing, and so moves the clock on.
        policy.add(block(hits=1))
        gone.append(evict(policy))
    assert 5 < len(gone) < 100, "neither at once nor never"


def test_a_block_worth_more_than_the_scale_is_still_found() -> None:
    policy = CostAware()
    policy.add(node := block(hits=10**30))
    assert evict(policy) is node


def test_a_branch_keeps_its_stem() -> None:
    policy = CostAware()
    stem = chain(2)
    left, right = block(stem[1], hits=50), block(stem[1], hits=50)
    for node in (left, right, stem[1], stem[0]):
        policy.add(node)
    assert [evict(policy) for _ in range(4)] == [left, right, stem[1], stem[0]]


@pytest.mark.parametrize("name", ["lru", "cost_aware"])
@examples(200)
@given(seed=st.integers(0, 2**32))
def test_every_idle_block_goes_once_and_none_before_its_children(name: EvictionName, seed: int) -> None:
    chance, policy = random.Random(seed), POLICIES[name]()
    roots: list[CachedBlock] = []
    idle_now: set[CachedBlock] = set()
    for _ in range(chance.randint(1, 30)):
        if chance.random() < 0.4:
            node = evict(policy)
            assert (node is None) == (not idle_now)
            if node is not None:
                assert not node.children and node in idle_now
                idle_now.remove(node)
                roots = [root for root in roots if root is not node]
            continue
        # A request walks down what is there, adds some of its own, and leaves.
        path = [chance.choice(roots)] if roots and chance.random() < 0.7 else []
        while path and path[-1].children and chance.random() < 0.7:
            path.append(chance.choice(sorted(path[-1].children, key=id)))
        for node in path:
            policy.remove(node)
            idle_now.discard(node)
            node.hits += chance.choice((0, 1, 40))
        for _ in range(chance.randint(0, 3)):
            path.append(block(path[-1] if path else None))
            if path[-1].parent is None:
                roots.append(path[-1])
        idle(policy, path)
        idle_now |= set(path)
        assert len(policy) == len(idle_now)
    while idle_now:
        node = evict(policy)
        assert node is not None and not node.children
        idle_now.remove(node)
    assert policy.victim() is None and len(policy) == 0


class CountingLevels(dict[int, object]):
    """Counts how often it is looked into."""

    looks = 0

    def __contains__(self, key: object) -> bool:
        self.looks += 1
        return super().__contains__(key)


def test_evicting_does_not_walk_what_is_cached() -> None:
    looks = {}
    for length in (50, 5000):
        policy = CostAware()
        policy._leaves = CountingLevels()  # type: ignore[assignment]
        idle(policy, chain(length))
        for _ in range(length):
            assert evict(policy) is not None
        looks[length] = policy._leaves.looks / length  # type: ignore[attr-defined]
    assert looks[5000] <= looks[50] + 1 <= CostAware.LEVELS
