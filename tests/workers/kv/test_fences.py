"""What is not exactly the next piece of a fence's blocks is never written, and who waits for the fence hears of it."""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from headwise.workers.errors import InvalidValueError
from headwise.workers.kv import chunk as chunks
from headwise.workers.kv import fences
from headwise.workers.kv.cache import KVCache
from headwise.workers.kv.chunk import Chunk, encode_chunk
from headwise.workers.kv.fences import Fences, FenceStream, PushRefused, Refusal
from headwise.workers.kv.handoff import Fence
from headwise.workers.kv.shared_file import SharedFile
from tests.workers.kv.handoff_ranks import fence_of

LAYERS, SIZE = 2, 2 * 2 * 4 * 8 * 4  # bytes of a block's slice of one head
PLACES = [4, 1, 6]
DEADLINE_S = 10.0


class Decode:
    """Rank 1 of two, with heads 1 and 2 of three; its fence waits for both from ranks 0 and 1 of prefill."""

    def __init__(self, fence: Fence | None = None) -> None:
        self.cache = KVCache(LAYERS, 8, 2, 4, 8, torch.float32, transposed_keys=True)
        self.cache.keys.normal_()
        self.cache.values.normal_()
        self.before = self.content()
        self.fences = Fences(self.cache, [(0, 1), (1, 3)], 1, shared_memory=True)
        self.fence = fence or fence_of()
        self.fences.open(self.fence, PLACES, [(0, 2), (2, 3)])
        self.outcomes: list[str] = []
        self.fences.fill(self.fence, lambda error, num_bytes, seconds: self.outcomes.append(error))
        self.cancelled: list[int] = []

    def stream(self) -> FenceStream:
        return self.fences.stream(lambda: self.cancelled.append(1))

    def content(self) -> Tensor:
        content = torch.empty(8, *self.cache.block_shape)
        self.cache.read_blocks(range(8), content)
        return content

    @property
    def is_untouched(self) -> bool:
        return torch.equal(self.content(), self.before)


def chunk_of(decode: Decode, first: int = 0, source: int = 0, **changes: Any) -> Chunk:
    """A good one: one block of one head, which source 0 has of head 1 and source 1 of head 2."""
    chunk = Chunk(decode.fence, source, first, first == 2, first, 1, (0, 2), (1 + source, 2 + source), "float32", SIZE)
    return replace(chunk, **changes)


def data_of(first: int = 0, source: int = 0) -> bytes:
    return bytes([10 * source + first + 1]) * SIZE


def send(decode: Decode, stream: FenceStream, first: int = 0, source: int = 0, **changes: Any) -> None:
    chunk = chunk_of(decode, first, source, **changes)
    stream.receive(encode_chunk(chunk, data_of(first, source)[: chunk.num_bytes].ljust(chunk.num_bytes)))


def test_a_fence_is_filled_when_every_source_has_sent_everything() -> None:
    decode = Decode()
    first, second = decode.stream(), decode.stream()
    for place in range(3):
        send(decode, first, place)
        assert decode.outcomes == []
        send(decode, second, place, source=1)
    assert first.end() == second.end() == 3 * SIZE
    assert decode.outcomes == [""] and len(decode.fences) == 0 and not decode.cancelled
    after = decode.content()
    for place, block in enumerate(PLACES):
        for head in range(2):
            expected = torch.frombuffer(bytearray(data_of(place, head)), dtype=torch.float32)
            assert torch.equal(after[block, :, :, head].flatten(), expected)
    assert torch.equal(after[[0, 2, 3, 5, 7]], decode.before[[0, 2, 3, 5, 7]])


