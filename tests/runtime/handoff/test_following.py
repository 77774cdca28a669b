"""What a peer holds is followed while the peer tells it, and not known otherwise."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.runtime.handoff import following as following_module
from headwise.runtime.handoff import link as link_module
from headwise.runtime.handoff.following import Following
from headwise.runtime.handoff.link import PrefillLink
from headwise.runtime.handoff.service import HandoffService
from headwise.runtime.kv.events import TIERS, KvEvents
from headwise.v1 import inference_pb2 as pb
from headwise.v1.inference_pb2_grpc import InferenceServiceServicer
from tests.effort import examples
from tests.runtime.handoff.conftest import TcpServer, wait_until

ROOT = bytes(32)


def digests(*names: str) -> list[bytes]:
    return [name.encode().ljust(32) for name in names]


def snapshot(events: KvEvents) -> pb.SubscribeKvEventsResponse:
    return pb.SubscribeKvEventsResponse(snapshot=events.snapshot())


class Telling(InferenceServiceServicer):
    """Tells KV events as a server does. Each call that begins is counted."""

    def __init__(self) -> None:
        self.events = KvEvents(3)
        self.refusal: grpc.StatusCode | None = None
        self.rubbish: list[pb.SubscribeKvEventsResponse] = []
        self.num_calls = 0
        self.over = threading.Event()
        self._lock = threading.Lock()  # in place of the engine's thread

    @contextmanager
    def happening(self) -> Iterator[KvEvents]:
        """What the block notes is told."""
        with self._lock:
            yield self.events
            self.events.flush()

    def SubscribeKvEvents(
        self, request: pb.SubscribeKvEventsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.SubscribeKvEventsResponse]:
        self.num_calls += 1
        if self.refusal is not None:
            context.abort(self.refusal, "not for you")
        with self._lock:
            messages, first = self.events.subscribe(), snapshot(self.events)
        with messages:
            yield first
            yield from self.rubbish
            while context.is_active() and not self.over.is_set():
                if (data := messages.get(0.01)) is None:
                    continue
                yield pb.SubscribeKvEventsResponse(events=data)


@pytest.fixture
def telling(monkeypatch: pytest.MonkeyPatch) -> Telling:
    monkeypatch.setattr(link_module, "RENEW_S", 0.03)
    return Telling()


@pytest.fixture
def following(
    telling: Telling, service: HandoffService, serve: Callable[..., TcpServer], link: Callable[..., PrefillLink]
) -> Iterator[PrefillLink]:
    server = serve(service, inference=telling)
    yield link(server.address)
    telling.over.set()


def test_blocks_are_known_while_they_are_there(telling: Telling, following: PrefillLink) -> None:
    a, b, c, d = digests("a", "b", "c", "d")
    with telling.happening() as events:
        events.stored([a, b], ROOT, "device")
    wait_until(lambda: following.digests == {a, b})
    with telling.happening() as events:
        events.stored([a, c], ROOT, "host")
        events.removed([a, b], "device")
    wait_until(lambda: following.digests == {a, c})
    with telling.happening() as events:
        events.stored([d], ROOT, "device")
    wait_until(lambda: following.digests == {a, c, d})
    with telling.happening() as events:
        events.cleared("host")
    wait_until(lambda: following.digests == {d})
    with telling.happening() as events:
        events.new_epoch(4)
    wait_until(lambda: not following.digests)
    with telling.happening() as events:
        events.stored([c], ROOT, "disk")
    wait_until(lambda: following.digests == {c})
    assert telling.num_calls == 1


def test_a_peer_that_tells_of_ever_more_blocks_is_followed_no_further(
    telling: Telling, following: PrefillLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following_module, "MAX_BLOCKS", 2)
    wait_until(lambda: telling.num_calls)
    with telling.happening() as events:
        events.stored(digests("a", "b"), ROOT, "device")
    wait_until(lambda: len(following.digests) == 2)
    with telling.happening() as events:
        events.stored(digests("c"), ROOT, "device")
    wait_until(lambda: not following.digests)
    renewed = following._wake
    for _ in range(3):  # each has it look again
        renewed.set()
        wait_until(lambda: not renewed.is_set())
    assert following.session is not None and telling.num_calls == 1


@pytest.mark.parametrize("code", [grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED])
def test_a_peer_that_tells_nothing_is_asked_once(
    telling: Telling, following: PrefillLink, engine: Any, code: grpc.StatusCode
) -> None:
    telling.refusal = code
    wait_until(lambda: telling.num_calls)
    wait_until(lambda: following.session)
    before = following.load
    engine.asks["any"] = None
    wait_until(lambda: following.load != before)  # renewed since
    assert telling.num_calls == 1 and not following.digests


@pytest.fixture
def refused(telling: Telling) -> None:
    telling.refusal = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.usefixtures("refused")
def test_a_peer_with_too_many_who_follow_is_asked_again(telling: Telling, following: PrefillLink) -> None:
    wait_until(lambda: telling.num_calls >= 3)
    assert following.session is not None
    with telling.happening() as events:
        events.stored(digests("a"), ROOT, "device")
    telling.refusal = None
    wait_until(lambda: following.digests == {*digests("a")})


@pytest.fixture
def rubbish(telling: Telling, request: pytest.FixtureRequest) -> None:
    telling.events.stored(digests("a"), ROOT, "device")
    telling.rubbish = [request.param]


def numbered(number: int, epoch: int = 3) -> pb.SubscribeKvEventsResponse:
    """A message of that number, from somebody else."""
    events = KvEvents(epoch)
    with events.subscribe() as messages:
        for name in range(number):
            events.stored(digests(str(name)), ROOT, "device")
            events.flush()
        return pb.SubscribeKvEventsResponse(events=[*iter(lambda: messages.get(0), None)][-1])


@pytest.mark.parametrize(
    "rubbish",
    [
        pb.SubscribeKvEventsResponse(events=b"\xc1"),
        pb.SubscribeKvEventsResponse(snapshot=b"\x80"),
        pb.SubscribeKvEventsResponse(),
        numbered(5),
        numbered(5, epoch=4),
    ],
    ids=["events", "snapshot", "empty", "a gap", "a gap of another epoch"],
    indirect=True,
)
@pytest.mark.usefixtures("rubbish")
def test_what_cannot_be_followed_is_begun_anew(telling: Telling, following: PrefillLink) -> None:
    wait_until(lambda: telling.num_calls >= 3)
    assert following.session is not None
    telling.rubbish = []
    wait_until(lambda: following.digests == {*digests("a")})


def test_nothing_is_known_of_a_peer_that_is_lost(telling: Telling, following: PrefillLink) -> None:
    with telling.happening() as events:
        events.stored(digests("a"), ROOT, "device")
    wait_until(lambda: following.digests)
    following.close()
    assert not following.digests


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["stored", "removed", "cleared", "flush"]), st.sampled_from(TIERS), st.integers(0, 5)
        ),
        max_size=30,
    )
)
@examples(200)
def test_any_story_ends_with_what_is_there(steps: list[tuple[str, str, int]]) -> None:
    events = KvEvents(3)
    events.stored(digests("0", "1"), ROOT, "host")
    with grpc.insecure_channel("127.0.0.1:1") as channel, events.subscribe() as messages:
        following = Following(channel, [], "nobody", lambda: None)
        told = [snapshot(events)]
        for kind, tier, number in steps:
            if kind == "stored":
                events.stored(digests(str(number)), ROOT, tier)
            elif kind == "removed":
                events.removed(digests(str(number)), tier)
            elif kind == "cleared":
                events.cleared(tier if number else None)
            else:
                events.flush()
        events.flush()
        told += [pb.SubscribeKvEventsResponse(events=data) for data in iter(lambda: messages.get(0), None)]
    following._follow(iter(told))
    assert following.digests == {digest for blocks in events._blocks.values() for digest in blocks}
