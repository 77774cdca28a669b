"""Inbound: whom it asks, and what becomes of a request when that goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from headwise.runtime.engine.loop import EngineLoop
from headwise.runtime.engine.suspects import ALONE_AFTER
from headwise.runtime.handoff import inbound as inbound_module
from headwise.runtime.handoff import outbound as outbound_module
from headwise.runtime.handoff.errors import RefusedError
from headwise.runtime.handoff.inbound import Inbound, LocalLoad
from headwise.runtime.handoff.messages import Ask, HelloAnswer, Load, TransferKey
from headwise.runtime.output import FinishReason
from tests.plain_group import BLOCK, IDENTITY, alone, make_request
from tests.runtime.handoff.engines import DECODE_EPOCH, PREFILL_EPOCH, FakeLink, Pair
from tests.runtime.handoff.engines import IDENTITY as WIRE

PROMPT = [*range(12), 0]
DEADLINE_S = 10.0
BLOCKS = IDENTITY.token_blocks(PROMPT)


class Known(FakeLink):
    """A prefill engine of which only this is known."""

    def __init__(self, pair: Pair, name: str, load: Load, held: int = 0, max_tokens: int = 1 << 16) -> None:
        super().__init__(pair.link.outbound, pair.chance, 0.0, name=name, digests=frozenset(BLOCKS.digests[:held]))
        self._load = load
        self.session = HelloAnswer(WIRE, PREFILL_EPOCH, [(0, 1)], max_tokens, 64)

    @property
    def load(self) -> Load:
        return self._load


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    pair = Pair(1, 0.0, (30, 30))
    monkeypatch.setattr(inbound_module, "time", pair.clock)
    monkeypatch.setattr(outbound_module, "time", pair.clock)
    yield pair
    pair.settle()
    pair.check_idle()


def inbound_of(pair: Pair) -> Inbound:
    assert pair.decode.inbound is not None
    return pair.decode.inbound


def chosen(pair: Pair, *peers: Known) -> str | None:
    inbound = inbound_of(pair)
    inbound.peers = peers
    found = inbound.choose(BLOCKS, len(PROMPT), 0, 3, LocalLoad())
    return found.peer.name if found is not None else None


def test_the_peer_that_will_be_done_first_is_asked(pair: Pair) -> None:
    assert chosen(pair, Known(pair, "busy", Load(500, 0.01)), Known(pair, "idle", Load(0, 0.01))) == "idle"
    assert chosen(pair, Known(pair, "fast", Load(500, 0.001)), Known(pair, "slow", Load(0, 0.1))) == "fast"


def test_what_a_peer_holds_need_not_be_computed(pair: Pair) -> None:
    assert chosen(pair, Known(pair, "empty", Load(0, 0.01)), Known(pair, "warm", Load(2, 0.01), held=2)) == "warm"


def test_a_peer_that_is_away_or_takes_no_such_prompt_is_not_asked(pair: Pair) -> None:
    away, small = Known(pair, "away", Load()), Known(pair, "small", Load(), max_tokens=11)
    away.session = None
    assert chosen(pair, away, small) is None
    assert chosen(pair, away, small, Known(pair, "one", Load(1000, 1.0))) == "one"


def test_prompts_that_were_asked_for_just_now_count(pair: Pair) -> None:
    """Of eight prompts at once not all go to one of two peers that were idle before the first."""
    inbound = inbound_of(pair)
    peers = [Known(pair, "a", Load(0, 0.01)), Known(pair, "b", Load(0, 0.01))]
    inbound.peers = peers
    requests = [make_request(str(number), [number] * 9, 1) for number in range(2)]
    for request in requests:
        pair.decode.add(request)
    pair.settle()
    assert {request.metrics.prefilled_by for request in requests} == {"a", "b"}


def test_a_prompt_without_a_full_block_stays_here(pair: Pair) -> None:
    request = make_request("short", [1] * BLOCK, 2)
    pair.decode.add(request)
    pair.settle()
    assert (request.metrics.prefilled_by, request.generated) == (None, alone(request)[0])
    assert inbound_of(pair).stats()["started"] == 0


@pytest.mark.parametrize("other_epoch", [False, True])
def test_a_peer_that_is_gone_is_not_waited_for(pair: Pair, other_epoch: bool) -> None:
    request, before = make_request("long", PROMPT, 3), pair.clock.now
    pair.decode.add(request)
    for _ in range(200):
        pair.move()
        if pair.outbound.stats()["accepted"]:
            break
    assert pair.link.session is not None
    pair.link.session = replace(pair.link.session, epoch=PREFILL_EPOCH + 1) if other_epoch else None
    pair.settle()
    assert request.generated == alone(request)[0] and request.metrics.prefilled_by is None
    assert inbound_of(pair).stats()["causes"]["lease"] == 0 and pair.clock.now < before + 200


def test_a_request_that_must_not_be_computed_here_fails_with_the_cause(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    """The operator may know more of the engines behind this one than a client."""
    caplog.set_level("INFO")
    inbound = inbound_of(pair)
    inbound.must_succeed = True
    pair.link.session = replace(HelloAnswer(WIRE, 0, [(0, 1)], 1 << 16, 64), epoch=PREFILL_EPOCH + 1)
    request, neighbour = make_request("long", PROMPT, 3), make_request("short", [1, 2], 3)
    pair.decode.add(request)
    pair.decode.add(neighbour)
    pair.settle()
    assert pair.decode.ended[request.key] is FinishReason.ERROR and request.generated == []
    assert request.error == "another engine was to compute its prompt, and did not: refused"
    assert "a handoff from prefill failed: refused: prefill_epoch=" in caplog.text
    assert pair.decode.ended[neighbour.key] is FinishReason.LENGTH


def test_reserved_blocks_leave_room_for_a_request(pair: Pair) -> None:
    """22 blocks may be reserved; each prompt takes 7."""
    requests = [make_request(str(number), [number] * 29, 1) for number in range(6)]
    for request in requests:
        pair.decode.add(request)
    most = 0
    for _ in range(4000):
        if not pair.has_work:
            break
        pair.move()
        most = max(most, inbound_of(pair).stats()["reserved_blocks"])
    assert 7 <= most <= 22
    assert all(request.generated == alone(request)[0] for request in requests)


def test_a_peer_that_fails_is_given_up_for_the_other(pair: Pair) -> None:
    """Known to be fast, it would be asked for ever."""
    inbound = inbound_of(pair)
    broken, sound = Known(pair, "broken", Load(0, 0.001)), Known(pair, "sound", Load(0, 0.5))
    assert broken.session is not None
    broken.session = replace(broken.session, epoch=PREFILL_EPOCH + 1)  # what it is asked, it refuses
    inbound.peers = [broken, sound]
    inbound.cost.saw_prefill(1, 1.0)
    requests = [make_request(str(number), [number] * 9, 1) for number in range(4)]
    for request in requests:
        pair.decode.add(request)
        pair.settle()
    assert [request.metrics.prefilled_by for request in requests] == [None, "sound", "sound", "sound"]
    assert inbound.stats()["causes"]["refused"] == 1


def test_a_long_prompt_is_not_kept_waiting_for_room_by_shorter_ones(pair: Pair) -> None:
    """22 blocks may be reserved: the first two prompts take 14, the next needs 20, those after it 2."""
    first = [make_request(f"first-{number}", [number] * 29, 1) for number in range(2)]
    long = make_request("long", [5] * 81, 1)
    short = [make_request(f"short-{number}", [number + 6] * 9, 1) for number in range(10)]
    started: list[str] = []
    inbound, start = inbound_of(pair), inbound_of(pair).start

    def note(chosen: Any, blocks: Any, *rest: Any) -> Any:
        started.append(str(blocks.tokens(1)[0]))
        return start(chosen, blocks, *rest)

    inbound.start = note  # type: ignore[method-assign]
    for request in [*first, long, *short]:
        pair.decode.add(request)
    pair.settle()
    assert started[:3] == ["0", "1", "5"]
    assert all(request.generated == alone(request)[0] for request in [*first, long, *short])


def test_a_prompt_that_waits_for_room_costs_next_to_nothing(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    inbound, choices = inbound_of(pair), 0
    choose = inbound.choose

    def count(*arguments: Any) -> Any:
        nonlocal choices
        choices += 1
        return choose(*arguments)

    monkeypatch.setattr(inbound, "choose", count)
    requests = [make_request(str(number), [number] * 29, 1) for number in range(6)]
    for request in requests:
        pair.decode.add(request)
    steps = 0
    while pair.decode.engine.has_work and steps < 4000:
        pair.move()
        steps += 1
    assert choices <= 4 * len(requests) < steps


def test_a_prompt_that_must_not_be_computed_here_is_not_where_no_peer_is_connected(pair: Pair) -> None:
    inbound = inbound_of(pair)
    inbound.must_succeed, pair.link.session, pair.link.problem = True, None, "UNAVAILABLE: refused"
    request, short = make_request("long", PROMPT, 3), make_request("short", [1, 2], 3)
    pair.decode.add(request)
    pair.decode.add(short)
    pair.settle()
    assert pair.decode.ended[request.key] is FinishReason.ERROR and request.generated == []
    assert request.error is not None and request.error.startswith("no engine that computes prompts can be reached")
    assert pair.decode.ended[short.key] is FinishReason.LENGTH


@pytest.mark.parametrize("must_succeed", [False, True])
def test_who_is_computed_alone_is_computed_here_if_that_is_allowed(pair: Pair, must_succeed: bool) -> None:
    """A group may die of the prompt, and so would that of prefill; and nobody else is computed meanwhile."""
    inbound_of(pair).must_succeed = must_succeed
    request = make_request("suspect", PROMPT, 3)
    for _ in range(ALONE_AFTER):
        pair.decode.engine._scheduler._suspects.died([request], False)
    pair.decode.add(request)
    pair.settle()
    assert request.generated == alone(request)[0]
    assert inbound_of(pair).stats()["started"] == must_succeed


def test_no_more_blocks_come_than_a_quota_lets_be_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(1, 0.0, (30, 30), quota=0.2)
    monkeypatch.setattr(inbound_module, "time", pair.clock)
    monkeypatch.setattr(outbound_module, "time", pair.clock)
    request = make_request("long", [*range(14)] * 3, 2)
    pair.decode.add(request)
    pair.settle()
    pair.check_idle()
    assert request.generated == alone(request)[0] and request.metrics.num_handoff_tokens == 6 * BLOCK
    stats = inbound_of(pair).stats()
    assert (stats["blocks"], stats["bytes"]) == (6, 6)  # a byte stands for a block


def test_a_peer_is_not_asked_for_more_than_it_takes(pair: Pair) -> None:
    assert pair.link.session is not None
    pair.link.session = replace(pair.link.session, max_transfers=2)
    requests = [make_request(str(number), [number] * 9, 1) for number in range(5)]
    for request in requests:
        pair.decode.add(request)
    pair.settle()
    assert [request.metrics.prefilled_by for request in requests] == ["prefill", "prefill", None, None, None]
    assert inbound_of(pair).stats()["fallbacks"] == 0


def test_an_engine_that_has_ended_leaves_its_peers(pair: Pair) -> None:
    """Else their leases would be renewed for prompts that nobody goes on from."""
    ended: list[BaseException] = []
    loop = EngineLoop(pair.decode.engine, ended.append)
    loop.post(lambda engine: 1 / 0)
    assert pair.link.closed.wait(DEADLINE_S) and ended
    loop.close()


def test_a_prefill_that_comes_again_may_tell_its_durations_anew(pair: Pair) -> None:
    key = TransferKey(bytes(16), 1, DECODE_EPOCH, PREFILL_EPOCH)
    ask = Ask(key, 1, bytes(32), [1] * 8, 0, bytes(32), b"", "", 60.0, 30.0)
    pair.outbound.accept(ask)
    pair.outbound.accept(replace(ask, deadline_s=59.0, lease_s=20.0))
    assert pair.outbound.stats()["accepted"] == 1
    with pytest.raises(RefusedError, match="another prompt"):
        pair.outbound.accept(replace(ask, token_ids=[2] * 8))
    pair.outbound.abort(key, "no more")
