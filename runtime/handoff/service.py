"""KvHandoffService: how other engines have this one compute prompts. Thin: checks what comes, and asks the engine.

What a call does is decided by the engine's Outbound; handlers keep nothing but who has said Hello.
"""

from __future__ import annotations

import ipaddress
import re
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Protocol, TypeAlias, TypeVar
from urllib.parse import unquote

import grpc
from google.protobuf.message import Message

from headwise.runtime.handoff.errors import MismatchError, NotFoundError, status_of
from headwise.runtime.handoff.messages import (
    Ask,
    Hello,
    HelloAnswer,
    Load,
    Mismatch,
    Status,
    TransferKey,
    keys_of,
    printable,
)
from headwise.v1 import kv_transfer_pb2 as pb
from headwise.v1.kv_transfer_pb2_grpc import KvHandoffServiceServicer
from headwise.workers import failpoints
from headwise.workers.errors import InvalidValueError
from headwise.workers.failpoints import Point
from headwise.workers.kv.handoff import KvEndpoint

A = TypeVar("A")
B = TypeVar("B")
T = TypeVar("T")
Context: TypeAlias = grpc.ServicerContext

MAX_DECODES = 64
"""Decode engines that are remembered; the one that was not heard of for longest makes room."""
MAX_WAIT_S = 60.0
"""For the answer to a call that has no deadline, or a later one."""
LOOPBACK = "loopback"
"""The host of all callers on this machine."""


class Outbound(Protocol):
    """What an engine does for other engines. Each call may come twice, with the same effect and the same answer."""

    def hello(self, epoch: int, endpoints: list[KvEndpoint]) -> Load:
        """Remembers a decode engine, and where its ranks take KV."""

    def forget(self, epoch: int) -> None:
        """Forgets a decode engine: its transfers are aborted."""

    def accept(self, ask: Ask) -> tuple[float, Load]:
        """Queues a prompt; returns in how many seconds it is expected to be sent, 0 if that is not known.

        Raises:
            RefusedError: there is no room; with the number and the limit.
            InvalidValueError: a token, or the namespace, is none of this engine's.
        """

    def renew(self, keys: list[TransferKey], lease_s: float) -> list[Status]:
        """How transfers stand, in the order of the keys; their leases end in ``lease_s`` from now."""

    def statuses(self, keys: list[TransferKey]) -> list[Status]:
        """How transfers stand, in the order of the keys."""

    def load(self) -> Load: ...

    def commit(self, key: TransferKey) -> Future[Status]:
        """COMMITTED once what was computed is known to be sound, else FAILED or UNKNOWN."""

    def abort(self, key: TransferKey, reason: str) -> None:
        """Ends an attempt: nothing of it is pushed from now on. Ignores what is not known."""


class Run(Protocol):
    """Runs a function, one at a time. The future, or the call itself, fails with what the function raises, or with
    another error if the engine has ended."""

    def __call__(self, function: Callable[[Outbound], T], /) -> Future[T]: ...


