"""The calls that cost work: which tenant each is of, whether more are let in, and how each is logged when it ends."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TypeAlias, TypeVar
from urllib.parse import unquote

import grpc

from headwise.runtime.async_model import AsyncModel, Lane, TenantBusyError
from headwise.runtime.engine.request import Request
from headwise.runtime.engine.text import Delta
from headwise.runtime.engine.waiting import share
from headwise.runtime.output import FinishReason
from headwise.runtime.server.auth import Access, Tenant
from headwise.runtime.server.errors import (
    CheckQueueFullError,
    DeadlineError,
    LeftError,
    StalledConnectionError,
    StalledError,
    SubscribersError,
    UnavailableError,
    abort,
    code_of,
)
from headwise.runtime.server.metrics import Metrics
from headwise.runtime.server.tracing import Ended, carrier_of
from headwise.workers.errors import InvalidValueError

T = TypeVar("T")
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

requests_log = logging.getLogger("headwise.requests")
"""One line a request: JSON, without prompt or output."""

MAX_REQUEST_ID = 128
MAX_ABORTED = 1024
"""Requests that one call may end."""
MAX_STALLED = 8
"""Streams of one connection that were ended because nobody read them, and whose end nobody reads either: until the
connection is closed they take room here, and it gets no more."""
MAX_STALLED_OF_TENANT = 4 * MAX_STALLED
"""The same of one tenant, over how many connections ever."""
MAX_SUBSCRIBERS = 16
"""Clients that are told of KV events: each has messages that wait for it, and snapshots made on the engine's thread."""
SPARE_CALLS = 256
"""Calls that a server takes at once beyond those whose requests run or wait: quick ones, and refusals."""
MAX_CHECKING = 32
"""Of a tenant, in each lane of :meth:`AsyncModel.off_loop`, where a grammar takes up to a tenth of a second."""

_begun: ContextVar[bool] = ContextVar("begun", default=False)
"""Whether something was written to the call, which has a task of its own."""
_SEPARATOR = "\x1f"
"""Between a tenant's name and its request's id: in neither, so that no two tenants' ids can be the same."""


class Call:
    """One call to generate or to tokenize, or for the tokenizer, from its arrival to its end.

    Attributes:
        method: the RPC's name.
        peer: the client's address, which gRPC does not tell any more once the call has ended.
        tenant: the tenant that made it.
        engine_id: the request's id in the engine, where ids of all tenants meet.
        requests: its samples, once they are checked.
        carrier: what its metadata say of a trace that it is a part of, where there are traces.
    """

    def __init__(self, llm: AsyncModel[Any], method: str, peer: str) -> None:
        self.arrival, self.method, self.peer = time.monotonic(), method, peer
        self.tenant, self.engine_id = Tenant(), ""
        self.requests: list[Request] = []
        self.carrier: dict[str, str] = {}
        self._llm, self._aborted = llm, False

    @property
    def request_id(self) -> str:
        """The request's id as the client knows it."""
        return self.engine_id.partition(_SEPARATOR)[2]

    @property
    def full_name(self) -> str:
        """What an admin calls the request."""
        return f"{self.tenant.name}/{self.request_id}"

    async def run(self) -> AsyncGenerator[list[Delta]]:
        """Yields the new deltas of its samples, until all have ended.

        Raises: as :meth:`AsyncModel.stream <headwise.runtime.async_model.AsyncModel.stream>`.
        """
        if self._aborted:
            for request in self.requests:
                request.finish_reason, request.metrics.finished = FinishReason.ABORT, time.monotonic()
            yield [Delta(request, [], None, None, True) for request in self.requests]
            return
        async with aclosing(self._llm.stream(self.requests)) as stream:
            async for deltas in stream:
                yield deltas

    def abort(self) -> None:
        """Ends its samples; the client gets their output so far."""
        self._aborted = True
        self._llm.abort(self.engine_id)


