"""The step channel between processes: ZeroMQ PUSH and PULL.

Ray places the ranks and watches them, but a call to an actor costs milliseconds; a message here a tenth of one.
On one host the sockets are files in a folder only this user may enter. Across hosts they are TCP, encrypted and
authenticated with CURVE (curvezmq.org): the engine admits the keys it made for its own ranks and no others.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field

import zmq
from zmq.auth.thread import ThreadAuthenticator

from headwise.cluster.channel import ChannelError, EngineChannel, Kind, MessageTooLargeError, ShardChannel
from headwise.workers.errors import InvalidValueError
from headwise.workers.leftovers import SocketFolder
from headwise.workers.plan import MAX_MESSAGE_BYTES

SEND_TIMEOUT_S = 3.0
"""How long a message may wait for a receiver that does not read; steps are answered one by one, so queues are short."""


@dataclass(frozen=True, slots=True)
class ShardEndpoint:
    """What one rank needs to connect. With CURVE it holds the rank's secret key: hand it to nobody else."""

    rank: int
    plans: str
    transfers: str
    replies: str
    server_key: bytes = b""
    public_key: bytes = b""
    secret_key: bytes = field(default=b"", repr=False)


class ZmqEngineChannel(EngineChannel):
    def __init__(self, world_size: int, transport: str = "ipc", host: str = "127.0.0.1") -> None:
        """
        Args:
            transport: ``ipc`` where all ranks are on this host, else ``tcp``.
            host: the address to bind with tcp; the ports come from the system.

        Raises:
            InvalidValueError: another transport, or the folder for temporary files has too long a path.
        """
        if transport not in ("ipc", "tcp"):
            raise InvalidValueError("transport", transport, "must be ipc or tcp")
        self.world_size = world_size
        self._context = zmq.Context()
        self._folder: SocketFolder | None = None
        self._authenticator: ThreadAuthenticator | None = None
        # Each guards the sockets of one use, so that close() destroys none under a thread that uses it. Reentrant: a
        # forgotten channel may be collected, and closed, on the thread that uses it.
        self._sending, self._receiving, self._waking = threading.RLock(), threading.RLock(), threading.RLock()
        self._closed = False
        try:
            self._keys = _Keys(world_size) if transport == "tcp" else None
            if self._keys is not None:
                self._admit(self._keys)
            else:
                self._folder = SocketFolder()
            self._replies, self._replies_at = self._bind(zmq.PULL, host, "replies")
            plans = [self._bind(zmq.PUSH, host, f"plans-{rank}") for rank in range(world_size)]
            self._plans, self._plans_at = [socket for socket, _ in plans], [address for _, address in plans]
            transfers = [self._bind(zmq.PUSH, host, f"transfers-{rank}") for rank in range(world_size)]
            self._transfers = [socket for socket, _ in transfers]
            self._transfers_at = [address for _, address in transfers]
            self._wake_in, self._wake_out = _pair(self._context)
            self._poller = zmq.Poller()
            self._poller.register(self._replies, zmq.POLLIN)
            self._poller.register(self._wake_in, zmq.POLLIN)
        except BaseException:
            self._closed = True
            self._destroy()
            raise

    def endpoint(self, rank: int) -> ShardEndpoint:
        """What :class:`ZmqShardChannel` of that rank connects with."""
        addresses = self._plans_at[rank], self._transfers_at[rank], self._replies_at
        if self._keys is None:
            return ShardEndpoint(rank, *addresses)
        public, secret = self._keys.ranks[rank]
        return ShardEndpoint(rank, *addresses, self._keys.server[0], public, secret)

    def send(self, rank: int, kind: Kind, payload: bytes) -> None:
        with self._sending:
            if self._closed:
                raise ChannelError(f"the channel to rank {rank} is closed")
            sockets = self._transfers if kind == Kind.TRANSFER else self._plans
            _send(sockets[rank], [bytes([kind]), payload], f"rank {rank}")

    def receive(self, timeout_s: float | None) -> tuple[Kind, int, bytes] | None:
        with self._receiving:
            if self._closed:
                return None
            events = dict(self._poller.poll(_milliseconds(timeout_s)))
            if self._replies in events:
                kind, rank, payload = self._replies.recv_multipart()
                return Kind(kind[0]), int.from_bytes(rank, "big"), payload
            if self._wake_in in events:
                self._wake_in.recv()
            return None

    def wake(self) -> None:
        with self._waking:
            if not self._closed:
                self._ring()

    def close(self) -> None:
        """Closes the sockets and removes their folder. Idempotent. May be called on any thread: a :meth:`receive` in
        progress ends at once, a :meth:`send` within SEND_TIMEOUT_S. Messages not read yet are lost."""
        with self._waking:
            if self._closed:
                return
            self._closed = True
            self._ring()
        with self._sending, self._receiving:
            self._destroy()

    def _ring(self) -> None:
        # A full queue says that many calls before this one are still to be seen: one more adds nothing.
        with contextlib.suppress(zmq.Again):
            self._wake_out.send(b"", zmq.NOBLOCK)

    def _destroy(self) -> None:
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.destroy(linger=0)
        if self._folder is not None:
            self._folder.close()

    def _bind(self, kind: int, host: str, name: str) -> tuple[zmq.Socket[bytes], str]:
        socket = _socket(self._context, kind)
        if self._keys is None:
            assert self._folder is not None
            address = f"ipc://{self._folder.path}/{name}"
            socket.bind(address)
            return socket, address
        socket.curve_publickey, socket.curve_secretkey = self._keys.server
        socket.curve_server = True
        port = socket.bind_to_random_port(f"tcp://{host}")
        return socket, f"tcp://{host}:{port}"

    def _admit(self, keys: _Keys) -> None:
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", keys)