class HandoffService(KvHandoffServiceServicer):
    """The service of proto/headwise/v1/kv_transfer.proto. Its handlers are a plain grpc.Server's; a server of asyncio
    calls :meth:`answer`.

    Attributes:
        about: what Hello tells, but for ``version`` and ``load``. Another one takes its place with a new epoch.
    """

    def __init__(self, about: HelloAnswer, run: Run, encrypts: bool = False) -> None:
        """Args: ``encrypts``: whether the ranks of this engine send keys and values by TLS."""
        self.about, self._run, self._encrypts = about, run, encrypts
        # By epoch: where it calls from, and its ranks. Used only in what ``run`` runs.
        self._decodes: OrderedDict[int, tuple[str, list[KvEndpoint]]] = OrderedDict()

    def answer(self, method: str, request: Any, peer: str) -> Future[Any]:
        """Begins a call.

        Args:
            method: the RPC's name, such as ``Prefill``.
            request: its message.
            peer: where it comes from, as gRPC says it.

        Returns:
            Becomes the response. Cancel it if nobody waits any more. Fails with InvalidValueError, an error of
            runtime/handoff/errors.py, or whatever the engine ended with.
        """
        try:
            work = _METHODS[method](self, request, peer)
        except Exception as error:
            work = Future()
            work.set_exception(error)
        # Of its own, for what the engine is at cannot be cancelled, and may never end.
        answer = _then(work, lambda response: response)
        answer.add_done_callback(lambda answer: work.cancel() if answer.cancelled() else None)
        return answer

    def Hello(self, request: pb.HelloRequest, context: Context) -> pb.HelloResponse:
        return self._wait("Hello", request, context)

    def Prefill(self, request: pb.PrefillRequest, context: Context) -> pb.PrefillResponse:
        return self._wait("Prefill", request, context)

    def Renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewResponse:
        return self._wait("Renew", request, context)

    def Commit(self, request: pb.CommitRequest, context: Context) -> pb.CommitResponse:
        return self._wait("Commit", request, context)

    def AbortTransfer(self, request: pb.AbortTransferRequest, context: Context) -> pb.AbortTransferResponse:
        return self._wait("AbortTransfer", request, context)

    def Query(self, request: pb.QueryRequest, context: Context) -> pb.QueryResponse:
        return self._wait("Query", request, context)

    def _wait(self, method: str, request: Message, context: Context) -> Any:
        answer = self.answer(method, request, context.peer())

        def gone() -> None:  # or a thread would wait for nobody
            answer.cancel()

        if not context.add_callback(gone):
            gone()
        try:
            left_s = context.time_remaining()
            return answer.result(MAX_WAIT_S if left_s is None else min(left_s, MAX_WAIT_S))
        except TimeoutError:
            answer.cancel()
            context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the engine did not answer in time")
        except Exception as error:
            context.abort(*status_of(error))

    def _hello(self, request: pb.HelloRequest, peer: str) -> Future[pb.HelloResponse]:
        hello, host, about = Hello.of(request), host_of(peer), self.about
        fit = about.identity.agree(hello.identity)
        if isinstance(fit, Mismatch):
            raise MismatchError(str(fit))
        for end in hello.endpoints:
            _check_address(end.address, host)
        if host != LOOPBACK and not hello.tls:
            raise InvalidValueError("tls", False, f"keys and values would go in clear text to {host}")
        if hello.tls != self._encrypts:  # else every prompt would be computed, and then not arrive
            ours, theirs = ("by TLS" if tls else "in clear text" for tls in (self._encrypts, hello.tls))
            fix = "--handoff-ca of prefill and --handoff-host of decode have to fit"
            raise MismatchError(f"tls: keys and values are sent {ours} and taken {theirs}; {fix}")

        def remember(outbound: Outbound) -> pb.HelloResponse:
            known = self._decodes.setdefault(hello.epoch, (host, hello.endpoints))
            if known != (host, hello.endpoints):
                raise InvalidValueError("epoch", hello.epoch, "another engine has this epoch")
            self._decodes.move_to_end(hello.epoch)
            while len(self._decodes) > MAX_DECODES:
                outbound.forget(self._decodes.popitem(last=False)[0])
            load = outbound.hello(hello.epoch, hello.endpoints)
            return replace(about, version=fit, load=load).message()

        return self._run(remember)

    def _prefill(self, request: pb.PrefillRequest, peer: str) -> Future[pb.PrefillResponse]:
        about, host = self.about, host_of(peer)
        ask = Ask.of(request, about.identity.block_size, about.max_tokens, about.max_lease_s)

        def accept(outbound: Outbound) -> pb.PrefillResponse:
            self._check([ask.key], host)
            expected_s, load = outbound.accept(ask)
            return pb.PrefillResponse(expected_s=expected_s, load=load.message())

        return self._run(accept)

    def _renew(self, request: pb.RenewRequest, peer: str) -> Future[pb.RenewResponse]:
        keys, lease_s, host = keys_of(request.keys), request.lease_s, host_of(peer)
        if not 0 < lease_s <= self.about.max_lease_s:
            raise InvalidValueError("lease_s", lease_s, f"must be over 0, at most {self.about.max_lease_s:g}")

        def renew(outbound: Outbound) -> pb.RenewResponse:
            self._check(keys, host)
            statuses = [status.message() for status in outbound.renew(keys, lease_s)]
            return pb.RenewResponse(statuses=statuses, load=outbound.load().message())

        return self._run(renew)

    def _commit(self, request: pb.CommitRequest, peer: str) -> Future[pb.CommitResponse]:
        key, host = TransferKey.of(request.key), host_of(peer)

        def commit(outbound: Outbound) -> Future[Status]:
            self._check([key], host)
            if failpoints.ENABLED:
                failpoints.hit(Point.HANDOFF_COMMIT)
            return outbound.commit(key)

        return _then(_flat(self._run(commit)), lambda status: pb.CommitResponse(status=status.message()))

    def _abort(self, request: pb.AbortTransferRequest, peer: str) -> Future[pb.AbortTransferResponse]:
        key, reason, host = TransferKey.of(request.key), printable(request.reason), host_of(peer)

        def abort(outbound: Outbound) -> pb.AbortTransferResponse:
            if self._knows(key, host):
                outbound.abort(key, reason)
            return pb.AbortTransferResponse()

        return self._run(abort)

    def _query(self, request: pb.QueryRequest, peer: str) -> Future[pb.QueryResponse]:
        keys, host = keys_of(request.keys), host_of(peer)

        def query(outbound: Outbound) -> pb.QueryResponse:
            self._check(keys, host)
            statuses = [status.message() for status in outbound.statuses(keys)]
            return pb.QueryResponse(epoch=self.about.epoch, statuses=statuses, load=outbound.load().message())

        return self._run(query)

    def _check(self, keys: list[TransferKey], host: str) -> None:
        """
        Raises:
            NotFoundError: a key is of another epoch, or of a decode engine that has not said Hello from there.
        """
        for key in keys:
            if not self._knows(key, host):
                raise NotFoundError(
                    f"epoch {self.about.epoch} has not met decode's epoch {key.decode_epoch}, or is "
                    f"not the epoch {key.prefill_epoch} that was asked; say Hello"
                )

    def _knows(self, key: TransferKey, host: str) -> bool:
        known = self._decodes.get(key.decode_epoch)
        if known is None or known[0] != host or key.prefill_epoch != self.about.epoch:
            return False
        self._decodes.move_to_end(key.decode_epoch)
        return True


