"""KV events: a reader's picture is the engine's, whenever it starts and however far it falls behind."""

from __future__ import annotations

import contextlib
import queue
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from headwise.runtime.kv import events as events_module
from headwise.runtime.kv.events import (
    TIERS,
    Cleared,
    KvEvents,
    KvMessage,
    Removed,
    Stored,
    Subscription,
    decode_events,
    decode_snapshot,
)
from headwise.workers.kv.transfer import Tier
from tests.effort import examples

Blocks = dict[str, dict[bytes, bytes]]
ROOT = b"root"
DIGESTS = [bytes([number]) * 2 for number in range(12)]


class Mirror:
    """What a router does: subscribe, take a snapshot, apply later messages, start over when told or when one lacks."""

    def __init__(self, subscription: Subscription, snapshot: Callable[[], bytes]) -> None:
        self.subscription, self._snapshot, self.num_snapshots = subscription, snapshot, 0
        self.start_over()

    def start_over(self) -> None:
        state = decode_snapshot(self._snapshot())
        for pairs in state.blocks.values():
            orders = {digest: index for index, digest in enumerate(pairs)}
            for digest, parent in pairs.items():
                assert orders.get(parent, -1) < orders[digest]
        self.at, self.blocks = (state.epoch, state.sequence), state.blocks
        self.num_snapshots += 1

    def read(self) -> None:
        """All that waits."""
        while (data := self.subscription.get(0)) is not None:
            self.take(decode_events(data))

    def take(self, message: KvMessage) -> None:
        if (message.epoch, message.sequence) <= self.at:
            return
        following = (self.at[0], self.at[1] + 1)
        if message.resnapshot or ((message.epoch, message.sequence) != following and message.sequence != 0):
            self.start_over()
            return
        self.at = message.epoch, message.sequence
        for event in message.events:
            match event:
                case Stored(tier, digests, parent):
                    self.blocks[tier] |= dict(zip(digests, (parent, *digests), strict=False))
                case Removed(tier, digests):
                    for digest in digests:
                        self.blocks[tier].pop(digest, None)
                case Cleared(tier):
                    for name in TIERS if tier is None else (tier,):
                        self.blocks[name].clear()


class EventsMachine(RuleBasedStateMachine):
    """Changes at random beside plain dicts, with readers that begin at any time and read when they like."""

    def __init__(self) -> None:
        super().__init__()
        self.events = KvEvents(epoch=1)
        self.truth: Blocks = {tier: {} for tier in TIERS}
        self.mirrors: list[Mirror] = []

    @rule(
        chain=st.lists(st.sampled_from(DIGESTS), max_size=4, unique=True),
        parent=st.sampled_from([ROOT, *DIGESTS]),
        tier=st.sampled_from(TIERS),
    )
    def store(self, chain: list[bytes], parent: bytes, tier: str) -> None:
        # Parents come before their children only where none is its own ancestor, as among digests of SHA-256.
        for digest in chain:
            if DIGESTS.index(digest) > (DIGESTS.index(parent) if parent in DIGESTS else -1):
                self.events.stored([digest], parent, tier)
                self.truth[tier][digest] = parent
                parent = digest

    @rule(start=st.integers(0, 8), length=st.integers(1, 4), tier=st.sampled_from(TIERS))
    def store_run(self, start: int, length: int, tier: str) -> None:
        run = DIGESTS[start : start + length]
        parent = DIGESTS[start - 1] if start else ROOT
        self.events.stored(run, parent, tier)
        for digest in run:
            self.truth[tier][digest], parent = parent, digest

    @rule(digests=st.lists(st.sampled_from(DIGESTS), max_size=4), tier=st.sampled_from(TIERS))
    def remove(self, digests: list[bytes], tier: str) -> None:
        self.events.removed(digests, tier)
        for digest in digests:
            self.truth[tier].pop(digest, None)

    @rule(tier=st.sampled_from([*TIERS, None]))
    def clear(self, tier: str | None) -> None:
        self.events.cleared(tier)
        for name in TIERS if tier is None else (tier,):
            self.truth[name] = {}

    @rule()
    def begin_epoch(self) -> None:
        self.events.new_epoch(self.events.epoch + 1)
        assert self.events.sequence == 0
        self.truth = {tier: {} for tier in TIERS}

    @rule()
    def flush(self) -> None:
        self.events.flush()

    @rule(capacity=st.sampled_from([1, 2, 3, 1000]))
    def begin_reading(self, capacity: int) -> None:
        if len(self.mirrors) < 4:
            self.mirrors.append(Mirror(self.events.subscribe(capacity), self.events.snapshot))

    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        if self.mirrors:
            data.draw(st.sampled_from(self.mirrors)).read()

    @rule(data=st.data())
    def stop_reading(self, data: st.DataObject) -> None:
        if self.mirrors:
            mirror = data.draw(st.sampled_from(self.mirrors))
            mirror.subscription.close()
            self.mirrors.remove(mirror)

    def teardown(self) -> None:
        self.events.flush()
        for mirror in self.mirrors:
            mirror.read()
            assert mirror.blocks == self.truth
            assert mirror.at == (self.events.epoch, self.events.sequence)
        assert decode_snapshot(self.events.snapshot()).blocks == self.truth


