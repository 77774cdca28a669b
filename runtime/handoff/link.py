"""PrefillLink: a decode engine's connection to one prefill engine."""

from __future__ import annotations

import logging
import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc

from headwise.runtime.addresses import leads_to_loopback
from headwise.runtime.handoff.following import MAX_SNAPSHOT_BYTES, Following
from headwise.runtime.handoff.messages import (
    LEASE_S,
    MAX_KEYS,
    Ask,
    Hello,
    HelloAnswer,
    Load,
    Mismatch,
    State,
    Status,
    TransferKey,
    printable,
)
from headwise.runtime.handoff.receiving import Cause
from headwise.v1 import kv_transfer_pb2 as pb
from headwise.v1.kv_transfer_pb2_grpc import KvHandoffServiceStub
from headwise.workers.errors import InvalidValueError

OWN_PREFILL = "prefill"
"""The name of a prefill engine of the same program, whose address tells nobody anything."""
RENEW_S = 5.0
"""Between two renewals, or a quarter of a lease if that is less; also how soon an idle peer is missed."""
CALL_TIMEOUT_S = 5.0
"""For a peer to answer what it can answer at once."""
COMMIT_TIMEOUT_S = 20.0
"""For a peer to say whether what it computed is sound; less than a lease."""
BACKOFF_S = 0.1
MAX_BACKOFF_S = 5.0
MISMATCH_BACKOFF_S = 30.0
"""Between two tries to meet an engine that does not fit: it has to be replaced by another first."""

_CLOSE_S = 5.0
_CHANNEL_OPTIONS = [
    ("grpc.enable_retries", 0),
    # Peers are named by the configuration: what goes to them goes by no proxy of the environment.
    ("grpc.enable_http_proxy", 0),
    # A socket of its own, which ends with the link.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.max_receive_message_length", MAX_SNAPSHOT_BYTES),
]

_logger = logging.getLogger(__name__)

_CAUSES = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: Cause.REFUSED,
    grpc.StatusCode.UNAUTHENTICATED: Cause.REFUSED,
    grpc.StatusCode.PERMISSION_DENIED: Cause.REFUSED,
    grpc.StatusCode.FAILED_PRECONDITION: Cause.REFUSED,
    grpc.StatusCode.UNAVAILABLE: Cause.UNREACHABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: Cause.UNREACHABLE,
    grpc.StatusCode.CANCELLED: Cause.CANCELLED,
}
"""Any other code says that the peer is wrong, takes this engine to be, or does not know what it is asked about."""
_DOUBTS = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.NOT_FOUND)
"""After which the peer may not be there any more, or be another."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a call.

    Attributes:
        cause: None if the peer did what it was asked. Else REFUSED (it has no room, or does not let this engine in),
            UNREACHABLE (it did not answer, in time or at all), CANCELLED (the link was closed), or PEER (it does not
            know the transfer or its epoch, finds the call invalid, or its answer is).
        detail: what the peer said, as it may go to a log.
        expected_s: of an ask: in how many seconds the last block is expected to be sent; 0 if not known.
        load: of an ask.
        status: of a commit.
    """

    cause: Cause | None
    detail: str = ""
    expected_s: float = 0.0
    load: Load | None = None
    status: Status | None = None


Answered = Callable[[Answer], None]
Renewed = Callable[[TransferKey, Status | None], None]
"""Gets how a transfer stands after each renewal; None if the peer did not answer."""


