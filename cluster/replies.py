"""What a rank answers to a question: a result, or that it must refuse. A rank that refuses goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack

from headwise.workers.errors import InvalidValueError


def encode_reply(answer: Callable[[], Any]) -> bytes:
    """The message of what ``answer`` returns, or of the InvalidValueError that it raises."""
    try:
        message = {"result": answer()}
    except InvalidValueError as error:
        value = error.value if isinstance(error.value, (str, int, float)) else repr(error.value)
        message = {"refused": (error.field, value, error.limit, error.fix)}
    data: bytes = msgpack.packb(message)
    return data


def decode_reply(data: bytes) -> Any:
    """
    Raises:
        InvalidValueError: the rank refused.
    """
    message = msgpack.unpackb(data)
    if "refused" in message:
        raise InvalidValueError(*message["refused"])
    return message["result"]