class Sessions:
    """The calls that run, and whether more are let in. All services of a server share it.

    Attributes:
        max_calls: most calls that run at once; a tenant may have half of what other tenants leave free.
        draining: whether new requests are refused.
        drained: is set when new requests are refused, and no call runs any more.
    """

    def __init__(
        self,
        llm: AsyncModel[Any],
        metrics: Metrics,
        access: Access,
        stall_timeout_s: float,
        max_request_s: float,
        trace: Callable[[Ended], None] | None = None,
    ) -> None:
        """
        Args:
            stall_timeout_s: seconds that a client may leave a stream unread before its request is ended.
            max_request_s: seconds that a request may take, from its arrival to its end.
            trace: gets each request that has ended; None: there are no traces.
        """
        self.llm, self.metrics, self._access, self._trace = llm, metrics, access, trace
        self.stall_timeout_s, self.max_request_s = stall_timeout_s, max_request_s
        self.max_calls = llm.max_queued_requests + llm.max_running + SPARE_CALLS
        self.draining = False
        self.drained = asyncio.Event()
        self._calls: dict[str, Call] = {}
        self._named: dict[str, set[Call]] = {}  # by TENANT/ID, which more than one may have: both may hold slashes
        self._calls_of: Counter[str] = Counter()  # by tenant
        self._stalled: Counter[str] = Counter()  # by connection
        self._stalled_of: Counter[str] = Counter()  # by tenant, where tenants are told apart
        self._checking: Counter[tuple[str, Lane | None]] = Counter()
        self._num_subscribers = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def num_calls(self) -> int:
        """How many calls run or are being checked."""
        return len(self._calls)

    def tenant(self, context: Context) -> Tenant:
        """
        Raises:
            UnauthenticatedError: the call is nobody's.
        """
        return self._access.tenant(context)

    def drain(self) -> None:
        """Refuses new requests from now on."""
        self.draining = True
        if not self._calls:
            self.drained.set()

    async def idle(self) -> None:
        """Returns once no call runs."""
        await self._empty.wait()

    @asynccontextmanager
    async def call(self, context: Context, request_id: str = "", method: str = "Generate") -> AsyncIterator[Call]:
        """A call, for the length of the block. An error that the block raises becomes the call's status.

        The call is counted and logged, however it ends.

        Args:
            request_id: the client's id for it, which may be empty.
            method: the RPC's name.
        """
        call, code, failure = Call(self.llm, method, context.peer()), grpc.StatusCode.OK, None
        if self._trace is not None:
            call.carrier = carrier_of(context.invocation_metadata() or ())
        try:
            call.tenant = self.tenant(context)
            call.engine_id = self._engine_id(call.tenant, request_id)
            self._admit(context, call)
            try:
                async with self._limit():
                    yield call
            finally:
                self._forget(call)
        except (asyncio.CancelledError, GeneratorExit):
            left = context.time_remaining()
            ended = left is not None and left <= 0
            code = grpc.StatusCode.DEADLINE_EXCEEDED if ended else grpc.StatusCode.CANCELLED
            raise
        except Exception as error:
            code, failure = code_of(error), error
        finally:
            self._account(call, code, call.peer)
        if failure is not None:
            await self._fail(context, call.tenant, failure)

    async def write(self, context: Context, message: object) -> None:
        """Sends a message to the client.

        Raises:
            StalledError: the client has not read for ``stall_timeout_s``.
            LeftError: the client is gone.
        """

        async def first() -> None:
            # Not with the message: gRPC would send it again with the status of a call whose first message stalled.
            await context.send_initial_metadata(())
            await context.write(message)

        begun = _begun.get()
        _begun.set(True)
        try:
            await asyncio.wait_for(context.write(message) if begun else first(), self.stall_timeout_s)
        except TimeoutError:
            raise StalledError(f"the stream was not read for {self.stall_timeout_s:g} s") from None
        except grpc.aio.InternalError:  # before the call is cancelled for it
            raise LeftError("the client has left") from None

    @contextmanager
    def subscriber(self) -> Iterator[None]:
        """A client is told of KV events, for the length of the block.

        Raises:
            SubscribersError: MAX_SUBSCRIBERS are already.
        """
        if self._num_subscribers >= MAX_SUBSCRIBERS:
            raise SubscribersError(f"{MAX_SUBSCRIBERS} clients are told of KV events, and no more may be; end one")
        self._num_subscribers += 1
        try:
            yield
        finally:
            self._num_subscribers -= 1

    def refuse(self, error: BaseException, peer: str) -> None:
        """Counts and logs a call that was refused before its message was read."""
        self._account(None, code_of(error), peer)

    def abort(self, tenant: Tenant, request_ids: Collection[str]) -> None:
        """Ends requests of a tenant; an admin may name another's TENANT/ID. Unknown ids are ignored: the request may
        just have ended.

        Raises:
            InvalidValueError: there are more than MAX_ABORTED ids.
        """
        if len(request_ids) > MAX_ABORTED:
            limit = f"a call may end {MAX_ABORTED} requests at most"
            raise InvalidValueError("request_ids", f"{len(request_ids)} ids", limit, "make several calls")
        for request_id in set(request_ids):
            own = self._calls.get(f"{tenant.name}{_SEPARATOR}{request_id}")
            found = {own} if own is not None else set()
            if tenant.admin:
                found |= self._named.get(request_id, set())
            for call in found:
                call.abort()

    async def check(self, call: Call, make: Callable[[], list[Request]], lane: Lane | None) -> list[Request]:
        """Makes a call's requests; raises as :meth:`off_loop`."""
        call.requests = await self.off_loop(call, make, lane)
        for request in call.requests:
            request.metrics.arrival = call.arrival
        return call.requests

    async def off_loop(self, call: Call, function: Callable[[], T], lane: Lane | None) -> T:
        """Runs a function that works on a call's input off the event loop; see :meth:`AsyncModel.off_loop`.

        Raises:
            CheckQueueFullError: too many calls of the tenant wait for that.
            InvalidValueError: and whatever else ``function`` raises.
        """
        waiting = call.tenant.name, lane
        if lane is not None and self._checking[waiting] >= MAX_CHECKING:
            raise CheckQueueFullError(f"{MAX_CHECKING} requests with a long text, or a new grammar, wait to be checked")
        left = False

        def unless_left() -> T:
            if left:
                raise LeftError("the client has left")
            return function()

        def over(work: asyncio.Future[T]) -> None:
            _take_away(self._checking, waiting)
            if left and not work.cancelled():
                work.exception()  # or asyncio logs it, with what the client sent

        # Until it is out of the lane's queue, which keeps the message of a call that has left, too.
        self._checking[waiting] += 1
        work = asyncio.ensure_future(self.llm.off_loop(unless_left, lane))
        work.add_done_callback(over)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            left = True
            raise

    @asynccontextmanager
    async def _limit(self) -> AsyncIterator[None]:
        """
        Raises:
            DeadlineError: the block took longer than ``max_request_s``.
        """
        try:
            async with asyncio.timeout(self.max_request_s) as limit:
                yield
        except TimeoutError:
            if limit.expired():
                raise DeadlineError(f"the request took more than {self.max_request_s:g} s") from None
            raise

    def _engine_id(self, tenant: Tenant, request_id: str) -> str:
        """The request's id in the engine, made of tenant and id, so that tenants cannot use or end each other's.

        Raises:
            InvalidValueError: the client's id is too long or not printable.
        """
        if len(request_id) > MAX_REQUEST_ID or not request_id.isprintable():
            limit = f"must have at most {MAX_REQUEST_ID} printable characters"
            raise InvalidValueError("request_id", request_id, limit)
        return f"{tenant.name}{_SEPARATOR}{request_id or f'request-{secrets.token_hex(8)}'}"

    def _admit(self, context: Context, call: Call) -> None:
        if self.draining:
            raise UnavailableError("this server drains and takes no more requests; use another")
        self._check_share(context, call.tenant)
        left = context.time_remaining()
        if left is not None and left > self.max_request_s:
            limit = f"must be at most {self.max_request_s:g} s away (--max-request-time)"
            raise InvalidValueError("deadline", f"{left:.0f} s", limit)
        if call.engine_id in self._calls:
            raise InvalidValueError("request_id", call.request_id, "a request with this id still runs")
        self._calls[call.engine_id] = call
        self._named.setdefault(call.full_name, set()).add(call)
        self._calls_of[call.tenant.name] += 1
        self._empty.clear()

    def _check_share(self, context: Context, tenant: Tenant) -> None:
        """
        Raises:
            StalledConnectionError: too many streams of the connection, or of the tenant, were not read.
            TenantBusyError: too many calls of the tenant run.
        """
        unread = f"were not read for {self.stall_timeout_s:g} s each"
        if self._stalled[context.peer()] >= MAX_STALLED:
            raise StalledConnectionError(f"{MAX_STALLED} streams of this connection {unread}; close it")
        if not tenant.name:
            return
        if self._stalled_of[tenant.name] >= MAX_STALLED_OF_TENANT:
            limit = f"{MAX_STALLED_OF_TENANT} streams of tenant {tenant.name} {unread}"
            raise StalledConnectionError(f"{limit}; close their connections")
        own = self._calls_of[tenant.name]
        if own >= (most := share(self.max_calls, len(self._calls) - own)):
            raise TenantBusyError(
                f"{own} calls of tenant {tenant.name} run; half of what others leave free may, now {most} "
                f"of {self.max_calls} (--max-queued-requests, --max-num-seqs and {SPARE_CALLS}); try again later"
            )

    def _forget(self, call: Call) -> None:
        del self._calls[call.engine_id]
        self._named[call.full_name].discard(call)
        if not self._named[call.full_name]:
            del self._named[call.full_name]
        _take_away(self._calls_of, call.tenant.name)
        if not self._calls:
            self._empty.set()
            if self.draining:
                self.drained.set()

    async def _fail(self, context: Context, tenant: Tenant, error: Exception) -> None:
        """Sends the status of an error. If the client does not read, that waits until it does, or leaves."""
        if not isinstance(error, StalledError):
            await abort(context, error)
        peer = context.peer()
        self._stalled[peer] += 1
        if tenant.name:
            self._stalled_of[tenant.name] += 1
        try:
            await abort(context, error)
        finally:
            _take_away(self._stalled, peer)
            if tenant.name:
                _take_away(self._stalled_of, tenant.name)

    def _account(self, call: Call | None, code: grpc.StatusCode, peer: str) -> None:
        method = call.method if call is not None else "Generate"
        counts = self.metrics.requests if method == "Generate" else self.metrics.tokenizations
        counts.labels(code.name).inc()
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": now, "peer": unquote(peer)}
        if call is not None:
            line |= {"method": method, "request": call.request_id, "tenant": call.tenant.name}
        line["code"] = code.name
        if call is not None and call.requests:
            total = time.monotonic() - call.arrival
            self.metrics.observe(call.requests, total)
            line |= _about(call.requests) | {"total_s": round(total, 4)}
        requests_log.info(json.dumps(line))
        if self._trace is not None and call is not None and method == "Generate":
            who = (call.request_id, call.tenant.name)
            self._trace(Ended(method, *who, call.arrival, code, call.requests, call.carrier))


def _take_away(counts: Counter[T], name: T) -> None:
    """Counts one less, and forgets a name that has none."""
    counts[name] -= 1
    if not counts[name]:
        del counts[name]


def _about(requests: list[Request]) -> dict[str, Any]:
    first = requests[0].metrics
    return {
        "prompt_tokens": len(requests[0].prompt_token_ids),
        "cached_tokens": first.num_cached_tokens,
        "tokens": [len(request.generated) for request in requests],
        "finish": [request.finish_reason.value if request.finish_reason else None for request in requests],
        "ttft_s": round(first.time_to_first_token, 4),
    }