class PrefillLink:
    """Says Hello until the peer answers, renews leases, and says Hello again when the peer was lost.

    Everything may be called on any thread, and nothing but :meth:`close` waits. Callbacks come on threads of the link
    and of gRPC, and must not wait either. Attributes may be read on any thread.

    Attributes:
        name, address: of the peer.
        session: what the peer tells of itself; None while it is not connected.
        problem: why it is not; None if it is, or before the first try has ended.
        load: the peer's, when it was heard of last.
        digests: of the blocks that the peer is known to hold; none where it does not tell.
    """

    def __init__(
        self,
        address: str,
        hello: Hello,
        credentials: grpc.ChannelCredentials | None,
        token: str | None,
        on_change: Callable[[], None],
        lease_s: float = LEASE_S,
        name: str | None = None,
    ) -> None:
        """
        Args:
            address: ``host:port`` or ``unix:PATH``.
            name: None: OWN_PREFILL of an engine of the same program, else the address.
            credentials: None connects in clear text.
            token: is sent with each call.
            on_change: called when the link has gained or lost its session.
            lease_s: what leases are renewed to.

        Raises:
            InvalidValueError: the token would go to another machine in clear text.
        """
        if token and credentials is None and not leads_to_loopback(address):
            limit = f"would go in clear text to {address}, which is not loopback"
            raise InvalidValueError("token", "...", limit, "connect by TLS")
        self.name = name or (OWN_PREFILL if address.startswith("unix:") else address)
        self.address, self.load = address, Load()
        self._connected, self._lease_s = threading.Event(), lease_s
        self.session: HelloAnswer | None = None
        self.problem: str | None = None
        self._hello, self._on_change = hello, on_change
        self._metadata = [("authorization", f"Bearer {token}")] if token else []
        if credentials is None:
            self._channel = grpc.insecure_channel(address, _CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(address, credentials, _CHANNEL_OPTIONS)
        self._stub = KvHandoffServiceStub(self._channel)
        self._lock = threading.Lock()
        self._tracked: dict[TransferKey, Renewed] = {}
        self._asking: Counter[TransferKey] = Counter()
        self._wake, self._closed = threading.Event(), False
        self._open, self._idle = 0, threading.Condition(self._lock)
        self._following = Following(self._channel, self._metadata, address, self._wake.set)
        self._thread = threading.Thread(target=self._run, name=f"headwise-link-{address}", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"PrefillLink({self.name!r})"

    @property
    def digests(self) -> set[bytes]:
        return self._following.digests

    def wait(self, timeout_s: float) -> bool:
        """Waits until the link has a session; returns whether it has."""
        return self._connected.wait(timeout_s)

    def ask(self, ask: Ask, answered: Answered) -> None:
        """Asks the peer to compute a prompt. May be repeated. Its lease is not renewed before the answer: a peer that
        heard of the renewal first would not know the transfer."""

        def over(answer: Answer) -> None:
            with self._lock:
                self._asking -= Counter([ask.key])
            answered(answer)

        def accepted(response: pb.PrefillResponse) -> Answer:
            self.load = load = Load.of(response.load)
            return Answer(None, expected_s=max(0.0, response.expected_s), load=load)

        with self._lock:
            self._asking[ask.key] += 1
        self._call(self._stub.Prefill, ask.message(), min(CALL_TIMEOUT_S, ask.deadline_s), accepted, over)

    def commit(self, key: TransferKey, answered: Answered) -> None:
        """Tells the peer that every byte is here, and asks whether what it computed is sound. May be repeated."""

        def decided(response: pb.CommitResponse) -> Answer:
            return Answer(None, status=Status.of(response.status))

        self._call(self._stub.Commit, pb.CommitRequest(key=key.message()), COMMIT_TIMEOUT_S, decided, answered)

    def abort(self, key: TransferKey, reason: str) -> None:
        """Has the peer end an attempt. Where the peer does not hear of it, the attempt's lease ends it."""
        request = pb.AbortTransferRequest(key=key.message(), reason=printable(reason))
        self._call(
            self._stub.AbortTransfer, request, CALL_TIMEOUT_S, lambda response: Answer(None), lambda answer: None
        )

    def track(self, key: TransferKey, renewed: Renewed) -> None:
        """Renews a transfer's lease from now on. Ask first."""
        with self._lock:
            self._tracked[key] = renewed

    def untrack(self, key: TransferKey) -> None:
        """Renews it no more; one more ``renewed`` may be on its way."""
        with self._lock:
            self._tracked.pop(key, None)

    def close(self) -> None:
        """Ends the connection: calls that are open are ``cancelled``, and nothing more is renewed. Idempotent. Not from
        a callback."""
        with self._lock:
            self._closed = True
        self._wake.set()
        self._channel.close()
        # A forgotten LLM may be collected on any thread, and none can wait for itself.
        if threading.current_thread() is not self._thread:
            self._thread.join(_CLOSE_S)
        self._following.close(_CLOSE_S)
        with self._lock:
            self._idle.wait_for(lambda: not self._open, _CLOSE_S)

    def _call(
        self, method: Any, request: Any, timeout_s: float, read: Callable[[Any], Answer], answered: Answered
    ) -> None:
        with self._lock:
            # Under the lock, so that close() finds every call it has to wait for.
            future = None if self._closed else method.future(request, timeout=timeout_s, metadata=self._metadata)
            self._open += future is not None
        if future is None:
            answered(Answer(Cause.CANCELLED, "the link is closed"))
        else:
            future.add_done_callback(partial(self._over, read, answered))

    def _over(self, read: Callable[[Any], Answer], answered: Answered, future: Any) -> None:
        try:
            answer = _answer(read, future)
            if future.code() in _DOUBTS and self.session is not None:
                self._wake.set()
            answered(answer)
        except Exception:
            _logger.exception("what was to be told of an answer of %s failed", self.name)
        finally:
            with self._lock:
                self._open -= 1
                self._idle.notify_all()

    # On the link's own thread.

    def _run(self) -> None:
        backoff_s = BACKOFF_S
        while not self._closed:
            if self.session is None:
                fits = self._greet()
                wait_s = backoff_s if fits else MISMATCH_BACKOFF_S
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
            elif self._renew():
                wait_s, backoff_s = min(RENEW_S, self._lease_s / 4), BACKOFF_S
            else:
                wait_s = 0.0
            # Not all links of a machine at once.
            self._wake.wait(wait_s * random.uniform(0.8, 1.0))
            self._wake.clear()
        self.session = None

    def _greet(self) -> bool:
        """Says Hello; returns False if the peer does not fit."""
        try:
            session = HelloAnswer.of(self._stub.Hello(self._hello.message(), **self._options()))
            fit = self._hello.identity.agree(session.identity)
            if isinstance(fit, Mismatch):
                self._set(None, f"does not fit: {fit}", logging.ERROR)
                return False
            if session.version != fit:
                raise InvalidValueError("version", session.version, f"must be {fit}, the highest that both speak")
        except _FAILURES as error:
            mismatch = _code(error) is grpc.StatusCode.FAILED_PRECONDITION
            self._set(None, _describe(error), logging.ERROR if mismatch else logging.WARNING)
            return not mismatch
        self.load = session.load
        self._set(session, None, logging.INFO)
        self._following.begin()
        return True

    def _renew(self) -> bool:
        """Renews all leases; returns False if the session is lost."""
        session, tracked = self.session, self._renewable()
        assert session is not None
        anew = Status(State.UNKNOWN, "the engine has another epoch now")
        self._tell(tracked, {key: anew for key in tracked if key.prefill_epoch != session.epoch})
        keys = [key for key in tracked if key.prefill_epoch == session.epoch]
        try:
            for at in range(0, max(1, len(keys)), MAX_KEYS):
                part = keys[at : at + MAX_KEYS]
                statuses = self._renew_some(part, session)
                self._tell(tracked, dict(zip(part, statuses, strict=True)))
        except _FAILURES as error:
            self._set(None, _describe(error), logging.WARNING)
            self._tell(tracked, dict.fromkeys(keys))
            return False
        self._following.go_on()
        return True

    def _renew_some(self, keys: list[TransferKey], session: HelloAnswer) -> list[Status]:
        """
        Raises:
            InvalidValueError: it is another engine by now, or its answer is malformed.
        """
        messages = [key.message() for key in keys]
        response: Any
        if keys:
            lease_s = min(self._lease_s, session.max_lease_s)
            response = self._stub.Renew(pb.RenewRequest(keys=messages, lease_s=lease_s), **self._options())
        else:
            response = self._stub.Query(pb.QueryRequest(), **self._options())
            if response.epoch != session.epoch:
                raise InvalidValueError("epoch", response.epoch, f"was {session.epoch}")
        if len(response.statuses) != len(keys):
            raise InvalidValueError("statuses", len(response.statuses), f"must be {len(keys)}")
        self.load = Load.of(response.load)
        return [Status.of(status) for status in response.statuses]

    def _renewable(self) -> dict[TransferKey, Renewed]:
        with self._lock:
            return {key: renewed for key, renewed in self._tracked.items() if key not in self._asking}

    def _tell(self, tracked: dict[TransferKey, Renewed], statuses: Mapping[TransferKey, Status | None]) -> None:
        for key, status in statuses.items():
            try:
                tracked[key](key, status)
            except Exception:
                _logger.exception("what was to be told of a renewal by %s failed", self.name)

    def _set(self, session: HelloAnswer | None, problem: str | None, level: int) -> None:
        if self._closed or (session, problem) == (self.session, self.problem):
            return
        self.session, self.problem = session, problem
        if session is None:
            self._connected.clear()
            self._following.end()
        else:
            self._connected.set()
        who = "the prefill engine" if self.name == OWN_PREFILL else f"prefill at {self.name}"
        _logger.log(level, "%s: %s", who, problem or "connected")
        try:
            self._on_change()
        except Exception:
            _logger.exception("what was to be told of a change of %s failed", self.name)

    def _options(self) -> dict[str, Any]:
        return {"timeout": CALL_TIMEOUT_S, "metadata": self._metadata}


_FAILURES = (grpc.RpcError, ValueError)
"""Of a call: it failed, its answer is malformed, or the channel is closed."""


def _answer(read: Callable[[Any], Answer], future: Any) -> Answer:
    try:
        return read(future.result())
    except grpc.FutureCancelledError:
        return Answer(Cause.CANCELLED, "the link is closed")
    except grpc.RpcError as error:
        return Answer(_CAUSES.get(error.code(), Cause.PEER), _describe(error))
    except ValueError as error:
        return Answer(Cause.PEER, _describe(error))


def _code(error: BaseException) -> grpc.StatusCode | None:
    return error.code() if isinstance(error, grpc.RpcError) else None


def _describe(error: BaseException) -> str:
    if isinstance(error, grpc.RpcError):
        return f"{error.code().name}: {printable(error.details() or '')}"
    return printable(str(error))