class ZmqShardChannel(ShardChannel):
    def __init__(self, endpoint: ShardEndpoint, send_timeout_s: float | None = None) -> None:
        """Args: ``send_timeout_s``: how long a message may wait for an engine that does not read. Default:
        SEND_TIMEOUT_S."""
        self._rank, self._lock = endpoint.rank.to_bytes(4, "big"), threading.Lock()
        self._context = zmq.Context()
        self._plans = _Inbox(self._context, self._connect(zmq.PULL, endpoint.plans, endpoint), "plans")
        self._transfers = _Inbox(self._context, self._connect(zmq.PULL, endpoint.transfers, endpoint), "transfers")
        self._replies = self._connect(zmq.PUSH, endpoint.replies, endpoint)
        if send_timeout_s is not None:
            self._replies.sndtimeo = int(send_timeout_s * 1000)
        self._error: BaseException | None = None
        self._transfers_over = False
        self._closed = False

    def receive_transfer(self) -> bytes | None:
        while not self._transfers_over:
            if (message := self._transfers.receive(None)) is not None:
                return message[1]
        return None

    def end_transfers(self) -> None:
        with self._lock:
            if not self._transfers_over and not self._closed:
                self._transfers_over = True
                self._transfers.wake()

    def receive(self, timeout_s: float | None) -> tuple[Kind, bytes] | None:
        message = self._plans.receive(timeout_s)
        if self._error is not None:
            raise self._error
        return (Kind(message[0][0]), message[1]) if message is not None else None

    def send(self, kind: Kind, payload: bytes) -> None:
        with self._lock:
            if self._closed:
                raise ChannelError("the channel to the engine is closed")
            _send(self._replies, [bytes([kind]), self._rank, payload], "the engine")

    def fail(self, error: BaseException) -> None:
        with self._lock:
            if self._error is None and not self._closed:
                self._error = error
                self._plans.wake()

    def close(self, linger_s: float = 1.0) -> None:
        """Idempotent. What was sent last gets ``linger_s`` to arrive."""
        with self._lock:  # not under a thread that sends
            self._closed = True
            self._context.destroy(linger=int(linger_s * 1000))

    def _connect(self, kind: int, address: str, endpoint: ShardEndpoint) -> zmq.Socket[bytes]:
        socket = _socket(self._context, kind)
        if endpoint.server_key:
            socket.curve_serverkey = endpoint.server_key
            socket.curve_publickey, socket.curve_secretkey = endpoint.public_key, endpoint.secret_key
        socket.connect(address)
        return socket


class _Inbox:
    """A socket that one thread reads and others can wake."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes], name: str) -> None:
        self._socket = socket
        self._wake_in, self._wake_out = _pair(context, name)
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(self._wake_in, zmq.POLLIN)

    def receive(self, timeout_s: float | None) -> list[bytes] | None:
        """The next message; None when the time is over, or :meth:`wake` was called."""
        events = dict(self._poller.poll(_milliseconds(timeout_s)))
        if self._wake_in in events:
            self._wake_in.recv()
            return None
        return self._socket.recv_multipart() if self._socket in events else None

    def wake(self) -> None:
        self._wake_out.send(b"")


class _Keys:
    """The engine's key pair and one for each rank; asked by ZAP whether a client may come in."""

    def __init__(self, world_size: int) -> None:
        self.server = zmq.curve_keypair()
        self.ranks = [zmq.curve_keypair() for _ in range(world_size)]

    def callback(self, domain: str, key: bytes) -> bool:
        return key in [public for public, _ in self.ranks]


def _socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.linger = 0
    socket.maxmsgsize = MAX_MESSAGE_BYTES
    socket.sndtimeo = int(SEND_TIMEOUT_S * 1000)
    return socket


def _pair(
    context: zmq.Context[zmq.Socket[bytes]], name: str = "replies"
) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    """The ends of a pipe within the process: the one to poll, and the one that wakes who polls."""
    polled, waking = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    polled.bind(f"inproc://wake-{name}")
    waking.connect(f"inproc://wake-{name}")
    return polled, waking


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1000)


def _send(socket: zmq.Socket[bytes], parts: list[bytes], receiver: str) -> None:
    if len(parts[-1]) > MAX_MESSAGE_BYTES:
        # The receiving socket would drop the connection over it, and the message with it.
        raise MessageTooLargeError(
            f"a message of {len(parts[-1])} bytes to {receiver} is over the limit of {MAX_MESSAGE_BYTES}"
        )
    try:
        socket.send_multipart(parts)
    except zmq.Again:
        raise ChannelError(f"{receiver} has not read for {int(socket.sndtimeo) / 1000:g} s") from None
