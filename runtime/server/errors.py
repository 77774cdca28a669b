"""Converts the runtime's errors to gRPC statuses, with details that clients can act on."""

from __future__ import annotations

import logging
import traceback
from contextvars import ContextVar
from typing import NoReturn

import grpc
from google.rpc import code_pb2, error_details_pb2, status_pb2

from headwise.cluster.group import ShardGroupDied
from headwise.runtime.async_model import QueueFullError, TenantBusyError
from headwise.runtime.deployment.front import NoReplicaError
from headwise.runtime.deployment.model import FrontBusyError
from headwise.runtime.engine.loop import EngineStoppedError
from headwise.runtime.handoff.errors import MismatchError, NotFoundError, RefusedError
from headwise.runtime.inputs.grammars import GrammarTrialError
from headwise.workers.errors import HeadwiseError, InvalidValueError

MAX_MESSAGE = 1000
"""Characters of a status. It is sent twice, and clients take headers of 8 KiB."""
RETRY_AFTER_S = 1.0
"""What a client is told to wait when the queue is full."""

ENGINE_ENDED = "the engine of this server has ended"
"""What a tenant is told; how it ended, which names nodes and files, is for admins and the log."""

for_admin: ContextVar[bool] = ContextVar("for_admin", default=False)
"""Whether the call is an admin's."""

_logger = logging.getLogger(__name__)


class UnavailableError(HeadwiseError):
    """The server takes no requests: it is draining, or its engine has ended."""


class UnauthenticatedError(HeadwiseError):
    """A call has no token, or a token that no tenant has."""


class PermissionDeniedError(HeadwiseError):
    """A tenant may not do what the call asks for."""


class StalledError(HeadwiseError):
    """A client did not read the answer to its call."""


class LeftError(HeadwiseError):
    """A client is gone."""


class StalledConnectionError(HeadwiseError):
    """On one connection, or of one tenant, too many streams were not read."""


class CheckQueueFullError(HeadwiseError):
    """Too many requests wait to be checked. Try again later."""


class TooManyCallsError(HeadwiseError):
    """A connection, a host or a tenant has too many calls open."""


class SubscribersError(HeadwiseError):
    """Too many clients are told of KV events."""


class OneEngineError(HeadwiseError):
    """A server of several engines does not do what only one engine can."""


class DeadlineError(HeadwiseError):
    """A request took longer than a request may."""


_CODES: list[tuple[type[BaseException], grpc.StatusCode]] = [
    (InvalidValueError, grpc.StatusCode.INVALID_ARGUMENT),
    (QueueFullError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (TenantBusyError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (StalledError, grpc.StatusCode.CANCELLED),
    (LeftError, grpc.StatusCode.CANCELLED),
    (StalledConnectionError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (CheckQueueFullError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (TooManyCallsError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (SubscribersError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED),
    (PermissionDeniedError, grpc.StatusCode.PERMISSION_DENIED),
    (RefusedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (NotFoundError, grpc.StatusCode.NOT_FOUND),
    (MismatchError, grpc.StatusCode.FAILED_PRECONDITION),
    (UnavailableError, grpc.StatusCode.UNAVAILABLE),
    (ShardGroupDied, grpc.StatusCode.UNAVAILABLE),
    (NoReplicaError, grpc.StatusCode.UNAVAILABLE),
    (FrontBusyError, grpc.StatusCode.UNAVAILABLE),
    (EngineStoppedError, grpc.StatusCode.UNAVAILABLE),
    (OneEngineError, grpc.StatusCode.UNIMPLEMENTED),
    (GrammarTrialError, grpc.StatusCode.UNAVAILABLE),
    (HeadwiseError, grpc.StatusCode.INTERNAL),
]


def code_of(error: BaseException) -> grpc.StatusCode:
    """The status of an error; INTERNAL if Headwise did not raise it."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


def trace(error: BaseException) -> str:
    """Where an error, and its causes, happened. Their messages are left out: they may hold a prompt."""
    lines = traceback.format_tb(error.__traceback__)
    cause = error.__cause__ or error.__context__
    return "".join(lines) + (f"{type(cause).__name__}:\n{trace(cause)}" if cause is not None else "")


async def abort(context: grpc.aio.ServicerContext[object, object], error: BaseException) -> NoReturn:
    """Ends a call with the status of an error, and its details: a wrong field as BadRequest, when to try again as
    RetryInfo.

    Of an error that Headwise did not raise only the type is sent: its message may hold anything. How the engine ended
    is told to admins alone.
    """
    code = code_of(error)
    message = str(error) if isinstance(error, HeadwiseError) else f"internal error: {type(error).__name__}"
    if isinstance(error, (ShardGroupDied, EngineStoppedError, NoReplicaError)) and not for_admin.get():
        message = ENGINE_ENDED
    if code is grpc.StatusCode.INTERNAL:
        _logger.error("%s\n%s", message, trace(error))
    if len(message) > MAX_MESSAGE:
        message = f"{message[: MAX_MESSAGE - 3]}..."
    status = status_pb2.Status(code=_number(code), message=message)
    metadata: list[tuple[str, str | bytes]] = []
    if isinstance(error, InvalidValueError):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=message)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromMilliseconds(int(RETRY_AFTER_S * 1000))
        status.details.add().Pack(info)
        # https://github.com/grpc/proposal/blob/master/A6-client-retries.md#pushback
        metadata.append(("grpc-retry-pushback-ms", str(int(RETRY_AFTER_S * 1000))))
    metadata.append(("grpc-status-details-bin", status.SerializeToString()))
    await context.abort(code, message, tuple(metadata))
    raise AssertionError("abort() returned")


def _number(code: grpc.StatusCode) -> int:
    return int(code_pb2.Code.Value(code.name))
