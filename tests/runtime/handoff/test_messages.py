"""What comes from another engine is checked, field by field, and says the same on both ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.runtime.handoff.messages import (
    MAX_KEYS,
    Ask,
    Hello,
    HelloAnswer,
    Identity,
    Load,
    Mismatch,
    State,
    Status,
    TransferKey,
    keys_of,
)
from headwise.v1 import kv_transfer_pb2 as pb
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.handoff import KvEndpoint
from tests.effort import examples
from tests.runtime.handoff.conftest import DECODE_EPOCH, HELLO, IDENTITY, SECRET_TOKENS, TICKET, about, ask_of, key_of


def ask_from(message: pb.PrefillRequest) -> Ask:
    return Ask.of(message, IDENTITY.block_size, max_tokens=64)


def test_every_message_comes_out_as_it_went_in() -> None:
    key, ask, load, status = key_of(3), ask_of(key_of(3)), Load(1, 0.5, 2), Status(State.FAILED, "why")
    assert Identity.of(IDENTITY.message()) == IDENTITY
    assert TransferKey.of(key.message()) == key
    assert ask_from(ask.message()) == ask
    assert Load.of(load.message()) == load
    assert Status.of(status.message()) == status
    assert Hello.of(replace(HELLO, tls=True).message()) == replace(HELLO, tls=True)
    answer = about(version=1, load=load, max_lease_s=12.0, ranks=[(0, 2), (1, 3)])
    assert HelloAnswer.of(answer.message()) == answer


@given(
    key=st.builds(TransferKey, st.binary(min_size=16, max_size=16), st.integers(1, 2**32 - 1),
                  st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)),
    tokens=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=16),
    fence=st.integers(0, 2**64 - 1),
    owner=st.binary(max_size=256),
    seconds=st.floats(0.001, 30.0),
)  # fmt: skip
@examples(100)
def test_every_ask_within_the_limits_comes_out_as_it_went_in(
    key: TransferKey, tokens: list[int], fence: int, owner: bytes, seconds: float
) -> None:
    ask = ask_of(key, token_ids=tokens * 4, fence=fence, owner=owner, first_block=len(tokens) - 1, lease_s=seconds)
    assert ask_from(ask.message()) == ask


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("key.transfer", lambda m: setattr(m.key, "transfer", b"short")),
        ("key.attempt", lambda m: setattr(m.key, "attempt", 0)),
        ("ticket", lambda m: setattr(m, "ticket", TICKET + b"x")),
        ("token_ids", lambda m: m.ClearField("token_ids")),
        ("token_ids", lambda m: m.token_ids.append(5)),
        ("token_ids", lambda m: m.token_ids.extend([5] * 64)),
        ("first_block", lambda m: setattr(m, "first_block", 2)),
        ("namespace", lambda m: setattr(m, "namespace", bytes(31))),
        ("owner", lambda m: setattr(m, "owner", bytes(257))),
        ("tenant", lambda m: setattr(m, "tenant", "x" * 257)),
        ("tenant", lambda m: setattr(m, "tenant", "a\nb")),
        *[
            (name, lambda m, name=name, value=value: setattr(m, name, value))
            for name in ("deadline_s", "lease_s")
            for value in (0.0, -1.0, float("nan"), float("inf"), 1e6)
        ],
    ],
)
def test_an_ask_outside_the_limits_is_refused_by_the_fields_name(field: str, change: Callable[[Any], None]) -> None:
    message = ask_of(key_of(1)).message()
    change(message)
    with pytest.raises(InvalidValueError) as error:
        ask_from(message)
    assert error.value.field == field
    told = f"{error.value}{error.value!r}{error.value.value!r}"
    assert "771177" not in told and "nobody" not in told


def test_secrets_are_not_shown() -> None:
    shown = repr(ask_of(key_of(1)))
    assert str(SECRET_TOKENS[0]) not in shown and "nobody" not in shown


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("identity.min_version", lambda m: setattr(m.identity, "min_version", 0)),
        ("identity.max_version", lambda m: setattr(m.identity, "max_version", 0)),
        ("identity.fingerprint", lambda m: setattr(m.identity, "fingerprint", "")),
        ("identity.fingerprint", lambda m: setattr(m.identity, "fingerprint", "x" * 257)),
        ("identity.dtype", lambda m: setattr(m.identity, "dtype", "\x00")),
        ("identity.policy", lambda m: setattr(m.identity, "policy", "")),
        ("identity.block_size", lambda m: setattr(m.identity, "block_size", 0)),
        ("identity.num_layers", lambda m: setattr(m.identity, "num_layers", 1 << 21)),
        ("identity.num_kv_heads", lambda m: setattr(m.identity, "num_kv_heads", 0)),
        ("identity.head_dim", lambda m: setattr(m.identity, "head_dim", 0)),
        ("endpoints", lambda m: m.ClearField("endpoints")),
        ("endpoints", lambda m: m.endpoints.extend([m.endpoints[0]] * 1023)),
        ("endpoints.heads", lambda m: setattr(m.endpoints[0].heads, "start", 2)),
        ("endpoints.heads", lambda m: setattr(m.endpoints[1].heads, "stop", 4)),
        ("endpoints.heads", lambda m: setattr(m.endpoints[0].heads, "stop", 1)),
        ("endpoints.address", lambda m: setattr(m.endpoints[0], "address", "")),
        ("endpoints.address", lambda m: setattr(m.endpoints[0], "address", "x" * 257)),
        ("endpoints.host_id", lambda m: setattr(m.endpoints[0], "host_id", bytes(65))),
    ],
)
def test_a_hello_outside_the_limits_is_refused_by_the_fields_name(field: str, change: Callable[[Any], None]) -> None:
    message = HELLO.message()
    change(message)
    with pytest.raises(InvalidValueError) as error:
        Hello.of(message)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("ranks", lambda m: m.ClearField("ranks")),
        ("ranks.heads", lambda m: setattr(m.ranks[0], "start", 1)),
        ("max_tokens", lambda m: setattr(m, "max_tokens", 0)),
        ("max_transfers", lambda m: setattr(m, "max_transfers", 0)),
        ("max_lease_s", lambda m: setattr(m, "max_lease_s", float("nan"))),
        ("version", lambda m: setattr(m, "version", 2)),
        ("load.token_s", lambda m: setattr(m.load, "token_s", -1.0)),
        ("load.token_s", lambda m: setattr(m.load, "token_s", float("inf"))),
    ],
)
def test_an_answer_outside_the_limits_is_refused_by_the_fields_name(field: str, change: Callable[[Any], None]) -> None:
    message = about().message()
    change(message)
    with pytest.raises(InvalidValueError) as error:
        HelloAnswer.of(message)
    assert error.value.field == field


def test_too_many_keys_are_refused() -> None:
    assert keys_of([key_of(1).message()] * MAX_KEYS) == [key_of(1)] * MAX_KEYS
    with pytest.raises(InvalidValueError, match="keys"):
        keys_of([key_of(1).message()] * (MAX_KEYS + 1))


@pytest.mark.parametrize("state", [0, 6, 99])
def test_a_state_that_is_none_is_refused(state: int) -> None:
    with pytest.raises(InvalidValueError, match=r"status\.state"):
        Status.of(pb.TransferStatus(state=state))  # type: ignore[arg-type]


def test_a_reason_is_cut_and_one_line() -> None:
    assert Status.of(pb.TransferStatus(state=5, reason="a\nb" + "c" * 999)).reason == "a?b" + "c" * 253  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ours", "theirs", "agreed"), [((1, 1), (1, 1), 1), ((1, 3), (2, 5), 3), ((2, 5), (1, 3), 3), ((1, 9), (4, 4), 4)]
)
def test_two_engines_use_the_highest_version_that_both_speak(
    ours: tuple[int, int], theirs: tuple[int, int], agreed: int
) -> None:
    one, other = (replace(IDENTITY, min_version=low, max_version=high) for low, high in (ours, theirs))
    assert one.agree(other) == other.agree(one) == agreed


def test_engines_without_a_common_version_do_not_fit() -> None:
    newer = replace(IDENTITY, min_version=2, max_version=4)
    assert IDENTITY.agree(newer) == Mismatch("version", "1-1", "2-4")
    assert newer.agree(IDENTITY) == Mismatch("version", "2-4", "1-1")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fingerprint", "another model"),
        ("dtype", "bfloat16"),
        ("block_size", 16),
        ("policy", "window"),
        ("num_layers", 3),
        ("num_kv_heads", 4),
        ("head_dim", 16),
    ],
)
def test_the_first_field_in_which_engines_differ_is_named(field: str, value: Any) -> None:
    other = replace(IDENTITY, **{field: value})
    mismatch = IDENTITY.agree(other)
    assert mismatch == Mismatch(field, getattr(IDENTITY, field), value)
    assert str(mismatch).startswith(f"{field}: ")


@given(
    starts=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6),
    num_heads=st.integers(1, 8),
)
@examples(200)
def test_ranks_are_taken_exactly_if_they_have_every_head(starts: list[tuple[int, int]], num_heads: int) -> None:
    identity = replace(IDENTITY, num_kv_heads=num_heads)
    hello = Hello(identity, DECODE_EPOCH, [KvEndpoint(heads, "127.0.0.1:1") for heads in starts])
    right = all(start < stop <= num_heads for start, stop in starts)
    right &= {head for heads in starts for head in range(*heads)} >= set(range(num_heads))
    if right:
        assert Hello.of(hello.message()) == hello
    else:
        with pytest.raises(InvalidValueError, match="endpoints"):
            Hello.of(hello.message())
