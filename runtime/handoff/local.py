"""A HandoffService for engines of the same program: on a socket in a folder that only this user may enter; and for
those of the program that are on other hosts, by TLS."""

from __future__ import annotations

import hmac
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from headwise.runtime.handoff.service import HandoffService
from headwise.v1.kv_transfer_pb2_grpc import add_KvHandoffServiceServicer_to_server
from headwise.workers.addresses import join
from headwise.workers.leftovers import SocketFolder

MAX_MESSAGE_BYTES = 5 << 20
"""A million tokens."""
_THREADS = "headwise-handoff"
_SPARE_CALLS = 8
"""Calls at once beyond a Commit for each transfer."""


class LocalServer:
    """Serves until it is closed.

    Attributes:
        address: what a :class:`~headwise.runtime.handoff.link.PrefillLink` on this host connects to.
        remote_address: the same on another host; None where it is not served.
    """

    def __init__(
        self,
        service: HandoffService,
        host: str | None = None,
        credentials: grpc.ServerCredentials | None = None,
        token: str | None = None,
    ) -> None:
        """
        Args:
            host, credentials: the address of this host, and by what it serves other hosts; both or none.
            token: who does not show it is refused; None asks for none.

        Raises:
            InvalidValueError: the folder for temporary files has too long a path.
            RuntimeError: ``host`` is not an address of this host.
        """
        most = service.about.max_transfers + _SPARE_CALLS
        self._threads = ThreadPoolExecutor(most, _THREADS)
        self._folder = SocketFolder()
        self.address = f"unix:{self._folder.path}/handoff"
        options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
        inside: list[grpc.ServerInterceptor] = [_Doorkeeper(token)] if token is not None else []
        self._server = grpc.server(self._threads, interceptors=inside, options=options, maximum_concurrent_rpcs=most)
        try:
            add_KvHandoffServiceServicer_to_server(service, self._server)
            self._server.add_insecure_port(self.address)
            self.remote_address = None
            if host is not None and credentials is not None:
                self.remote_address = join(host, self._server.add_secure_port(join(host, 0), credentials))
            self._server.start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the calls that are open, and removes the socket. Idempotent. Waits for no engine."""
        # A forgotten LLM may be collected on a thread that answers a call, which cannot wait for its own end.
        wait = not threading.current_thread().name.startswith(_THREADS)
        stopped = self._server.stop(None)
        if wait:
            stopped.wait()
        self._threads.shutdown(wait)
        self._folder.close()


class _Doorkeeper(grpc.ServerInterceptor):
    """Lets in who shows a token."""

    def __init__(self, token: str) -> None:
        self._wanted = f"Bearer {token}".encode()

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        shown = next((value for key, value in details.invocation_metadata if key == "authorization"), "")
        if hmac.compare_digest(shown.encode() if isinstance(shown, str) else shown, self._wanted):
            return continuation(details)
        return grpc.unary_unary_rpc_method_handler(_refuse)


def _refuse(request: object, context: grpc.ServicerContext) -> None:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "this engine hands over KV within its deployment alone")
