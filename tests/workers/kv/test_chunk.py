"""A message of Push says what was put into it, and whatever happened to it on its way is noticed."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.v1 import kv_transfer_pb2 as pb
from headwise.workers.kv.chunk import MAX_HEADER_BYTES, OVERHEAD_BYTES, Chunk, ChunkError, decode_chunk, encode_chunk
from headwise.workers.kv.format import KV_DTYPES
from headwise.workers.kv.handoff import Fence
from tests.effort import examples
from tests.workers.kv.handoff_ranks import fence_of

U32 = st.integers(0, 2**32 - 1)
RANGES = st.tuples(U32, st.integers(1, 1000)).map(lambda x: (x[0], x[0] + x[1]))
FENCES = st.builds(
    Fence, st.binary(min_size=16, max_size=16), U32, st.integers(0, 2**64 - 1), U32, st.binary(min_size=32, max_size=32)
)
CHUNK = Chunk(fence_of(), 1, 2, False, 3, 4, (0, 5), (1, 3), "float32", 6)


@st.composite
def chunks(draw: st.DrawFn) -> tuple[Chunk, bytes]:
    data = draw(st.binary(max_size=300))
    shared = draw(st.none() | st.tuples(U32, U32, U32))
    numbers = [draw(U32) for _ in range(4)]
    ranges = draw(RANGES), draw(RANGES)
    dtype = draw(st.sampled_from(KV_DTYPES))
    source, index, first, count = numbers
    return Chunk(
        draw(FENCES), source, index, draw(st.booleans()), first, count, *ranges, dtype, len(data), shared
    ), data


@examples(200)
@given(chunks())
def test_what_was_put_in_comes_out(made: tuple[Chunk, bytes]) -> None:
    chunk, data = made
    message = encode_chunk(chunk, bytearray(data))
    received = decode_chunk(message)
    assert received.chunk == chunk and received.fits(data)
    assert received.payload == (data if chunk.shared is None else b"")
    assert len(message) <= len(received.payload) + OVERHEAD_BYTES
    assert chunk.fence.ticket.hex() not in repr(received) and repr(chunk.fence.ticket)[2:-1] not in repr(received)


@examples(50)
@given(chunks())
def test_a_message_is_the_one_of_the_proto_file(made: tuple[Chunk, bytes]) -> None:
    message = encode_chunk(*made)
    request = pb.PushRequest.FromString(message)
    assert request.payload == (made[1] if made[0].shared is None else b"")
    if request.payload or made[0].shared:
        assert request.SerializeToString() == message
    assert decode_chunk(request.SerializeToString()).chunk == made[0]


@examples(400)
@given(chunks(), st.data())
def test_one_bit_that_changed_is_noticed(made: tuple[Chunk, bytes], data: st.DataObject) -> None:
    chunk, payload = made
    message = bytearray(encode_chunk(chunk, payload))
    bit = data.draw(st.integers(0, 8 * len(message) - 1))
    message[bit // 8] ^= 1 << bit % 8
    try:
        received = decode_chunk(bytes(message))
    except ChunkError:
        return
    assert not received.fits(received.payload if received.chunk.shared is None else payload)


@examples(100)
@given(chunks(), st.data())
def test_a_message_that_was_cut_or_goes_on_is_noticed(made: tuple[Chunk, bytes], data: st.DataObject) -> None:
    message = encode_chunk(*made)
    cut = message[: data.draw(st.integers(0, len(message) - 1))]
    if made[1] or made[0].shared is not None or len(cut) < len(message) - 2:  # an empty payload may be left out
        with pytest.raises(ChunkError):
            decode_chunk(cut)
    with pytest.raises(ChunkError):
        decode_chunk(message + data.draw(st.binary(min_size=1, max_size=9)))


def framed(header: bytes) -> bytes:
    return bytes((10, len(header))) + header


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=9) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=12) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=20,
)


@examples(300)
@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda header: framed(header)))
def test_any_bytes_are_refused(message: bytes) -> None:
    with pytest.raises(ChunkError):
        decode_chunk(message)


@examples(300)
@given(VALUES, st.integers(0, 2**64 - 1), st.integers(0, 14), VALUES)
def test_any_msgpack_is_a_chunk_or_refused(fields: Any, checksum: int, place: int, value: Any) -> None:
    """Among it headers of the right form, with one value that is another."""
    good: list[Any] = list(msgpack.unpackb(msgpack.unpackb(header_of(CHUNK))[0]))
    changed = [*good]
    if place < len(good):
        changed[place] = value
    else:
        changed[0] = [*good[0]]
        changed[0][place - len(good)] = value
    for one in (fields, changed):
        header = msgpack.packb((msgpack.packb(one), checksum))
        if len(header) < 128:
            try:
                assert isinstance(decode_chunk(framed(header) + bytes([18, 6]) + b"123456").chunk, Chunk)
            except ChunkError:
                continue


def header_of(chunk: Chunk) -> bytes:
    return pb.PushRequest.FromString(encode_chunk(chunk, bytes(chunk.num_bytes))).header


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (b"", "field 1 is not where it belongs"),
        (b"\x0a", "length of field 1 does not end"),
        (b"\x0a\xff\xff\xff\xff\xff\x01", "length of field 1 does not end"),
        (b"\x0a\x05abc", "field 1 has 5 bytes"),
        (
            b"\x0a\x81\x04" + b"a" * 600,
            f"field 1 has 513 bytes, more than there are or may be \\({MAX_HEADER_BYTES}\\)",
        ),
        (b"\x0a\x01\xc1", "no msgpack"),
        (b"\x12\x00\x0a\x00", "field 1 is not where it belongs"),
    ],
)
def test_what_is_no_message_is_refused_with_the_reason(message: bytes, why: str) -> None:
    with pytest.raises(ChunkError, match=why):
        decode_chunk(message)


@pytest.mark.parametrize("size", [0, 5, 7])
def test_another_length_than_the_header_says_is_refused(size: int) -> None:
    with pytest.raises(ChunkError, match=f"{size} bytes of payload where its header says 6"):
        decode_chunk(pb.PushRequest(header=header_of(CHUNK), payload=bytes(size)).SerializeToString())


@pytest.mark.parametrize(
    ("place", "value", "why"),
    [
        ((0, 0), bytes(15), "transfer is not of 16 bytes"),
        ((0, 0), "a" * 16, "transfer is not of 16 bytes"),
        ((0, 1), -1, "where a number belongs"),
        ((0, 4), bytes(33), "ticket is not of 32 bytes"),
        ((0, 4), [0] * 32, "ticket is not of 32 bytes"),
        ((1,), -1, "where a number belongs"),
        ((2,), 2.0, "where a number belongs"),
        ((3,), 1, "last is no boolean"),
        ((4,), True, "where a number belongs"),
        ((6,), [5, 5], "a range from 5 to 5"),
        ((7,), [1, 2, 3], "where 2 values belong"),
        ((8,), b"float32", "dtype none that is known"),
        ((8,), ["float32"], "dtype none that is known"),
        ((8,), "float32\n", "dtype none that is known"),
        ((10,), [1, 2, -3], "where a number belongs"),
        ((10,), [1, 2], "where 3 values belong"),
    ],
)
def test_a_header_with_a_value_of_another_kind_is_refused(place: tuple[int, ...], value: Any, why: str) -> None:
    fields, checksum = msgpack.unpackb(header_of(CHUNK))
    changed = msgpack.unpackb(fields)
    *outer, last = place
    part = changed[outer[0]] if outer else changed
    part[last] = value
    header = msgpack.packb((msgpack.packb(changed), checksum))
    with pytest.raises(ChunkError, match=why):
        decode_chunk(pb.PushRequest(header=header, payload=bytes(6)).SerializeToString())
