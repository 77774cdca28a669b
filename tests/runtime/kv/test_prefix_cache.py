"""The prefix cache beside a naive one: a dict from (salt, all tokens up to a block's end) to the block's memory."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headwise.runtime.kv.blocks import BlockPool, OutOfBlocksError, Use
from headwise.runtime.kv.events import KvEvents, decode_snapshot
from headwise.runtime.kv.eviction import CachedBlock, EvictionName
from headwise.runtime.kv.identity import Hash, TokenBlocks, sha256
from headwise.runtime.kv.pins import Pins
from headwise.runtime.kv.prefix_cache import PrefixCache
from headwise.workers.errors import InvalidValueError
from tests.effort import examples

SIZE = 2
NUM_BLOCKS = 12
MAX_PINNED = 5
SALTS = ("", "tenant")
PROMPTS = st.builds(
    lambda start, length, tail: start[:length] + tail,
    st.sampled_from(([0] * 10, [0] * 5 + [1] * 5, [1] * 10)),
    st.integers(1, 10),
    st.lists(st.integers(0, 2), max_size=3),
)
RARELY = st.integers(0, 9).map(lambda number: number == 7)

Key = tuple[str, tuple[int, ...]]
"""What a block holds: for whom, and all tokens up to its end."""


def one_byte(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:1]


def token_blocks(key: Key, hash: Hash = sha256) -> TokenBlocks:
    return TokenBlocks(sha256(key[0].encode()), SIZE, key[1], hash)


@dataclass(eq=False)
class Sequence:
    """A request: memory for all its tokens, and what the cache holds for the first of them."""

    key: Key
    blocks: TokenBlocks
    chain: list[CachedBlock]
    memory: list[int]

    def prefix(self, index: int) -> Key:
        return self.key[0], self.key[1][: (index + 1) * SIZE]

    def held(self) -> list[int]:
        apart = [n.block for n, own in zip(self.chain, self.memory, strict=False) if n.block != own]
        return self.memory + apart


@dataclass(eq=False)
class Pinned:
    chain: list[CachedBlock]
    keys: list[Key]
    expiry: float


@dataclass
class Naive:
    """What may be found, and in which order it goes."""

    quota: int | None
    memory: dict[Key, int] = field(default_factory=dict)
    idle: list[Key] = field(default_factory=list)  # for the longest time first
    collisions: int = 0

    def longest(self, key: Key, limit: int) -> list[Key]:
        prefixes = [(key[0], key[1][: end * SIZE]) for end in range(1, limit + 1)]
        missing = (index for index, prefix in enumerate(prefixes) if prefix not in self.memory)
        return prefixes[: next(missing, limit)]

    def share(self, salt: str) -> int:
        return sum(key[0] == salt for key in self.memory)

    def own_victim(self, salt: str) -> Key | None:
        if self.quota is None or self.share(salt) < self.quota:
            return None
        return next((key for key in self.idle if key[0] == salt), None)

    def forget(self, key: Key) -> None:
        del self.memory[key]
        if key in self.idle:
            self.idle.remove(key)

    def descendants(self, key: Key) -> list[Key]:
        return [other for other in self.memory if other[0] == key[0] and other[1][: len(key[1])] == key[1]]


class CacheMachine(RuleBasedStateMachine):
    """Requests come, share and leave; prefixes are pinned; what is there is cleared."""

    hash: Hash = staticmethod(sha256)

    @initialize(eviction=st.sampled_from(["lru", "lru", "cost_aware"]), quota=st.sampled_from([None, None, 1, 3, 5]))
    def start(self, eviction: EvictionName, quota: int | None) -> None:
        self.eviction = eviction
        self.events = KvEvents(1)
        self.cache = PrefixCache(BlockPool(NUM_BLOCKS), SIZE, eviction, self.events, quota)
        self.now = 0.0
        self.pins = Pins(self.cache, MAX_PINNED, lambda: self.now)
        self.told_idle: set[CachedBlock] = set()
        self.cache.on_idle, self.cache.on_busy = self.told_idle.add, self.told_idle.remove
        self.naive = Naive(quota)
        self.sequences: list[Sequence] = []
        self.pinned: list[Pinned] = []
        self.written: dict[int, Key] = {}
        self.nodes: dict[Key, CachedBlock] = {}

    @rule(salt=st.sampled_from(SALTS), tokens=PROMPTS)
    def serve(self, salt: str, tokens: list[int]) -> None:
        """All of a request's life."""
        before = len(self.sequences)
        self.begin(salt, tokens)
        if len(self.sequences) > before:
            sequence = self.sequences[-1]
            self.share_up_to(sequence, len(tokens))
            self.end_one(sequence)

    @rule(salt=st.sampled_from(SALTS), tokens=PROMPTS)
    def begin(self, salt: str, tokens: list[int]) -> None:
        key = (salt, tuple(tokens))
        blocks = token_blocks(key, self.hash)
        chain = self.match(key, blocks, (len(tokens) - 1) // SIZE)
        keys = [(salt, key[1][: end * SIZE]) for end in range(1, len(chain) + 1)]
        missing = len(tokens) // SIZE + 1 - len(chain)
        idle = sum(prefix in self.naive.idle for prefix in keys)
        assert self.cache.num_idle_in(chain) == idle
        before = dict(self.naive.memory)
        self.hold(chain, keys, Use.COMPUTE)
        if missing > self.cache.num_available:
            with pytest.raises(OutOfBlocksError):
                self.cache.allocate(missing, Use.COMPUTE, blocks.namespace)
            self.check_cached(before)
            self.let_go(chain, keys, Use.COMPUTE)
            return
        held = self.held()
        new = self.cache.allocate(missing, Use.COMPUTE, blocks.namespace)
        assert len(set(new)) == missing and not set(new) & held.keys(), "a block has two owners"
        self.expect_evictions(missing, salt)
        sequence = Sequence(key, blocks, chain, [node.block for node in chain] + new)
        self.sequences.append(sequence)
        for index in range(len(chain), len(sequence.memory)):
            self.written[sequence.memory[index]] = sequence.prefix(index)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), count=st.integers(1, 6))
    def share(self, data: st.DataObject, count: int) -> None:
        self.share_up_to(data.draw(st.sampled_from(self.sequences)), count)

    def share_up_to(self, sequence: Sequence, count: int) -> None:
        full = min(len(sequence.key[1]) // SIZE, len(sequence.chain) + count)
        for index in range(len(sequence.chain), full):
            if not self.share_block(sequence, index):
                break

    def share_block(self, sequence: Sequence, index: int) -> bool:
        key, own, naive = sequence.prefix(index), sequence.memory[index], self.naive
        parent = sequence.chain[-1] if sequence.chain else None
        alive = parent is None or parent.cached
        expected = self.expect_insert(key, sequence.blocks.digests[index]) if alive else None
        node = self.cache.insert(sequence.blocks, index, parent, own)
        if expected is None:
            assert node is None
            return False
        assert node is not None and node.cached and node.parent is parent
        assert (node.block == own) == (expected == "own")
        if expected == "own":
            naive.memory[key] = own
            self.nodes[key] = node
        else:
            assert node is self.nodes[key]
            self.hold([node], [key], Use.COMPUTE)
        sequence.chain.append(node)
        return True

    def expect_insert(self, key: Key, digest: bytes) -> str | None:
        """What comes of it; makes the room that it makes."""
        naive = self.naive
        if key in naive.memory:
            return "found"
        if self.by_digest().get(digest) is not None:
            naive.collisions += 1
            return None
        if naive.quota is not None and naive.share(key[0]) >= naive.quota:
            victim = naive.own_victim(key[0])
            if victim is None:
                return None
            naive.forget(victim)
        return "own"

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        """As it finishes, is aborted or preempted."""
        self.end_one(data.draw(st.sampled_from(self.sequences)))

    def end_one(self, sequence: Sequence) -> None:
        self.sequences.remove(sequence)
        for index in reversed(range(len(sequence.memory))):
            own = sequence.memory[index]
            node = sequence.chain[index] if index < len(sequence.chain) else None
            if node is not None and node.block != own:
                self.cache.release_block(own, Use.COMPUTE, None)
                own = node.block
            self.cache.release_block(own, Use.COMPUTE, node)
            if node is not None:
                self.note_idle([sequence.prefix(index)])

    @rule(data=st.data(), ttl=st.sampled_from([0.0, 1.0, 5.0]))
    def pin(self, data: st.DataObject, ttl: float) -> None:
        self.expire()
        keys = list(self.naive.memory) or [("", ())]
        key = data.draw(st.sampled_from(keys))
        chain = self.match(key, token_blocks(key, self.hash), len(key[1]) // SIZE)
        keys = self.naive.longest(key, len(chain))
        pinned = {node.block for pin in self.pinned for node in pin.chain}
        if len(pinned | {node.block for node in chain}) > MAX_PINNED:
            with pytest.raises(InvalidValueError, match="would be pinned"):
                self.pins.pin(chain, ttl)
            return
        self.pins.pin(chain, ttl)
        self.pinned.append(Pinned(chain, keys, self.now + ttl))
        self.note_busy(keys)

    @rule(seconds=st.sampled_from([0.0, 1.0, 3.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.expire()

    def expire(self) -> None:
        over = [pin for pin in self.pinned if pin.expiry <= self.now]
        self.pinned = [pin for pin in self.pinned if pin.expiry > self.now]
        self.pins.expire()
        self.note_idle_after(over)

    @rule(really=RARELY)
    def clear(self, really: bool) -> None:
        if not really:
            return
        self.cache.clear()
        self.naive.memory.clear()
        self.naive.idle.clear()

    @invariant()
    def nothing_is_mixed_up(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check_integrity([block for sequence in self.sequences for block in sequence.held()])
        self.check_cached(self.naive.memory)
        for key, block in self.naive.memory.items():
            assert self.written[block] == key, "what is shared is not what was written last"
            node = self.nodes[key]
            blocks = token_blocks(key, self.hash)
            index = len(key[1]) // SIZE - 1
            assert node.cached and node.index == index and node.tokens == blocks.block(index)
            assert node.namespace == blocks.namespace and node.parent_digest == blocks.parent(index)
        assert self.told_idle == {self.nodes[key] for key in self.naive.idle}
        if self.naive.quota is not None:
            assert all(self.naive.share(salt) <= self.naive.quota for salt in SALTS)
        assert self.cache.counts["collisions"] == self.naive.collisions
        assert self.pins.num_blocks == len({node.block for pin in self.pinned for node in pin.chain})
        told = decode_snapshot(self.events.snapshot()).blocks["device"]
        assert told == {self.nodes[key].digest: self.nodes[key].parent_digest for key in self.naive.memory}

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        for sequence in self.sequences:
            for block in sequence.held():
                self.cache.pool.release(block, Use.COMPUTE)
        self.sequences = []
        self.pins.clear()
        self.cache.pool.check_integrity([])

    def match(self, key: Key, blocks: TokenBlocks, limit: int) -> list[CachedBlock]:
        """Finds exactly what the naive cache does, whatever collides."""
        expected = self.naive.longest(key, limit)
        if len(expected) < limit and blocks.digests[len(expected)] in self.by_digest():
            self.naive.collisions += 1
        chain: list[CachedBlock] = []
        self.cache.match(blocks, limit, chain)
        assert [self.written[node.block] for node in chain] == expected
        assert [self.nodes[prefix] for prefix in expected] == chain
        return chain

    def by_digest(self) -> dict[bytes, Key]:
        return {self.nodes[key].digest: key for key in self.naive.memory}

    def hold(self, chain: list[CachedBlock], keys: list[Key], use: Use) -> None:
        self.cache.hold(chain, use)
        self.note_busy(keys)

    def let_go(self, chain: list[CachedBlock], keys: list[Key], use: Use) -> None:
        self.cache.release(chain, use)
        self.note_idle(reversed(keys))

    def note_busy(self, keys: list[Key]) -> None:
        self.naive.idle = [key for key in self.naive.idle if key not in keys]

    def note_idle(self, keys: list[Key] | Iterator[Key]) -> None:
        """Of keys just let go, last block first: those nobody holds now, and that are there at all."""
        for key in keys:
            block = self.naive.memory.get(key)
            if block is not None and key not in self.naive.idle and not self.cache.pool.is_used(block):
                assert not self.held()[block]
                self.naive.idle.append(key)

    def note_idle_after(self, pins: list[Pinned]) -> None:
        for at, pin in enumerate(pins):
            later = {node for other in pins[at + 1 :] for node in other.chain}  # the last of them lets go
            self.note_idle(
                key
                for key, node in zip(reversed(pin.keys), reversed(pin.chain), strict=True)
                if node.cached and node not in later
            )

    def held(self) -> Counter[int]:
        computed = Counter(block for sequence in self.sequences for block in sequence.held())
        return computed + Counter(node.block for pin in self.pinned for node in pin.chain)

    def expect_evictions(self, count: int, salt: str) -> None:
        """For an allocation just made: as few as it took, idle ones only, no parent before its children."""
        naive = self.naive
        now = {key for key in naive.memory if self.nodes[key].cached}
        gone = naive.memory.keys() - now
        assert gone <= set(naive.idle)
        free = NUM_BLOCKS - len({*self.held(), *naive.memory.values()})
        assert len(gone) == max(0, count - free)
        if self.eviction == "lru":
            expected = []
            full = naive.quota is not None and naive.share(salt) + count > naive.quota
            for _ in gone:
                own = (key for key in naive.idle if key[0] == salt and full)
                expected.append(next(own, naive.idle[0]))
                naive.forget(expected[-1])
            assert set(expected) == gone
        elif naive.own_victim(salt) is not None:
            assert any(key[0] == salt for key in gone) or not gone
        for key in gone & naive.memory.keys():
            naive.forget(key)

    def check_cached(self, expected: dict[Key, int]) -> None:
        assert len(self.cache) == len(expected)
        for key, block in expected.items():
            node = self.cache.get(self.nodes[key].digest)
            assert node is self.nodes[key] and node.block == block


class CollidingMachine(CacheMachine):
    """With digests of 8 bits."""

    hash: Hash = staticmethod(one_byte)


class CrowdedMachine(CacheMachine):
    """With digests of 3 bits, so that nearly every block meets another one's."""

    hash: Hash = staticmethod(lambda data: bytes([one_byte(data)[0] & 7]))


for machine in (CacheMachine, CollidingMachine, CrowdedMachine):
    machine.TestCase.settings = examples(100, stateful_step_count=50)
TestCache = CacheMachine.TestCase
TestColliding = CollidingMachine.TestCase
TestCrowded = CrowdedMachine.TestCase