EventsMachine.TestCase.settings = examples(150, stateful_step_count=50)
TestEvents = EventsMachine.TestCase


@pytest.mark.parametrize("capacity", [1, 3, 1024])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_reader_on_another_thread_ends_with_the_engines_state(capacity: int, seed: int) -> None:
    """Snapshots are taken on the engine's thread between two calls, also in the middle of a step."""
    rng = random.Random(seed)
    events = KvEvents(epoch=1)
    asked: queue.SimpleQueue[Future[bytes]] = queue.SimpleQueue()
    started, ended = threading.Event(), threading.Event()
    found: list[Mirror] = []

    def ask() -> bytes:
        future: Future[bytes] = Future()
        asked.put(future)
        return future.result(20)

    def read(subscription: Subscription) -> None:
        mirror = Mirror(subscription, ask)
        started.set()
        while not ended.is_set():
            if (data := subscription.get(0.001)) is not None:
                mirror.take(decode_events(data))
        mirror.read()
        found.append(mirror)

    def answer() -> None:
        while not asked.empty():
            asked.get().set_result(events.snapshot())

    subscription = events.subscribe(capacity)
    reader = threading.Thread(target=read, args=[subscription], daemon=True)
    reader.start()
    deadline = time.monotonic() + 20
    while not started.is_set():
        assert time.monotonic() < deadline
        answer()
    for _ in range(3000):
        _change(events, rng)
        answer()
    events.flush()
    ended.set()
    while reader.is_alive():
        assert time.monotonic() < deadline
        answer()
        reader.join(0.001)
    [mirror] = found
    state = decode_snapshot(events.snapshot())
    assert mirror.blocks == state.blocks and mirror.at == (state.epoch, state.sequence)
    assert any(state.blocks.values())
    assert mirror.num_snapshots > 1 if capacity == 1 else mirror.num_snapshots == 1 or capacity == 3


def _change(events: KvEvents, rng: random.Random) -> None:
    tier, start = rng.choice(TIERS), rng.randrange(8)
    kind = rng.random()
    if kind < 0.55:
        run = DIGESTS[start : start + rng.randint(1, 4)]
        events.stored(run, DIGESTS[start - 1] if start else ROOT, tier)
    elif kind < 0.8:
        events.removed(rng.sample(DIGESTS, 2), tier)
    elif kind < 0.81:
        events.cleared(rng.choice([*TIERS, None]))
    elif kind < 0.815:
        events.new_epoch(events.epoch + 1)
    else:
        events.flush()


