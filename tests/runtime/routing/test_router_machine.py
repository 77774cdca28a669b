"""The router against plain dicts: real KV events, late or lost or behind, and requests of every fate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headwise.runtime.kv.events import TIERS, KvEvents, Subscription, decode_events, decode_snapshot
from headwise.runtime.routing.load import LoadReport
from headwise.runtime.routing.router import Choice, Instruction, RouteAgain, Router
from tests.effort import examples

SIZE = 4
CHAINS = [[bytes([chain, block]) * 16 for block in range(4)] for chain in range(2)]
DIGESTS = [digest for chain in CHAINS for digest in chain]
NAMES = ["a", "b", "c", "d"]

FATES = ["noted", "sent", "read", "read"]  # of an event: in the engine's notes, in a message, at the router
numbers = st.integers(0, len(NAMES) - 1)
some_digests = st.lists(st.sampled_from(DIGESTS), min_size=1, max_size=5, unique=True)


@dataclass
class Request:
    number: int
    tokens: int
    expected: list[bytes]
    runs: bool = False


@dataclass
class Engine:
    """A replica as it is, and what the router must think of it."""

    events: KvEvents
    subscription: Subscription
    truth: dict[str, set[bytes]] = field(default_factory=lambda: {tier: set() for tier in TIERS})
    drains: bool = False
    requests: dict[str, Request] = field(default_factory=dict)
    other_tokens: int = 0
    other_running: int = 0

    @property
    def held(self) -> set[bytes]:
        return set().union(*self.truth.values())


class RouterMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.router = Router(SIZE)
        self.engines: dict[str, Engine] = {}
        self.wanted: set[str] = set()
        self.count, self.epoch = 0, 0

    def obey(self, instructions: Iterable[Instruction]) -> None:
        for instruction in instructions:
            assert not isinstance(instruction, RouteAgain)
            self.wanted.add(instruction.replica)

    def name(self, number: int) -> str:
        """One of those that are there; of none, one that is not."""
        return sorted(self.engines)[number % len(self.engines)] if self.engines else NAMES[number]

    @initialize()
    def begin(self) -> None:
        for name in NAMES[:2]:
            self.join(name, 1000)
            self.take_snapshot(name)

    @precondition(lambda self: len(self.engines) < len(NAMES))
    @rule(data=st.data(), capacity=st.sampled_from([1, 2, 1000]))
    def join_another(self, data: st.DataObject, capacity: int) -> None:
        self.join(data.draw(st.sampled_from([name for name in NAMES if name not in self.engines])), capacity)

    def join(self, name: str, capacity: int) -> None:
        self.epoch += 1
        events = KvEvents(self.epoch)
        self.engines[name] = Engine(events, events.subscribe(capacity))
        self.obey(self.router.joined(name))
        assert name in self.wanted

    @rule(number=numbers)
    def leave_one(self, number: int) -> None:
        self.leave(self.name(number))

    def leave(self, name: str) -> None:
        engine = self.engines.pop(name, None)
        again = self.router.left(name)
        assert again == [RouteAgain(request) for request in (engine.requests if engine else ())]
        self.wanted.discard(name)

    @rule(number=numbers)
    def drain(self, number: int) -> None:
        name = self.name(number)
        self.router.draining(name)
        if name in self.engines:
            self.engines[name].drains = True

    @rule(number=numbers, digests=some_digests, tier=st.sampled_from(TIERS), known=st.sampled_from(FATES))
    def store(self, number: int, digests: list[bytes], tier: str, known: str) -> None:
        name = self.name(number)
        if engine := self.engines.get(name):
            engine.events.stored(digests, bytes(32), tier)
            engine.truth[tier].update(digests)
            self.tell(name, known)

    @rule(number=numbers, digests=some_digests, tier=st.sampled_from(TIERS), known=st.sampled_from(FATES))
    def remove(self, number: int, digests: list[bytes], tier: str, known: str) -> None:
        name = self.name(number)
        if engine := self.engines.get(name):
            engine.events.removed(digests, tier)
            engine.truth[tier].difference_update(digests)
            self.tell(name, known)

    @rule(number=numbers, tier=st.sampled_from([*TIERS, None]))
    def clear(self, number: int, tier: str | None) -> None:
        name = self.name(number)
        if engine := self.engines.get(name):
            engine.events.cleared(tier)
            engine.events.flush()
            for each in TIERS if tier is None else (tier,):
                engine.truth[each].clear()

    @rule(number=numbers)
    def restart(self, number: int) -> None:
        """The engine's shards are started again: a new epoch, with nothing held."""
        name = self.name(number)
        if engine := self.engines.get(name):
            self.epoch += 1
            engine.events.new_epoch(self.epoch)
            engine.truth = {tier: set() for tier in TIERS}

    def tell(self, name: str, known: str) -> None:
        engine = self.engines[name]
        if known != "noted":
            engine.events.flush()
        while known == "read" and (data := engine.subscription.get(0)) is not None:
            self.obey(self.router.kv_message(name, decode_events(data)))

    @rule(number=numbers, is_lost=st.booleans())
    def deliver(self, number: int, is_lost: bool) -> None:
        name = self.name(number)
        if (engine := self.engines.get(name)) and (data := engine.subscription.get(0)) and not is_lost:
            self.obey(self.router.kv_message(name, decode_events(data)))

    @precondition(lambda self: self.wanted)
    @rule(data=st.data())
    def snapshot(self, data: st.DataObject) -> None:
        self.take_snapshot(data.draw(st.sampled_from(sorted(self.wanted))))

    def take_snapshot(self, name: str) -> None:
        self.wanted.remove(name)
        self.obey(self.router.kv_snapshot(name, decode_snapshot(self.engines[name].events.snapshot())))

    @rule(chain=st.sampled_from(CHAINS), length=st.integers(0, 4), tail=st.integers(0, 9))
    def route(self, chain: list[bytes], length: int, tail: int) -> None:
        tokens = max(1, length * SIZE + tail)
        self.count += 1
        parts = {name: self.router._replicas[name].blocks for name in self.engines}
        known = {
            name: next(
                (i for i, digest in enumerate(chain[:length]) if digest not in part._held | part._coming), length
            )
            for name, part in parts.items()
        }
        missing = {
            name: [digest for digest in chain[:length] if not part.holds(digest)] for name, part in parts.items()
        }
        choice: Choice | None = self.router.route(f"{self.count}", chain[:length], tokens)
        if choice is None:
            assert all(engine.drains for engine in self.engines.values())
            return
        engine = self.engines[choice.replica]
        assert not engine.drains
        cached = min(known[choice.replica] * SIZE, tokens - 1)
        assert choice.cached_tokens == cached
        request = Request(choice.number, tokens - cached, missing[choice.replica])
        engine.requests[f"{self.count}"] = request

    def under_way(self) -> list[tuple[Engine, str]]:
        return [(engine, request) for engine in self.engines.values() for request in engine.requests]

    @precondition(lambda self: self.under_way())
    @rule(data=st.data(), fate=st.sampled_from(["first_token", "finished", "failed"]))
    def go_on(self, data: st.DataObject, fate: str) -> None:
        engine, request = data.draw(st.sampled_from(self.under_way()))
        getattr(self.router, fate)(request)
        if fate == "first_token":
            engine.requests[request].tokens, engine.requests[request].runs = 0, True
        else:
            del engine.requests[request]

    @rule(number=numbers, back=st.integers(0, 3), queued=st.integers(0, 60), running=st.integers(0, 4))
    def report(self, number: int, back: int, queued: int, running: int) -> None:
        name = self.name(number)
        received = max(0, self.router._number - back)
        self.router.load(name, LoadReport(received, queued, running, 0.001, 0.001))
        if engine := self.engines.get(name):
            mine = [one for one in engine.requests.values() if one.number <= received]
            too_many = sum(one.tokens for one in mine) - queued
            engine.other_tokens = max(0, -too_many)
            for one in mine:
                while one.tokens and too_many > 0:
                    one.tokens, too_many = one.tokens - 1, too_many - 1
            engine.other_running = max(0, running - sum(one.runs for one in engine.requests.values()))

    @rule(number=numbers)
    def settle_one(self, number: int) -> None:
        self.settle(self.name(number))

    def settle(self, name: str) -> None:
        """Every message is read, and every snapshot taken that is asked for: the router knows what is held."""
        engine = self.engines.get(name)
        if engine is None:
            return
        for note in (engine.events.stored, engine.events.removed):  # so that what was lost is noticed
            note([b"marker"], *((bytes(32),) if note == engine.events.stored else ()), "device")
        self.tell(name, "read")
        if name in self.wanted:
            self.take_snapshot(name)
        assert name not in self.wanted
        part = self.router._replicas[name].blocks
        assert not part.stale and set(part._held) == engine.held

    @invariant()
    def index_is_the_union_of_its_parts(self) -> None:
        expected: dict[bytes, int] = {}
        for name, engine in self.engines.items():
            replica = self.router._replicas[name]
            coming = {digest for request in engine.requests.values() for digest in request.expected}
            assert set(replica.blocks._coming) == coming
            for digest in replica.blocks._held.keys() | coming:
                expected[digest] = expected.get(digest, 0) | 1 << replica.slot
        assert self.router._index._slots == expected

    @invariant()
    def books_are_right(self) -> None:
        stats = self.router.stats()
        engines = self.engines.values()
        assert stats["requests"] == len(self.under_way()) == len(self.router._requests)
        assert {name for name, replica in self.router._replicas.items() if replica.blocks.stale} <= self.wanted
        for name, engine in self.engines.items():
            queued = engine.other_tokens + sum(one.tokens for one in engine.requests.values())
            running = engine.other_running + sum(one.runs for one in engine.requests.values())
            assert self.router._loads.of(self.router._replicas[name].slot) == (queued, running)
        assert stats["draining"] == sum(engine.drains for engine in engines)

    def teardown(self) -> None:
        """In the end nothing is left of anybody."""
        for _, request in self.under_way():
            self.router.finished(request)
        for name, engine in self.engines.items():
            engine.requests.clear()
            self.settle(name)
            self.router.load(name, LoadReport(self.count, 0, 0))
        stats = self.router.stats()
        assert stats["queued_tokens"] == stats["running"] == stats["requests"] == 0
        held = [engine.held for engine in self.engines.values()]
        assert stats["held"] == sum(map(len, held)) and set(self.router._index._slots) == set().union(*held)
        for name in [*self.engines]:
            self.leave(name)
        assert set(self.router.stats().values()) == {0}


TestRouterMachine = RouterMachine.TestCase
TestRouterMachine.settings = examples(300, stateful_step_count=50)