FAULTS: dict[str, tuple[dict[str, Any], Refusal, str]] = {
    "dropped": ({"first": 1}, Refusal.WRONG, "message 0 of the stream"),
    "not the next block": ({"first": 1, "index": 0}, Refusal.WRONG, "first=1 in message 0: must be 0"),
    "not the next layer": ({"layers": (1, 2), "num_bytes": SIZE // 2}, Refusal.WRONG, r"layers=\(1, 2\).*start at 0"),
    "too many layers": ({"layers": (0, 3)}, Refusal.WRONG, r"layers=\(0, 3\) in message 0: there are 2"),
    "too many blocks": ({"num_blocks": 4, "num_bytes": 4 * SIZE}, Refusal.WRONG, "num_blocks=4 .* too many"),
    "no block": ({"num_blocks": 0, "num_bytes": 0}, Refusal.WRONG, "num_blocks=0"),
    "parts of two blocks": ({"num_blocks": 2, "layers": (0, 1)}, Refusal.WRONG, "num_blocks=2 in message 0: must be 1"),
    "another's heads": ({"heads": (0, 1)}, Refusal.WRONG, r"heads=\(0, 1\) do not come from source rank 0"),
    "heads of another source": ({"heads": (2, 3)}, Refusal.WRONG, r"heads=\(2, 3\) do not come from source rank 0"),
    "no such source": ({"source": 7}, Refusal.WRONG, "do not come from source rank 7"),
    "another dtype": ({"dtype": "bfloat16"}, Refusal.WRONG, "dtype=bfloat16 in message 0: must be float32"),
    "another length": ({"num_bytes": SIZE - 4}, Refusal.WRONG, f"num_bytes={SIZE - 4} in message 0: must be {SIZE}"),
    "another file": ({"shared": (1, 0, 0)}, Refusal.UNREADABLE, "shared memory cannot be read"),
    "no process": ({"shared": (2**31, 5, 0)}, Refusal.UNREADABLE, "shared memory cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_chunk_that_does_not_fit_is_refused_before_a_byte_is_written(fault: str) -> None:
    changes, refusal, why = FAULTS[fault]
    decode = Decode()
    stream = decode.stream()
    with pytest.raises(PushRefused, match=why) as raised:
        send(decode, stream, **changes)
    assert raised.value.refusal == refusal and decode.is_untouched
    if refusal == Refusal.UNREADABLE:  # the same may come another way
        send(decode, decode.stream())
        assert decode.outcomes == []
    else:
        source = changes.get("source", 0)
        assert decode.outcomes == [f"source rank {source}: {raised.value}"] and len(decode.fences) == 0
        check_over(decode)


@pytest.mark.parametrize("place", ["ticket", "transfer", "attempt", "epoch", "number"])
def test_who_does_not_know_the_fence_can_neither_write_nor_end_it(place: str) -> None:
    """An old ticket, attempt, epoch or fence among them."""
    decode = Decode()
    value = getattr(decode.fence, place)
    other = replace(decode.fence, **{place: value[::-1] if isinstance(value, bytes) else value - 1})
    with pytest.raises(PushRefused, match="is open to this ticket") as raised:
        send(decode, decode.stream(), fence=other)
    assert raised.value.refusal == Refusal.UNKNOWN and other.ticket.hex() not in str(raised.value)
    assert decode.is_untouched and decode.outcomes == []
    if place != "ticket":  # which the engine need not show
        decode.fences.close(other)
    send(decode, decode.stream())
    assert not decode.is_untouched


def test_a_checksum_that_does_not_fit_fails_the_fence() -> None:
    decode = Decode()
    message = bytearray(encode_chunk(chunk_of(decode), data_of()))
    message[-1] ^= 1
    with pytest.raises(PushRefused, match="checksum of message 0") as raised:
        decode.stream().receive(bytes(message))
    assert raised.value.refusal == Refusal.DAMAGED and decode.is_untouched
    check_over(decode)


@pytest.mark.parametrize(
    ("second", "why"),
    [
        ({"first": 0}, "out of order"),
        ({"first": 0, "index": 1}, "first=0 in message 1: must be 1"),
        ({"first": 2, "index": 1}, "first=2 in message 1: must be 1"),
        ({"first": 1, "index": 2}, "out of order"),
        ({"first": 1, "source": 1}, "another's"),
        ({"first": 1, "fence": fence_of(2)}, "another's"),
    ],
    ids=["again", "a block again", "a block left out", "a message left out", "another source", "another fence"],
)
def test_a_stream_goes_on_with_what_comes_next_only(second: dict[str, Any], why: str) -> None:
    decode = Decode()
    stream = decode.stream()
    send(decode, stream)
    written = decode.content()
    with pytest.raises(PushRefused, match=why):
        send(decode, stream, **second)
    assert torch.equal(decode.content(), written)
    check_over(decode)


def test_a_message_that_is_none_fails_the_fence_of_its_stream() -> None:
    decode = Decode()
    with pytest.raises(PushRefused, match="damaged"):
        decode.stream().receive(b"rubbish")
    assert decode.outcomes == []
    stream = decode.stream()
    send(decode, stream)
    with pytest.raises(PushRefused, match="damaged"):
        stream.receive(encode_chunk(chunk_of(decode, 1), data_of())[:-1])
    check_over(decode)


def test_layers_of_a_block_come_one_after_another() -> None:
    decode = Decode()
    stream, half = decode.stream(), {"num_bytes": SIZE // 2}
    send(decode, stream, layers=(0, 1), **half)
    send(decode, stream, layers=(1, 2), index=1, **half)
    send(decode, stream, 1, index=2, last=True)
    assert stream.end() == 2 * SIZE
    stream = decode.stream()
    with pytest.raises(PushRefused, match=r"layers=\(1, 2\)"):
        send(decode, stream, 2, index=0, layers=(1, 2), **half)


def test_several_streams_of_a_source_one_after_another_go_on_where_the_last_ended() -> None:
    decode = Decode()
    for place in range(3):
        stream = decode.stream()
        send(decode, stream, place, index=0, last=True)
        stream.end()
    stream = decode.stream()
    send(decode, stream, source=1, num_blocks=3, num_bytes=3 * SIZE, last=True)
    assert decode.outcomes == [""] and stream.end() == 3 * SIZE


def test_two_streams_of_a_source_at_once_fail_the_fence() -> None:
    decode = Decode()
    send(decode, decode.stream())
    with pytest.raises(PushRefused, match="has another stream"):
        send(decode, decode.stream(), 1, index=0)
    assert decode.cancelled == [1]
    check_over(decode)


@pytest.mark.parametrize("end", ["end", "broke"])
def test_a_stream_that_ends_early_fails_the_fence(end: str) -> None:
    decode = Decode()
    stream = decode.stream()
    send(decode, stream)
    if end == "end":
        with pytest.raises(PushRefused, match="before its last message"):
            stream.end()
    else:
        stream.broke()
    check_over(decode)


def test_a_stream_that_goes_on_after_its_last_message_fails_the_fence() -> None:
    decode = Decode()
    stream = decode.stream()
    send(decode, stream, last=True)
    with pytest.raises(PushRefused, match="after its last message"):
        send(decode, stream, 1)
    check_over(decode)


def test_nothing_is_written_after_the_fence_is_closed_or_filled() -> None:
    """The blocks have another owner by then."""
    decode = Decode()
    stream = decode.stream()
    send(decode, stream)
    decode.fences.close(decode.fence)
    assert decode.outcomes == ["the fence was closed"] and decode.cancelled == [1]
    decode.fences.close(decode.fence)
    owned = decode.content()
    for late in (stream, decode.stream()):
        with pytest.raises(PushRefused) as raised:
            send(decode, late, 1)
        assert raised.value.refusal == Refusal.UNKNOWN
    assert torch.equal(decode.content(), owned) and decode.outcomes == ["the fence was closed"]

    decode = Decode()
    for source in range(2):
        stream = decode.stream()
        send(decode, stream, source=source, num_blocks=3, num_bytes=3 * SIZE, last=True)
    owned = decode.content()
    for late in (stream, decode.stream()):
        with pytest.raises(PushRefused):
            send(decode, late, 0, source=1, index=1)
    assert torch.equal(decode.content(), owned) and decode.outcomes == [""]


def test_closing_waits_for_what_is_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Decode()
    writing, go, closed, real = threading.Event(), threading.Event(), threading.Event(), KVCache.write_range

    def write_range(self: KVCache, *arguments: Any) -> None:
        writing.set()
        assert go.wait(DEADLINE_S)
        real(self, *arguments)

    def close() -> None:
        decode.fences.close(decode.fence)
        closed.set()

    monkeypatch.setattr(KVCache, "write_range", write_range)
    threads = [threading.Thread(target=send, args=(decode, decode.stream())), threading.Thread(target=close)]
    threads[0].start()
    assert writing.wait(DEADLINE_S)
    threads[1].start()
    assert not closed.wait(0.05)
    go.set()
    assert closed.wait(DEADLINE_S)
    for thread in threads:
        thread.join(DEADLINE_S)


def test_a_fence_that_is_not_known_cannot_be_filled() -> None:
    decode = Decode()
    outcomes: list[tuple[str, int, float]] = []
    decode.fences.fill(fence_of(2), lambda *outcome: outcomes.append(outcome))
    assert outcomes == [("there is no fence 2", 0, 0.0)]


def test_what_failed_before_anyone_asked_is_told_then() -> None:
    decode, other, outcomes = Decode(), fence_of(2), list[str]()
    decode.fences.open(other, [0], [(0, 2), (2, 3)])
    with pytest.raises(PushRefused):
        send(decode, decode.stream(), fence=other, dtype="float16")
    assert len(decode.fences) == 2
    decode.fences.fill(other, lambda error, *rest: outcomes.append(error))
    assert "dtype=float16" in outcomes[0] and len(decode.fences) == 1


@pytest.mark.parametrize(
    ("blocks", "sources", "field"),
    [([8], [(0, 3)], "block"), ([-1], [(0, 3)], "block"), ([0, 0], [(0, 3)], "block"), ([4], [(0, 3)], "block"),
     ([0], [(0, 2)], "source"), ([0], [], "source")],
)  # fmt: skip
def test_a_fence_of_what_is_not_there_is_refused(blocks: list[int], sources: list[Any], field: str) -> None:
    decode = Decode()
    with pytest.raises(InvalidValueError, match=f"^{field}="):
        decode.fences.open(fence_of(2), blocks, sources)
    with pytest.raises(InvalidValueError, match=r"^ticket='3 bytes': must be 32 bytes"):
        decode.fences.open(fence_of(2, ticket=b"key"), [0], [(0, 2), (2, 3)])
    with pytest.raises(InvalidValueError, match=r"^fence=1: is open already"):
        decode.fences.open(decode.fence, [0], [(0, 3)])


def test_shared_memory_is_read_when_it_is_checked() -> None:
    decode, file = Decode(), SharedFile(2 * SIZE)
    try:
        stream, place = decode.stream(), file.place
        file.view[SIZE:] = data_of()
        stream.receive(encode_chunk(chunk_of(decode, shared=(*place, SIZE)), data_of()))
        assert not decode.is_untouched
        written = decode.content()
        for offset, shared in ((0, place), (SIZE + 4, place), (9 * SIZE, place)):
            other = Decode(fence_of(2))
            with pytest.raises(PushRefused, match="checksum"):
                other.stream().receive(encode_chunk(chunk_of(other, shared=(*shared, offset)), data_of()))
            assert other.is_untouched
        assert torch.equal(decode.content(), written)
    finally:
        file.close()


def test_a_stream_may_go_on_in_another_file_and_leaves_none_open() -> None:
    decode, files, before = Decode(), [SharedFile(SIZE) for _ in range(3)], len(os.listdir("/proc/self/fd"))
    try:
        stream = decode.stream()
        for place, file in enumerate(files):
            file.view[:] = data_of(place)
            stream.receive(encode_chunk(chunk_of(decode, place, shared=(*file.place, 0)), data_of(place)))
            assert len(os.listdir("/proc/self/fd")) == before + 1
        assert stream.end() == 3 * SIZE and len(os.listdir("/proc/self/fd")) == before
    finally:
        for file in files:
            file.close()


def test_a_place_that_no_file_has_is_unreadable_and_later_in_a_stream_wrong() -> None:
    """Once something has come it is too late for another way."""
    decode, file = Decode(), SharedFile(SIZE)
    try:
        stream, place = decode.stream(), (*file.place, 2**63)
        with pytest.raises(PushRefused, match="cannot be read") as raised:
            send(decode, stream, shared=place)
        assert raised.value.refusal == Refusal.UNREADABLE and decode.outcomes == []
        stream = decode.stream()
        send(decode, stream)
        with pytest.raises(PushRefused, match="cannot be read") as raised:
            send(decode, stream, 1, shared=place)
        assert raised.value.refusal == Refusal.WRONG
        check_over(decode)
    finally:
        file.close()


def test_less_than_was_promised_is_damaged_even_if_its_checksum_fits() -> None:
    decode, file = Decode(), SharedFile(SIZE)
    try:
        file.view[:] = data_of()
        with pytest.raises(PushRefused) as raised:
            message = encode_chunk(chunk_of(decode, shared=(*file.place, SIZE // 2)), data_of()[SIZE // 2 :])
            decode.stream().receive(message)
        assert raised.value.refusal == Refusal.DAMAGED and decode.is_untouched
    finally:
        file.close()


@pytest.mark.parametrize(
    ("payload", "shared", "right"),
    [(2 * SIZE, 0, {"payload"}), (0, 2 * SIZE, {"shared"}), (SIZE, SIZE, set()), (0, 0, {"layer"})],
)
def test_a_chunk_has_a_largest_size_unless_it_is_one_layer(
    monkeypatch: pytest.MonkeyPatch, payload: int, shared: int, right: set[str]
) -> None:
    monkeypatch.setattr(fences, "PAYLOAD_BYTES", payload)
    monkeypatch.setattr(fences, "SHARED_BYTES", shared)
    file, taken, two = SharedFile(2 * SIZE), set(), {"num_blocks": 2, "num_bytes": 2 * SIZE}
    try:
        file.view[:] = data_of().ljust(2 * SIZE)
        for name, changes in (
            ("payload", two),
            ("shared", two | {"shared": (*file.place, 0)}),
            ("layer", {"layers": (0, 1), "num_bytes": SIZE // 2}),
        ):
            decode = Decode()
            with contextlib.suppress(PushRefused):
                send(decode, decode.stream(), **changes)
                taken.add(name)
            assert (name in taken) != (decode.is_untouched and "must be at most" in decode.outcomes[0])
    finally:
        file.close()
    assert taken == right | {"layer"}


def test_what_is_filled_stays_so_whatever_comes_of_its_streams() -> None:
    decode, other, outcomes = Decode(), fence_of(2), list[str]()
    decode.fences.open(other, [0, 2, 3], [(0, 2), (2, 3)])
    streams = []
    for source in range(2):
        streams.append(decode.stream())
        send(decode, streams[-1], fence=other, source=source, num_blocks=3, num_bytes=3 * SIZE, last=True)
    for stream in streams:
        stream.broke()
    decode.fences.fill(other, lambda error, *rest: outcomes.append(error))
    assert outcomes == [""] and decode.outcomes == []


def test_blocks_of_a_fence_that_is_over_can_be_opened_anew_and_no_blocks_are_filled() -> None:
    decode, outcomes = Decode(), list[str]()
    for number, blocks in ((2, [0]), (3, [0]), (4, list[int]())):
        decode.fences.open(fence_of(number), blocks, [(0, 2), (2, 3)])
        with pytest.raises(PushRefused):
            send(decode, decode.stream(), fence=fence_of(number), dtype="float16")
    decode.fences.fill(fence_of(4), lambda error, *rest: outcomes.append(error))
    assert outcomes == [""]


def test_a_stream_is_stray_while_it_brings_nothing_and_has_no_open_fence() -> None:
    decode = Decode()
    stream = decode.stream()
    assert stream.is_stray(0.0) and not stream.is_stray(DEADLINE_S)
    send(decode, stream)
    assert not stream.is_stray(0.0)
    decode.fences.close(decode.fence)
    assert stream.is_stray(0.0) and not stream.is_stray(DEADLINE_S)


def test_files_of_others_are_not_read(tmp_path: Any) -> None:
    foreign = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    unsealed = os.memfd_create("headwise-kv", os.MFD_ALLOW_SEALING)
    pipe = os.pipe()
    try:
        for fd, why in ((foreign, "no memory of a handoff"), (pipe[0], "no memory of a handoff"), (unsealed, "sealed")):
            os.set_blocking(fd, False)
            decode = Decode()
            with pytest.raises(PushRefused, match=why):
                send(decode, decode.stream(), shared=(os.getpid(), fd, 0))
            assert decode.is_untouched
    finally:
        for fd in (foreign, unsealed, *pipe):
            os.close(fd)


def test_a_damaged_length_asks_for_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_checksum", lambda fields, data: 0)
    decode, file = Decode(), SharedFile(SIZE)
    try:
        with pytest.raises(PushRefused, match=r"num_bytes=\d+ in message 0: must be at most"):
            decode.stream().receive(encode_chunk(chunk_of(decode, num_bytes=2**50, shared=(*file.place, 0)), b""))
    finally:
        file.close()


def check_over(decode: Decode) -> None:
    """The fence has failed, once, and writes nothing any more."""
    assert len(decode.outcomes) == 1 and decode.outcomes[0].startswith("source rank ") and len(decode.fences) == 0
    owned = decode.content()
    with pytest.raises(PushRefused) as raised:
        send(decode, decode.stream())
    assert raised.value.refusal == Refusal.UNKNOWN and torch.equal(decode.content(), owned)