def test_a_step_is_one_message_and_nothing_is_none() -> None:
    events = KvEvents(epoch=7)
    subscription = events.subscribe()
    events.flush()
    assert subscription.get(0) is None and events.sequence == 0
    events.stored([b"a", b"b"], ROOT, "device")
    events.stored([b"c"], b"b", "device")
    events.stored([b"x"], ROOT, "device")
    events.stored([], b"x", "device")
    events.removed([b"b"], Tier.HOST)
    events.removed([b"a"], Tier.HOST)
    events.cleared("disk")
    assert subscription.get(0) is None
    events.flush()
    data = subscription.get(0)
    assert data is not None and subscription.get(0) is None
    assert msgpack.unpackb(data) == {
        "epoch": 7,
        "sequence": 1,
        "events": [
            {"type": "stored", "tier": "device", "digests": [b"a", b"b", b"c"], "parent": ROOT},
            {"type": "stored", "tier": "device", "digests": [b"x"], "parent": ROOT},
            {"type": "removed", "tier": "host", "digests": [b"b", b"a"]},
            {"type": "cleared", "tier": "disk"},
        ],
    }
    assert decode_events(data) == KvMessage(
        7,
        1,
        (
            Stored("device", (b"a", b"b", b"c"), ROOT),
            Stored("device", (b"x",), ROOT),
            Removed("host", (b"b", b"a")),
            Cleared("disk"),
        ),
    )


def test_messages_are_numbered_while_nobody_listens() -> None:
    events = KvEvents(epoch=1)
    for count in range(1, 4):
        events.removed([b"gone"], "device")
        events.flush()
        assert events.sequence == count


def test_a_subscriber_gets_nothing_of_what_was_before() -> None:
    events = KvEvents(epoch=1)
    early = events.subscribe()
    events.stored([b"a"], ROOT, "device")
    late = events.subscribe()
    assert early.get(0) is not None and late.get(0) is None
    events.stored([b"b"], b"a", "device")
    events.flush()
    data = late.get(0)
    assert data is not None and decode_events(data).events == (Stored("device", (b"b",), b"a"),)


def test_a_new_epoch_is_told_at_once_and_must_be_later() -> None:
    events = KvEvents(epoch=3)
    subscription = events.subscribe()
    events.stored([b"a"], ROOT, "device")
    events.new_epoch(4)
    data = subscription.get(0)
    assert data is not None and decode_events(data) == KvMessage(4, 0, (Cleared(None),))
    assert subscription.get(0) is None
    with pytest.raises(ValueError, match="epoch=4: must be more than the present 4"):
        events.new_epoch(4)
    events.stored([b"b"], ROOT, "device")
    events.flush()
    data = subscription.get(0)
    assert data is not None and decode_events(data).sequence == 1


def test_a_subscriber_that_falls_behind_is_told_and_goes_on() -> None:
    events = KvEvents(epoch=1)
    slow, quick = events.subscribe(capacity=2), events.subscribe()
    for number in range(4):
        events.stored([bytes([number])], ROOT, "device")
        events.flush()
    assert [decode_events(data) for data in _waiting(slow)] == [
        KvMessage(1, 3, resnapshot=True),
        KvMessage(1, 4, (Stored("device", (b"\3",), ROOT),)),
    ]
    assert [decode_events(data).sequence for data in _waiting(quick)] == [1, 2, 3, 4]


def test_a_message_that_would_be_too_large_is_a_snapshot_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "MAX_MESSAGE_BYTES", 1000)
    events = KvEvents(epoch=1)
    subscription = events.subscribe()
    events.stored([bytes(32)] * 40, ROOT, "device")
    events.flush()
    [data] = _waiting(subscription)
    assert decode_events(data) == KvMessage(1, 1, resnapshot=True)


def test_a_snapshot_lists_parents_first_though_children_came_first() -> None:
    events = KvEvents(epoch=1)
    for digest, parent in ((b"c", b"b"), (b"z", b"y"), (b"b", b"a"), (b"a", ROOT), (b"d", b"c")):
        events.stored([digest], parent, "host")
    blocks = decode_snapshot(events.snapshot()).blocks["host"]
    assert [*blocks.items()] == [(b"a", ROOT), (b"b", b"a"), (b"c", b"b"), (b"z", b"y"), (b"d", b"c")]
    events.stored([b"p", b"q"], b"q", "disk")  # digests that collide: it only has to end
    assert decode_snapshot(events.snapshot()).blocks["disk"] == {b"p": b"q", b"q": b"p"}