_METHODS: dict[str, Callable[[HandoffService, Any, str], Future[Any]]] = {
    "Hello": HandoffService._hello,
    "Prefill": HandoffService._prefill,
    "Renew": HandoffService._renew,
    "Commit": HandoffService._commit,
    "AbortTransfer": HandoffService._abort,
    "Query": HandoffService._query,
}


def host_of(peer: str) -> str:
    """The host of a peer of gRPC's, such as ``ipv4:192.0.2.1:5000``: an IP address, or ``loopback``.

    Raises:
        InvalidValueError: it has none.
    """
    scheme, _, rest = unquote(peer).partition(":")
    if scheme == "unix":
        return LOOPBACK
    try:
        return _host(rest.rpartition(":")[0].strip("[]"))
    except ValueError:
        raise InvalidValueError("peer", peer, "must call from an IP address or a Unix socket") from None


def _host(host: str) -> str:
    """
    Raises:
        ValueError: no IP address.
    """
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return LOOPBACK if address.is_loopback else str(address)


def _check_address(address: str, host: str) -> None:
    """Sees to it that no peer has our ranks connect to anybody but the peer's own host.

    Raises:
        InvalidValueError: the address is on another host than the caller, or no IP address with a port.
    """
    name, _, port = address.rpartition(":")
    name = name[1:-1] if name.startswith("[") and name.endswith("]") else name
    try:
        there = LOOPBACK if name == "localhost" else _host(name)
    except ValueError:
        there = ""
    if "%" in name:  # a zone may be any text, which gRPC reads as a part of the address
        there = ""
    if there != host or not re.fullmatch("[1-9][0-9]{0,4}", port) or int(port) > 65535:
        raise InvalidValueError("endpoints.address", address, f"must be IP:PORT on the host that calls, {host}")


def _then(future: Future[A], convert: Callable[[A], B]) -> Future[B]:
    """What becomes of a future's result. Cancelling it leaves the future itself alone, which others may wait for."""
    result: Future[B] = Future()

    def done(future: Future[A]) -> None:
        if result.set_running_or_notify_cancel():
            _settle(result, lambda: convert(future.result()))

    future.add_done_callback(done)
    return result


def _flat(future: Future[Future[T]]) -> Future[T]:
    """The future that a future becomes."""
    result: Future[T] = Future()

    def inner(future: Future[T]) -> None:
        if result.set_running_or_notify_cancel():
            _settle(result, future.result)

    def outer(future: Future[Future[T]]) -> None:
        if future.cancelled() or future.exception() is not None:
            inner(future)  # type: ignore[arg-type]  # without a result, it can stand for the other
        else:
            future.result().add_done_callback(inner)

    future.add_done_callback(outer)
    return result


def _settle(future: Future[T], result: Callable[[], T]) -> None:
    try:
        future.set_result(result())
    except Exception as error:
        future.set_exception(error)
