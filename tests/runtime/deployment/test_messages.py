"""Messages come out of the codec as they went in, and what is none is a ValueError."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.runtime.deployment import messages
from headwise.runtime.deployment.messages import (
    Abort,
    Add,
    FirstToken,
    FrontMessage,
    KvEvents,
    KvSnapshot,
    Output,
    Pause,
    Peers,
    ReplicaMessage,
    Report,
    RequestDelta,
    ResetPrefixCache,
    SnapshotWanted,
    decode_front,
    decode_replica,
    encode,
)
from headwise.runtime.output import FinishReason
from headwise.workers import plan
from headwise.workers.plan import RowSampling, TokenLogprobs
from tests.effort import examples
from tests.workers.test_plan import samplings

counts = st.integers(0, 2**40)
tokens = st.integers(0, 2**31 - 1)
token_lists = st.lists(tokens, max_size=8)
seconds = st.floats(0, 1e9)
floats = st.floats(allow_nan=False)

adds = st.builds(
    Add,
    counts,
    st.lists(tokens, min_size=1, max_size=20),
    token_lists,
    samplings,
    counts,
    counts,
    token_lists.map(tuple),
    st.none() | st.binary(min_size=32, max_size=32),
    st.none() | st.binary(max_size=40),
    st.text(max_size=8),
    st.booleans(),
)
front_messages = st.one_of(
    adds,
    st.builds(Abort, counts),
    st.builds(Pause, counts, st.booleans()),
    st.just(SnapshotWanted()),
    st.just(ResetPrefixCache()),
    st.builds(Peers, st.lists(st.tuples(st.text(max_size=9), st.text(max_size=30)), max_size=3).map(tuple)),
)
logprobs = st.builds(TokenLogprobs, floats, counts, token_lists.map(tuple), st.lists(floats, max_size=4).map(tuple))
firsts = st.builds(FirstToken, counts, counts, counts, st.none() | st.text(max_size=9), seconds)


@st.composite
def deltas(draw: st.DrawFn) -> RequestDelta:
    token_ids = draw(token_lists)
    told = draw(st.none() | st.lists(logprobs, min_size=len(token_ids), max_size=len(token_ids)))
    reason, stop = draw(st.none() | st.sampled_from(FinishReason)), draw(st.none() | tokens)
    error, first = draw(st.none() | st.text(max_size=9)), draw(st.none() | firsts)
    return RequestDelta(draw(counts), token_ids, told, reason, stop, error, first)


reports = st.builds(
    Report,
    *[counts] * 4,
    st.none() | seconds,
    st.none() | seconds,
    st.booleans(),
    *[counts] * 3,
    st.none() | st.dictionaries(st.text(max_size=5), counts, max_size=3),
)
replica_messages = st.one_of(
    st.builds(Output, st.lists(deltas(), max_size=4)),
    reports,
    st.builds(KvEvents, st.binary(max_size=30)),
    st.builds(KvSnapshot, st.binary(max_size=30)),
)


@given(front_messages)
def test_what_the_front_says_comes_out_as_it_went_in(message: FrontMessage) -> None:
    assert decode_front(encode(message)) == message


@given(replica_messages)
def test_what_a_replica_says_comes_out_as_it_went_in(message: ReplicaMessage) -> None:
    assert decode_replica(encode(message)) == message


@given(front_messages, replica_messages)
def test_a_message_for_the_other_side_is_refused(to_replica: FrontMessage, to_front: ReplicaMessage) -> None:
    with pytest.raises(ValueError, match="no message for this side"):
        decode_replica(encode(to_replica))
    with pytest.raises(ValueError, match="no message for this side"):
        decode_front(encode(to_front))


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=14) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=20,
)


def packed(parts: tuple[int, list[Any]]) -> bytes:
    data: bytes = msgpack.packb([parts[0], *parts[1]])
    return data


@examples(200)
@given(st.binary(max_size=60) | st.tuples(st.integers(0, 20), st.lists(junk, max_size=12)).map(packed))
def test_junk_is_a_value_error_or_a_message(data: bytes) -> None:
    for decode in (decode_front, decode_replica):
        try:
            message = decode(data)
        except ValueError:
            continue
        assert decode(encode(message)) == message


@examples(100)
@given(front_messages | replica_messages, st.data())
def test_a_field_of_another_type_is_a_value_error_or_a_message(
    message: FrontMessage | ReplicaMessage, data: st.DataObject
) -> None:
    parts = msgpack.unpackb(encode(message))
    where = parts
    while True:
        if not where:
            return
        at = data.draw(st.integers(0, len(where) - 1))
        if not isinstance(where[at], list) or data.draw(st.booleans()):
            break
        where = where[at]
    where[at] = data.draw(junk)
    for decode in (decode_front, decode_replica):
        with suppress(ValueError):
            decode(msgpack.packb(parts))


REPORT = Report(3, 10, 2, 1, 0.001, None, False, 7, 100, 50)


@pytest.mark.parametrize(
    ("message", "field", "value"),
    [
        (Abort(1), 1, -1),
        (Abort(1), 1, True),
        (Abort(1), 1, 1.0),
        (Pause(1, True), 2, 1),
        (Add(1, [5], [], RowSampling(), 4), 2, []),
        (Add(1, [5], [], RowSampling(), 4), 2, [-5]),
        (Add(1, [5], [], RowSampling(), 4), 3, "ab"),
        (Add(1, [5], [], RowSampling(), 4), 4, [0.0]),
        (Add(1, [5], [], RowSampling(), 4), 8, "text"),
        (Peers(()), 1, "localhost"),
        (Peers(()), 1, [["replica-1"]]),
        (Peers(()), 1, [["replica-1", 5]]),
    ],
)
def test_a_wrong_field_of_the_front_is_refused(message: FrontMessage, field: int, value: Any) -> None:
    parts = msgpack.unpackb(encode(message))
    parts[field] = value
    with pytest.raises(ValueError):
        decode_front(msgpack.packb(parts))


@pytest.mark.parametrize(
    ("message", "field", "value"),
    [
        (REPORT, 1, -1),
        (REPORT, 5, float("nan")),
        (REPORT, 5, float("inf")),
        (REPORT, 5, -1.0),
        (REPORT, 7, 0),
        (REPORT, 11, "[]"),
        (REPORT, 11, "{"),
        (Output([]), 1, [[1, [5], None, "gone", None, None, None]]),
        (Output([]), 1, [[1, [5], [], None, None, None, None]]),
        (Output([]), 1, [[1, [5]]]),
        (KvEvents(b""), 1, "text"),
    ],
)
def test_a_wrong_field_of_a_replica_is_refused(message: ReplicaMessage, field: int, value: Any) -> None:
    parts = msgpack.unpackb(encode(message))
    parts[field] = value
    with pytest.raises(ValueError):
        decode_replica(msgpack.packb(parts))


def test_a_missing_or_a_further_field_is_refused() -> None:
    for parts in ([2], [2, 1, 1], [99, 1], [], [None]):
        with pytest.raises(ValueError):
            decode_front(msgpack.packb(parts))


def test_a_message_over_the_limit_is_refused_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(KvSnapshot(b"x" * 200))
    monkeypatch.setattr(plan, "MAX_MESSAGE_BYTES", 100)
    with pytest.raises(ValueError, match="over the limit"):
        encode(KvSnapshot(b"x" * 200))
    with pytest.raises(ValueError, match="over the limit"):
        decode_replica(data)


def test_a_token_of_a_step_takes_few_bytes() -> None:
    deltas = [RequestDelta(1_000_000 + index, [30_000]) for index in range(128)]
    assert len(encode(Output(deltas))) < 128 * 20


def test_every_message_has_a_number() -> None:
    assert len(messages._NUMBERS) == len(messages._MESSAGES)