def test_a_closed_subscription_ends_who_waits_and_who_iterates() -> None:
    events = KvEvents(epoch=1)
    got: list[bytes | None] = []
    with events.subscribe() as waiting, events.subscribe() as iterating:
        threads = [
            threading.Thread(target=lambda: got.append(waiting.get(None)), daemon=True),
            threading.Thread(target=lambda: got.extend(iterating), daemon=True),
        ]
        for thread in threads:
            thread.start()
        waiting.close()
        waiting.close()
        events.close()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
    assert got == [None]
    events.cleared()
    events.flush()
    assert iterating.get(0) is None and list(iterating) == []


def test_waiting_ends_in_time() -> None:
    started = time.monotonic()
    assert KvEvents(epoch=1).subscribe().get(0.05) is None
    assert 0.05 <= time.monotonic() - started < 5


def test_a_capacity_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity=0: must be an int, at least 1"):
        KvEvents(epoch=1).subscribe(0)


GOOD: dict[str, Any] = {
    "epoch": 1,
    "sequence": 2,
    "events": [{"type": "stored", "tier": "device", "digests": [b"a"], "parent": b""}],
}


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": -1},
        {"epoch": True},
        {"epoch": "1"},
        {"sequence": None},
        {"resnapshot": True},
        {"other": 1},
        {"events": 5},
        {"events": [5]},
        {"events": ["stored"]},
        {"events": [{"type": "stored", "tier": "device", "digests": [b"a"]}]},
        {"events": [{"type": "stored", "tier": "tape", "digests": [b"a"], "parent": b""}]},
        {"events": [{"type": "stored", "tier": "device", "digests": [7], "parent": b""}]},
        {"events": [{"type": "stored", "tier": "device", "digests": [b"a"], "parent": "root"}]},
        {"events": [{"type": "stored", "tier": "device", "digests": [bytes(65)], "parent": b""}]},
        {"events": [{"type": "removed", "tier": "device", "digests": b"a"}]},
        {"events": [{"type": "removed", "tier": "device", "digests": [b"a"], "parent": b""}]},
        {"events": [{"type": "removed", "tier": ["device"], "digests": [b"a"]}]},
        {"events": [{"type": "cleared", "tier": "tape"}]},
        {"events": [{"type": "sold", "tier": "device"}]},
        {"events": [{"type": ["stored"], "tier": "device"}]},
    ],
)
def test_a_foreign_message_is_refused(changes: dict[str, Any]) -> None:
    assert decode_events(msgpack.packb(GOOD)).events == (Stored("device", (b"a",), b""),)
    with pytest.raises(ValueError):
        decode_events(msgpack.packb(GOOD | changes))


@pytest.mark.parametrize(
    "message",
    [
        {"epoch": 1, "sequence": 1},
        {"epoch": 1, "sequence": 1, "blocks": []},
        {"epoch": 1, "sequence": 1, "blocks": {"device": []}},
        {"epoch": 1, "sequence": 1, "blocks": {"device": [[b"a"]], "host": [], "disk": []}},
        {"epoch": 1, "sequence": 1, "blocks": {"device": [[b"a", 1]], "host": [], "disk": []}},
        {"epoch": 1, "sequence": 1, "blocks": {"device": None, "host": [], "disk": []}},
        GOOD,
    ],
)
def test_a_foreign_snapshot_is_refused(message: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        decode_snapshot(msgpack.packb(message))


def test_a_message_over_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "MAX_MESSAGE_BYTES", 20)
    with pytest.raises(ValueError, match="over the limit of 20"):
        decode_events(msgpack.packb(GOOD))


@examples(300)
@given(data=st.binary(max_size=60), at=st.integers(0, 80), cut=st.integers(0, 80))
def test_any_bytes_are_a_message_or_a_value_error(data: bytes, at: int, cut: int) -> None:
    good = msgpack.packb(GOOD)
    for foreign in (data, good[:at] + data + good[cut:]):
        for decode in (decode_events, decode_snapshot):
            with contextlib.suppress(ValueError):
                decode(foreign)


def _waiting(subscription: Subscription) -> list[bytes]:
    found = []
    while (data := subscription.get(0)) is not None:
        found.append(data)
    return found
