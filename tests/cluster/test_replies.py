"""What a rank answers travels as it is, and a refusal as the error that it was."""

from __future__ import annotations

from pathlib import Path

import msgpack
import pytest

from headwise.cluster.replies import decode_reply, encode_reply
from headwise.workers.errors import InvalidValueError


@pytest.mark.parametrize("result", [None, 7, [b"a", "b"], {"pid": 1, "seconds": {"build": 0.5}}])
def test_a_result_comes_back(result: object) -> None:
    assert decode_reply(encode_reply(lambda: result)) == result


@pytest.mark.parametrize("value", ["1KiB", 7, 0.5, Path("/cache"), "/\udcff\ud800", 1 << 63, -(1 << 63)])
def test_a_refusal_is_raised_again(value: object) -> None:
    def refuse() -> object:
        raise InvalidValueError("kv_memory", value, "is not there", "take less")

    with pytest.raises(InvalidValueError) as caught:
        decode_reply(encode_reply(refuse))
    error = caught.value
    assert (error.field, error.limit, error.fix) == ("kv_memory", "is not there", "take less")
    assert error.value == (value if isinstance(value, (str, int, float)) and value != 1 << 63 else repr(value))


def test_another_error_is_the_rank_s_death() -> None:
    def fail() -> object:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        encode_reply(fail)


def test_a_reply_that_is_none_is_refused() -> None:
    with pytest.raises(KeyError):
        decode_reply(msgpack.packb({}))
