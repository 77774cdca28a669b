"""One message of a Push: a piece of a transfer's blocks, and who sends it.

On the wire it is the PushRequest of kv_transfer.proto, put together and taken apart by hand, so that the payload is
copied once here and never there. The header is msgpack: (fields, checksum), where ``fields`` are the packed fields of a
:class:`Chunk`, and the checksum is the xxh3 of the bytes, seeded with that of ``fields``: whatever changes on the way,
it does not fit any more.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, field
from typing import Any, NoReturn

import msgpack
import xxhash

from headwise.workers.errors import HeadwiseError
from headwise.workers.kv.format import KV_DTYPES
from headwise.workers.kv.handoff import TICKET_BYTES, TRANSFER_BYTES, Fence, Range

PAYLOAD_BYTES = 2 << 20
"""The most bytes of keys and values in a message, unless one layer of one block has more."""

SHARED_BYTES = 4 << 20
"""The same of a message whose bytes are in shared memory: on its way it weighs nothing, so it may as well be large."""

MAX_HEADER_BYTES = 512
OVERHEAD_BYTES = MAX_HEADER_BYTES + 16
"""The most that a message has beside its payload."""

Buffer = bytes | bytearray | memoryview

_HEADER_TAG, _PAYLOAD_TAG = 0x0A, 0x12  # fields 1 and 2 of PushRequest, both of bytes


class ChunkError(HeadwiseError):
    """A message is no chunk."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a message brings.

    Attributes:
        fence: that it is sent for.
        source: the rank of prefill that sends it.
        index: in its stream, from 0.
        last: whether it ends its stream.
        first, num_blocks: its blocks, by their place in the transfer.
        layers: all of them; of a single block possibly some.
        heads: of the model's KV heads.
        dtype: of KV_DTYPES.
        num_bytes: of keys and values.
        shared: (pid, fd, offset) in a memory file of the sender; None if the bytes are the payload.
    """

    fence: Fence
    source: int
    index: int
    last: bool
    first: int
    num_blocks: int
    layers: Range
    heads: Range
    dtype: str
    num_bytes: int
    shared: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class Received:
    """A chunk as it came.

    Attributes:
        payload: empty if the bytes are in shared memory.
    """

    chunk: Chunk
    payload: memoryview = field(repr=False)
    _fields: bytes = field(repr=False)  # the ticket among them
    _checksum: int

    def fits(self, data: Buffer) -> bool:
        """Whether the chunk and ``data`` are what was sent."""
        return _checksum(self._fields, data) == self._checksum


def encode_chunk(chunk: Chunk, data: Buffer) -> bytes:
    """The message that brings ``data``, contiguous bytes, or says where they are."""
    fields = msgpack.packb(astuple(chunk))
    header = msgpack.packb((fields, _checksum(fields, data)))
    parts: list[Buffer] = [bytes((_HEADER_TAG, *_varint(len(header)))), header]
    if chunk.shared is None:
        parts += [bytes((_PAYLOAD_TAG, *_varint(chunk.num_bytes))), data]
    return b"".join(parts)


def decode_chunk(message: bytes) -> Received:
    """The inverse of :func:`encode_chunk`. Whether the checksum fits is still to be asked.

    Raises:
        ChunkError: it is of another form.
    """
    header, rest = _field(memoryview(message), _HEADER_TAG, MAX_HEADER_BYTES)
    payload, rest = _field(rest, _PAYLOAD_TAG, len(rest)) if rest else (rest, rest)
    if rest:
        _refuse(f"{len(rest)} bytes after its payload")
    fields, checksum = _tuple(_unpack(header), 2)
    if type(fields) is not bytes:
        _refuse("its fields are not packed")
    chunk = _chunk(fields)
    expected = chunk.num_bytes if chunk.shared is None else 0
    if len(payload) != expected:
        _refuse(f"{len(payload)} bytes of payload where its header says {expected}")
    return Received(chunk, payload, fields, _unsigned(checksum))


def _checksum(fields: bytes, data: Buffer) -> int:
    return xxhash.xxh3_64_intdigest(data, xxhash.xxh3_64_intdigest(fields))


def _chunk(packed: bytes) -> Chunk:
    fence, source, index, last, first, num_blocks, layers, heads, dtype, num_bytes, shared = _tuple(_unpack(packed), 11)
    transfer, attempt, epoch, number, ticket = _tuple(fence, 5)
    for name, value, size in (("transfer", transfer, TRANSFER_BYTES), ("ticket", ticket, TICKET_BYTES)):
        if type(value) is not bytes or len(value) != size:
            _refuse(f"its {name} is not of {size} bytes")
    if type(last) is not bool or dtype not in KV_DTYPES:
        _refuse("last is no boolean, or dtype none that is known")
    place = None if shared is None else tuple(_unsigned(number) for number in _tuple(shared, 3))
    return Chunk(
        Fence(transfer, _unsigned(attempt), _unsigned(epoch), _unsigned(number), ticket),
        *(_unsigned(source), _unsigned(index), last, _unsigned(first), _unsigned(num_blocks)),
        *(_range(layers), _range(heads), dtype, _unsigned(num_bytes), place),  # type: ignore[arg-type]
    )


def _unpack(data: bytes | memoryview) -> Any:
    try:
        return msgpack.unpackb(data, use_list=False)
    except Exception as error:  # of many kinds
        raise ChunkError(f"its header is no msgpack ({type(error).__name__})") from None


def _range(value: Any) -> Range:
    start, stop = (_unsigned(number) for number in _tuple(value, 2))
    if start >= stop:
        _refuse(f"a range from {start} to {stop}")
    return start, stop


def _tuple(value: Any, length: int) -> tuple[Any, ...]:
    if type(value) is not tuple or len(value) != length:
        _refuse(f"where {length} values belong there are others")
    return value


def _unsigned(value: Any) -> int:
    if type(value) is not int or value < 0:
        _refuse("where a number belongs there is something else")
    return value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def _field(data: memoryview, tag: int, most: int) -> tuple[memoryview, memoryview]:
    """A field of bytes that begins with ``tag``, and what follows it."""
    if not len(data) or data[0] != tag:
        _refuse(f"field {tag >> 3} is not where it belongs")
    size = 0
    for place, byte in enumerate(data[1:6]):
        size |= (byte & 127) << 7 * place
        if byte < 128:
            start = 2 + place
            if size > min(most, len(data) - start):
                _refuse(f"field {tag >> 3} has {size} bytes, more than there are or may be ({most})")
            return data[start : start + size], data[start + size :]
    return _refuse(f"the length of field {tag >> 3} does not end")


def _refuse(why: str) -> NoReturn:
    raise ChunkError(f"a message of a Push is damaged: {why}")
