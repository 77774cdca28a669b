"""Transfer messages come out of the codec as they went in, and junk is a ValueError."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.workers import plan
from headwise.workers.kv.transfer import (
    BlockKey,
    Op,
    Tier,
    TransferJob,
    TransferResult,
    decode_job,
    decode_result,
    encode_job,
    encode_result,
)
from tests.effort import examples

numbers = st.integers(0, 2**63)
digests = st.binary(min_size=32, max_size=32)
keys = st.builds(BlockKey, digests, digests, digests, st.binary(max_size=128))
jobs = st.builds(
    TransferJob,
    numbers,
    st.sampled_from(Op),
    st.sampled_from(Tier),
    st.lists(keys, max_size=4),
    st.lists(st.integers(0, 2**31), max_size=4),
)
results = st.builds(TransferResult, numbers, st.lists(digests, max_size=4), st.floats(0, allow_infinity=False))


@examples(100)
@given(job=jobs)
def test_jobs_survive_the_codec(job: TransferJob) -> None:
    decoded = decode_job(encode_job(job))
    assert decoded == job
    assert isinstance(decoded.op, Op) and isinstance(decoded.tier, Tier)


@examples(100)
@given(result=results)
def test_results_survive_the_codec(result: TransferResult) -> None:
    assert decode_result(encode_result(result)) == result


@examples(300)
@given(data=st.binary(max_size=60))
def test_foreign_bytes_are_a_value_error(data: bytes) -> None:
    for decode in (decode_job, decode_result):
        try:
            decode(data)
        except ValueError:
            continue
        message = msgpack.unpackb(data)
        assert isinstance(message, list) and len(message) <= 5


@pytest.mark.parametrize(
    "message",
    [
        [],
        [1],
        {"id": 1},
        7,
        [1, 1, "host", [], [], []],
        [1, 9, "host", [], []],
        [1, 1, "tape", [], []],
        [1, 1, "host", [[b"digest"]], [3]],
        [1, 1, "host", 5, []],
    ],
)
def test_a_message_of_another_form_is_a_value_error(message: Any) -> None:
    with pytest.raises(ValueError):
        decode_job(msgpack.packb(message))


@pytest.mark.parametrize("message", [[], [1, [], 0.5, 7], {"id": 1}, None])
def test_a_result_of_another_form_is_a_value_error(message: Any) -> None:
    with pytest.raises(ValueError):
        decode_result(msgpack.packb(message))


@pytest.mark.parametrize("decode", [decode_job, decode_result])
def test_a_message_over_the_limit_is_refused_before_it_is_parsed(
    decode: Callable[[bytes], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MAX_MESSAGE_BYTES", 100)
    with pytest.raises(ValueError, match="over the limit"):
        decode(b"\xc1" * 101)


def test_tokens_are_not_shown() -> None:
    assert "secret" not in repr(TransferJob(0, Op.SAVE, Tier.HOST, [BlockKey(b"", b"", b"", b"secret")], [0]))
