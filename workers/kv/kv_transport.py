"""How pieces of blocks get to a rank of another group: as bytes over gRPC, or through shared memory."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import grpc

from headwise.v1 import kv_transfer_pb2 as pb
from headwise.workers.addresses import is_loopback
from headwise.workers.errors import HeadwiseError, InvalidValueError
from headwise.workers.kv.chunk import PAYLOAD_BYTES, SHARED_BYTES, Chunk, encode_chunk
from headwise.workers.kv.handoff import HandoffSpec
from headwise.workers.kv.receiver import UNREADABLE, read_pem
from headwise.workers.kv.shared_file import FILE_BYTES, SharedFile

_MAX_DETAILS = 256
"""Characters of what the other end says."""

Read = Callable[[Chunk, memoryview], None]
"""Puts the keys and values of a chunk into memory of ``num_bytes``."""


class PushFailed(HeadwiseError):
    """Not all of a push has been written at the other end."""


class UnreadableError(PushFailed):
    """The other end cannot use this transport. Nothing was written, and another transport may do."""


class Cancellation:
    """Ends a push from another thread. Once it is set nothing more is sent."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_set = False
        self._cancel: Callable[[], object] = lambda: None

    def set(self) -> None:
        with self._lock:
            self._is_set = True
            self._cancel()

    def start(self, call: Callable[[], Any]) -> Any:
        """Starts a call of gRPC that ends with this.

        Raises:
            PushFailed: it is set.
        """
        with self._lock:
            if self._is_set:
                raise PushFailed("it was stopped")
            future = call()
            self._cancel = future.cancel
            return future


class KvTransport(ABC):
    """A way to one rank of decode. One thread uses it, but for what a Cancellation does.

    Whatever the way, chunks arrive by Push, their bytes in them or elsewhere, and the receiver checks them all alike.

    Attributes:
        chunk_bytes: the most that a chunk should have, unless one layer of one block has more.
    """

    chunk_bytes: int

    @abstractmethod
    def push(self, chunks: Sequence[Chunk], read: Read, cancellation: Cancellation, deadline: float) -> int:
        """Sends chunks, and waits until the other end has written them.

        Args:
            chunks: in their order, at least one; ``index``, ``last`` and ``shared`` are set here.
            read: called for each in order, by any thread. A call may still run when the push has failed; nothing of it
                is sent.
            deadline: of ``time.monotonic``.

        Returns:
            Bytes written at the other end.

        Raises:
            PushFailed: the other end refused, is gone or was too slow; ``cancellation`` was set; ``read`` failed. Some
                chunks may have been written.
            UnreadableError: another transport may do.
        """

    @abstractmethod
    def close(self) -> None:
        """Lets memory and connections go. Idempotent."""


class GrpcTransport(KvTransport):
    """Bytes in the messages. HTTP/2 grants the sender room as the receiver reads: a slow one slows it down, and neither
    keeps more than a window of it."""

    chunk_bytes = PAYLOAD_BYTES

    def __init__(self, address: str, spec: HandoffSpec) -> None:
        """
        Raises:
            InvalidValueError: ``spec.ca`` cannot be read, or is missing where the address is not loopback.
        """
        self._calls = _PushCalls(address, spec)

    def push(self, chunks: Sequence[Chunk], read: Read, cancellation: Cancellation, deadline: float) -> int:
        # gRPC's thread of a push that failed may still read into the buffer of that push.
        buffer = memoryview(bytearray(max(chunk.num_bytes for chunk in chunks)))

        def messages() -> Iterator[bytes]:
            for index, chunk in enumerate(chunks):
                data = buffer[: chunk.num_bytes]
                read(chunk, data)
                yield encode_chunk(replace(chunk, index=index, last=index == len(chunks) - 1), data)

        return self._calls.push(messages(), sum(chunk.num_bytes for chunk in chunks), cancellation, deadline)

    def close(self) -> None:
        self._calls.close()


