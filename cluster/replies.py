"""What a rank answers to a question: a result, or that it must refuse. A rank that refuses goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack

from headwise.workers.errors import InvalidValueError

_INT = 1 << 63
_UNICODE = "surrogatepass"
"""A path may hold halves of surrogate pairs."""


def encode_reply(answer: Callable[[], Any]) -> bytes:
    """The message of what ``answer`` returns, or of the InvalidValueError that it raises."""
    try:
        message = {"result": answer()}
    except InvalidValueError as error:
        fits = isinstance(error.value, (str, float)) or (isinstance(error.value, int) and -_INT <= error.value < _INT)
        value = error.value if fits else repr(error.value)
        message = {"refused": (error.field, value, error.limit, error.fix)}
    data: bytes = msgpack.packb(message, unicode_errors=_UNICODE)
    return data


def decode_reply(data: bytes) -> Any:
    """
    Raises:
        InvalidValueError: the rank refused.
    """
    message = msgpack.unpackb(data, unicode_errors=_UNICODE)
    if "refused" in message:
        raise InvalidValueError(*message["refused"])
    return message["result"]
