"""An HTTP/2 client that breaks rules: frames made by hand, so that a test decides when to read, to end, or to go on."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import Self

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
ACK, END_STREAM, END_HEADERS = 1, 1, 4
INITIAL_WINDOW_SIZE = 4

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class RawClient:
    """A connection to a gRPC server. Use it as a context manager."""

    def __init__(self, address: str, *, window: int = 0, source: str = "", receive_buffer: int = 0) -> None:
        """
        Args:
            window: bytes that the server may send on a stream; it never gets more.
            source: the address to connect from; empty: the system's choice.
            receive_buffer: bytes of the socket's buffer; 0: the system's choice.
        """
        host, _, port = address.rpartition(":")
        self._socket = socket.socket()
        self._socket.settimeout(30.0)
        if receive_buffer:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        if source:
            self._socket.bind((source, 0))
        self._socket.connect((host, int(port)))
        self._address, self._next_stream = address, 1
        self.send(_PREFACE + frame(SETTINGS, payload=struct.pack(">HI", INITIAL_WINDOW_SIZE, window)))

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def call(self, method: str, message: bytes | None = b"", token: str = "", ended: bool = True) -> int:
        """Sends a call; returns its stream.

        Args:
            message: None sends the call's headers alone.
            ended: whether the stream is closed at this end, as a client does that has no more to send.
        """
        flags = END_HEADERS | (END_STREAM if message is None and ended else 0)
        stream = self.headers(method, token, flags)
        if message is not None:
            prefixed = struct.pack(">BI", 0, len(message)) + message
            self.send(frame(DATA, END_STREAM if ended else 0, stream, prefixed))
        return stream

    def headers(self, method: str, token: str = "", flags: int = END_HEADERS) -> int:
        """Sends the headers of a call; returns its stream. Without END_HEADERS, they go on."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": method,
            ":authority": self._address,
            "content-type": "application/grpc",
            "te": "trailers",
        }
        if token:
            fields["authorization"] = f"Bearer {token}"
        self.send(frame(HEADERS, flags, stream, b"".join(header(*field) for field in fields.items())))
        return stream

    def frames(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Yields (type, flags, stream, payload) of what the server sends, until it closes the connection; answers its
        settings and pings meanwhile."""
        while (head := self.receive(9)) is not None:
            size, kind, flags, stream = int.from_bytes(head[:3]), head[3], head[4], int.from_bytes(head[5:])
            payload = self.receive(size)
            if payload is None:
                return
            if kind in (SETTINGS, PING) and not flags & ACK:
                self.send(frame(kind, ACK, 0, payload if kind == PING else b""))
            yield kind, flags, stream, payload

    def until_closed(self) -> None:
        """Returns once the server has closed the connection."""
        for _ in self.frames():
            pass

    def receive(self, size: int) -> bytes | None:
        """Bytes as they come; None if the connection ends before there are so many."""
        data = b""
        while len(data) < size:
            try:
                more = self._socket.recv(size - len(data))
            except ConnectionResetError:
                return None
            if not more:
                return None
            data += more
        return data

    def half_close(self) -> None:
        """Sends no more, at the level of TCP; still reads."""
        self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """One frame; RFC 9113, section 4.1."""
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def header(name: str, value: str) -> bytes:
    """A header field that is never indexed, of less than 127 bytes a string; RFC 7541, section 6.2.3."""
    return b"\x10" + b"".join(bytes([len(text)]) + text.encode() for text in (name, value))
