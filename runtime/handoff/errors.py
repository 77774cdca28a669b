"""What a prefill engine answers where it does not do what was asked; each is a gRPC status of its own."""

from __future__ import annotations

import logging
import traceback
from concurrent.futures import CancelledError

import grpc

from headwise.workers.errors import HeadwiseError, InvalidValueError


class RefusedError(HeadwiseError):
    """The engine takes no more now; the message has the number and the limit. Ask another, or compute it yourself."""


class NotFoundError(HeadwiseError):
    """The engine does not know the transfer, the epoch, or who asks. Say Hello, and begin anew."""


class MismatchError(HeadwiseError):
    """Two engines do not fit together; the message begins with the first field in which they do not."""


_logger = logging.getLogger(__name__)

ENGINE_ENDED = "the engine of this peer has ended"

_CODES: list[tuple[type[HeadwiseError], grpc.StatusCode]] = [
    (InvalidValueError, grpc.StatusCode.INVALID_ARGUMENT),
    (RefusedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (NotFoundError, grpc.StatusCode.NOT_FOUND),
    (MismatchError, grpc.StatusCode.FAILED_PRECONDITION),
]


def status_of(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """The code and the message of an error's status. How the engine ended is no peer's business, and the message of an
    error that Headwise did not raise may hold anything."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code, str(error)
    if isinstance(error, (HeadwiseError, CancelledError)):
        return grpc.StatusCode.UNAVAILABLE, ENGINE_ENDED
    _logger.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
    return grpc.StatusCode.INTERNAL, f"internal error: {type(error).__name__}"