class SharedMemoryTransport(KvTransport):
    """Messages without bytes, which are in a memory file of this process. What is in the file is not touched before the
    receiver has answered: a file of which that is not known is left to whoever reads it."""

    chunk_bytes = SHARED_BYTES

    def __init__(self, address: str, spec: HandoffSpec) -> None:
        """
        Raises:
            InvalidValueError: ``spec.ca`` cannot be read, or is missing where the address is not loopback.
        """
        self._calls = _PushCalls(address, spec)
        self._file: SharedFile | None = None

    def push(self, chunks: Sequence[Chunk], read: Read, cancellation: Cancellation, deadline: float) -> int:
        written = 0
        for part in _parts(chunks, FILE_BYTES):
            try:
                size = sum(chunk.num_bytes for chunk in part)
                file = self._file_of(size)
                written += self._calls.push(_shared_messages(part, read, file), size, cancellation, deadline)
            except PushFailed as error:
                self._drop_file()
                if written:  # too late for another transport
                    raise PushFailed(str(error)) from None
                raise
        return written

    def close(self) -> None:
        self._drop_file()
        self._calls.close()

    def _file_of(self, size: int) -> SharedFile:
        if self._file is None or len(self._file.view) < size:
            self._drop_file()
            try:
                self._file = SharedFile(size)
            except OSError as error:
                raise UnreadableError(f"there is no shared memory of {size} bytes: {error}") from None
        return self._file

    def _drop_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def _parts(chunks: Sequence[Chunk], most: int) -> Iterator[list[Chunk]]:
    """``chunks`` in pieces of up to ``most`` bytes, or of one chunk."""
    part: list[Chunk] = []
    size = 0
    for chunk in chunks:
        if part and size + chunk.num_bytes > most:
            yield part
            part, size = [], 0
        part.append(chunk)
        size += chunk.num_bytes
    yield part


def _shared_messages(chunks: Sequence[Chunk], read: Read, file: SharedFile) -> Iterator[bytes]:
    start = 0
    for index, chunk in enumerate(chunks):
        data = file.view[start : start + chunk.num_bytes]
        read(chunk, data)
        placed = replace(chunk, index=index, last=index == len(chunks) - 1, shared=(*file.place, start))
        yield encode_chunk(placed, data)
        start += chunk.num_bytes


class _PushCalls:
    """Calls of Push on a connection."""

    def __init__(self, address: str, spec: HandoffSpec) -> None:
        options = [
            ("grpc.max_send_message_length", -1),
            ("grpc.use_local_subchannel_pool", 1),  # or a new connection would wait because an old one failed
            ("grpc.enable_retries", 0),
            ("grpc.enable_http_proxy", 0),
        ]
        if spec.ca is None and not is_loopback(address.rpartition(":")[0].strip("[]")):
            limit = f"keys, values and tickets would go in clear text to {address}"
            raise InvalidValueError("ca", None, limit, "name whoever signed the certificates of that engine")
        if spec.ca is None:
            self._channel = grpc.insecure_channel(address, options)
        else:
            own: tuple[bytes, ...] = ()
            if spec.tls_cert is not None and spec.tls_key is not None:
                own = read_pem("tls_key", spec.tls_key), read_pem("tls_cert", spec.tls_cert)
            credentials = grpc.ssl_channel_credentials(read_pem("ca", spec.ca), *own)
            self._channel = grpc.secure_channel(address, credentials, options)
        service = pb.DESCRIPTOR.services_by_name["KvTransferService"].full_name
        self._push: Any = self._channel.stream_unary(
            f"/{service}/Push", request_serializer=None, response_deserializer=pb.PushResponse.FromString
        )

    def push(self, messages: Iterator[bytes], num_bytes: int, cancellation: Cancellation, deadline: float) -> int:
        """One stream, of which the other end has to write ``num_bytes``; returns that. Raises as KvTransport.push."""
        failures: list[Exception] = []
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise PushFailed("it had no time left")
        call = cancellation.start(lambda: self._push.future(_until_error(messages, failures), timeout=left_s))
        try:
            written: int = call.result().num_bytes
        except grpc.FutureCancelledError:
            raise PushFailed("it was stopped") from None
        except grpc.RpcError as error:
            if failures:
                raise PushFailed(f"{type(failures[0]).__name__}: {failures[0]}") from failures[0]
            kind = UnreadableError if call.code() == UNREADABLE else PushFailed
            raise kind(f"{call.code().name}: {_one_line(call.details() or '')}") from error
        if written != num_bytes:  # the answer came too early, or is made up
            raise PushFailed(f"num_bytes={written} in the answer: {num_bytes} bytes were to be written")
        return written

    def close(self) -> None:
        self._channel.close()


def _one_line(text: str) -> str:
    """A text of the other end as it may go to a log."""
    return "".join(one if one.isprintable() else "?" for one in text[:_MAX_DETAILS])


def _until_error(messages: Iterator[bytes], failures: list[Exception]) -> Iterator[bytes]:
    """Ends where ``messages`` fails: the receiver misses the last message then, and gRPC has nothing to log."""
    try:
        yield from messages
    except Exception as error:
        failures.append(error)
