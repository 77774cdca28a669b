"""Who may write KV into which device blocks, and what of it has come.

The peer names places in a transfer, and never a block: which block a place is only the fence knows. Whatever could be
wrong with a chunk is looked at before a byte of it is written, under the lock that closing the fence takes.
"""

from __future__ import annotations

import enum
import hmac
import threading
import time
from collections.abc import Callable, Sequence

from headwise.workers import failpoints
from headwise.workers.errors import HeadwiseError, InvalidValueError
from headwise.workers.failpoints import Point
from headwise.workers.kv.cache import KVCache
from headwise.workers.kv.chunk import PAYLOAD_BYTES, SHARED_BYTES, Chunk, ChunkError, Received, decode_chunk
from headwise.workers.kv.handoff import TICKET_BYTES, Fence, Range
from headwise.workers.kv.routes import head_routes
from headwise.workers.kv.shared_file import SharedReader

Told = Callable[[str, int, float], None]
"""Gets why a fence's blocks will not be filled, or nothing if they are; bytes written; seconds since it was opened."""


class Refusal(enum.Enum):
    """Why a stream is refused."""

    UNKNOWN = "unknown"
    """There is no such fence, any more or at all, or the ticket is not its own."""
    WRONG = "wrong"
    DAMAGED = "damaged"
    UNREADABLE = "unreadable"
    """The shared memory cannot be read: nothing has come, and all of it can be sent another way."""
    FAILED = "failed"


class PushRefused(HeadwiseError):
    """A stream brought what is not to be written, and ends."""

    def __init__(self, refusal: Refusal, why: str) -> None:
        self.refusal = refusal
        super().__init__(why)


class Fences:
    """Those of one rank. Every method may be called by any thread."""

    def __init__(self, kv_cache: KVCache, heads: Sequence[Range], rank: int, shared_memory: bool) -> None:
        """
        Args:
            heads: the KV heads of each rank of this group.
            rank: this one.
            shared_memory: whether chunks may be in shared memory.
        """
        self._kv_cache, self._heads, self.rank, self.shared_memory = kv_cache, heads, rank, shared_memory
        self._lock = threading.Lock()
        self._open: dict[Key, _OpenFence] = {}

    def open(self, fence: Fence, blocks: Sequence[int], sources: Sequence[Range]) -> None:
        """
        Args:
            blocks: on the device, where the blocks of the transfer go.
            sources: the KV heads of each rank that sends.

        Raises:
            InvalidValueError: the fence is open, or its ticket has another length; a block is none, or another's; no
                source has a head of this rank.
        """
        if len(fence.ticket) != TICKET_BYTES:
            raise InvalidValueError("ticket", f"{len(fence.ticket)} bytes", f"must be {TICKET_BYTES} bytes")
        routes = head_routes(sources, self._heads)
        mine = [(route.source, (route.start, route.stop)) for route in routes if route.destination == self.rank]
        with self._lock:
            if _key(fence) in self._open:
                raise InvalidValueError("fence", fence.number, "is open already")
            held = {block for other in self._open.values() for block in other.writable}
            for block in blocks:
                if block in held or not 0 <= block < self._kv_cache.num_blocks:
                    limit = f"must be less than {self._kv_cache.num_blocks}, and written for one purpose only"
                    raise InvalidValueError("block", block, limit)
                held.add(block)
            first_head = self._heads[self.rank][0]
            self._open[_key(fence)] = _OpenFence(fence, list(blocks), mine, self._kv_cache, first_head)

    def fill(self, fence: Fence, told: Told) -> None:
        """``told`` gets what came of a fence, once; then, as after :meth:`close`, it is forgotten."""
        with self._lock:
            found = self._open.get(_key(fence))
        if found is None:
            told(f"there is no fence {fence.number}", 0, 0.0)
            return

        def forget(error: str, num_bytes: int, seconds: float) -> None:
            with self._lock:
                self._open.pop(_key(fence), None)
            told(error, num_bytes, seconds)

        found.tell(forget)

    def close(self, fence: Fence) -> None:
        """When it returns nothing is written for the fence any more. One that is not known is closed."""
        with self._lock:
            found = self._open.pop(_key(fence), None)
        if found is not None:
            found.end("the fence was closed")

    def close_all(self) -> None:
        with self._lock:
            found = list(self._open.values())
            self._open.clear()
        for fence in found:
            fence.end("the rank ends")

    def stream(self, cancel: Callable[[], object]) -> FenceStream:
        """A stream that has begun; ``cancel`` ends it, and is called by any thread."""
        return FenceStream(self, cancel)

    def __len__(self) -> int:
        return len(self._open)

    def find(self, fence: Fence) -> _OpenFence:
        """
        Raises:
            PushRefused: it is not known here, or its ticket is another.
        """
        with self._lock:
            found = self._open.get(_key(fence))
        ticket = found.fence.ticket if found is not None else bytes(len(fence.ticket))
        if not hmac.compare_digest(ticket, fence.ticket) or found is None:
            # One answer for both: whoever guesses learns nothing.
            raise PushRefused(Refusal.UNKNOWN, f"no fence {fence.number} of epoch {fence.epoch} is open to this ticket")
        return found


class FenceStream:
    """What one rank of prefill sends in one go. One thread calls its methods."""

    def __init__(self, fences: Fences, cancel: Callable[[], object]) -> None:
        self._fences, self._cancel = fences, cancel
        self._fence: _OpenFence | None = None
        self._begun: Chunk | None = None
        self._index = self._num_bytes = 0
        self._ended = False
        self._shared: SharedReader | None = None
        self._last = time.monotonic()

    def is_stray(self, patience_s: float) -> bool:
        """Whether it has brought nothing for so long and there is no fence that it could fill. On any thread."""
        fence = self._fence
        return (fence is None or not fence.writable) and time.monotonic() - self._last >= patience_s

    def receive(self, message: bytes) -> None:
        """Checks a message and writes what it brings.

        Raises:
            PushRefused: nothing of it was written. If the stream has shown its ticket the fence has failed, but for
                UNREADABLE.
        """
        try:
            received = decode_chunk(message)
            chunk = received.chunk
            if self._fence is None or self._begun is None:
                fence = self._fences.find(chunk.fence)
                fence.begin(chunk.source, self._cancel)
                self._fence, self._begun = fence, chunk
            if (chunk.fence, chunk.source, chunk.index) != (self._begun.fence, self._begun.source, self._index):
                raise PushRefused(Refusal.WRONG, f"message {self._index} of the stream is another's, or out of order")
            if self._ended:
                raise PushRefused(Refusal.WRONG, "the stream goes on after its last message")
            if failpoints.ENABLED:
                failpoints.hit(Point.HANDOFF_RECEIVE, self._fences.rank)
            self._fence.write(received, lambda: self._data(received))
        except ChunkError as error:
            raise self._refused(PushRefused(Refusal.DAMAGED, str(error))) from None
        except PushRefused as error:
            raise self._refused(error) from None
        self._index, self._num_bytes, self._ended = self._index + 1, self._num_bytes + chunk.num_bytes, chunk.last
        self._last = time.monotonic()

    def end(self) -> int:
        """The stream is through; returns how many bytes it brought.

        Raises:
            PushRefused: it has broken off.
        """
        if not self._ended or self._fence is None or self._begun is None:
            raise self._refused(PushRefused(Refusal.WRONG, "the stream ended before its last message"))
        self._leave(self._fence, self._begun.source)
        return self._num_bytes

    def broke(self) -> None:
        """The stream was cut, or its handler failed."""
        self._refused(PushRefused(Refusal.FAILED, "the stream broke off"))

    def _refused(self, error: PushRefused) -> PushRefused:
        if self._fence is not None and self._begun is not None:
            self._leave(self._fence, self._begun.source)
            if error.refusal != Refusal.UNREADABLE:
                self._fence.end(f"source rank {self._begun.source}: {error}")
        return error

    def _data(self, received: Received) -> memoryview:
        """
        Raises:
            PushRefused: it is in shared memory, which cannot be read.
        """
        shared = received.chunk.shared
        if shared is None:
            return received.payload
        pid, fd, offset = shared
        try:
            if not self._fences.shared_memory:
                raise OSError("this rank takes none")
            if self._shared is None or self._shared.place != (pid, fd):
                if self._shared is not None:
                    self._shared.close()
                self._shared = SharedReader(pid, fd)
            return self._shared.read(offset, received.chunk.num_bytes)
        except (OSError, OverflowError) as error:
            refusal = Refusal.UNREADABLE if self._index == 0 else Refusal.WRONG
            raise PushRefused(refusal, f"shared memory cannot be read: {error}") from None

    def _leave(self, fence: _OpenFence, source: int) -> None:
        fence.leave(source)
        if self._shared is not None:
            self._shared.close()


Key = tuple[bytes, int, int, int]


def _key(fence: Fence) -> Key:
    return fence.transfer, fence.attempt, fence.epoch, fence.number


class _OpenFence:
    """A fence, and what of its blocks has been written.

    Of each route the chunks come in the order of blocks, and in a block of layers: ``next`` has the place in the
    transfer and the layer that come next.
    """

    def __init__(
        self, fence: Fence, blocks: list[int], routes: list[tuple[int, Range]], kv_cache: KVCache, first_head: int
    ) -> None:
        self.fence, self._blocks, self._kv_cache, self._first_head = fence, blocks, kv_cache, first_head
        self._lock = threading.Lock()
        self._next = dict.fromkeys(routes, (0, 0))
        self._streams: dict[int, Callable[[], object]] = {}
        self._opened, self._seconds, self._num_bytes = time.perf_counter(), 0.0, 0
        self._outcome: str | None = None if blocks else ""
        self._told: Told | None = None

    @property
    def writable(self) -> list[int]:
        """The blocks that may still be written."""
        return self._blocks if self._outcome is None else []

    def tell(self, told: Told) -> None:
        with self._lock:
            self._told = told
            self._tell()

    def end(self, error: str) -> None:
        """Nothing is written from now on. A fence that is over stays as it is."""
        with self._lock:
            streams = list(self._streams.values())
            if self._outcome is None:
                self._over(error)
        for cancel in streams:
            cancel()

    def begin(self, source: int, cancel: Callable[[], object]) -> None:
        """
        Raises:
            PushRefused: the fence is over, or the source has another stream; then it has failed.
        """
        with self._lock:
            self._check_open()
            twice = source in self._streams
            if not twice:
                self._streams[source] = cancel
        if twice:
            self.end(f"source rank {source} has two streams at once")
            raise PushRefused(Refusal.WRONG, f"source rank {source} has another stream")

    def leave(self, source: int) -> None:
        with self._lock:
            self._streams.pop(source, None)

    def write(self, received: Received, read: Callable[[], memoryview]) -> None:
        """
        Args:
            read: gives the chunk's bytes.

        Raises:
            PushRefused: the fence is over, or the chunk is not what comes next, or not what was sent.
        """
        chunk = received.chunk
        heads = chunk.heads[0] - self._first_head, chunk.heads[1] - self._first_head
        with self._lock:
            self._check_open()
            self._check(chunk)
            data = read()  # as many bytes as were checked: a damaged number must not make this process ask for memory
            if len(data) != chunk.num_bytes or not received.fits(data):
                raise PushRefused(Refusal.DAMAGED, f"the checksum of message {chunk.index} does not fit")
            blocks = self._blocks[chunk.first : chunk.first + chunk.num_blocks]
            self._kv_cache.write_range(blocks, heads, chunk.layers, data)
            self._num_bytes += len(data)
            whole = chunk.layers[1] == self._kv_cache.num_layers
            place = (chunk.first + chunk.num_blocks, 0) if whole else (chunk.first, chunk.layers[1])
            self._next[chunk.source, chunk.heads] = place
            if all(place == len(self._blocks) for place, _ in self._next.values()):
                self._over("")

    def _check_open(self) -> None:
        if self._outcome is not None:
            raise PushRefused(Refusal.UNKNOWN, f"fence {self.fence.number} is over: {self._outcome or 'it is filled'}")

    def _check(self, chunk: Chunk) -> None:
        """That the chunk is the next of its route.

        Raises:
            PushRefused: it is not.
        """
        cache, expected = self._kv_cache, self._next.get((chunk.source, chunk.heads))
        if expected is None:
            raise PushRefused(Refusal.WRONG, f"heads={chunk.heads} do not come from source rank {chunk.source}")
        num_layers, num_heads = chunk.layers[1] - chunk.layers[0], chunk.heads[1] - chunk.heads[0]
        largest = max(PAYLOAD_BYTES if chunk.shared is None else SHARED_BYTES, cache.range_bytes(1, num_heads, 1))
        dtype = str(cache.format)
        for name, value, fits, limit in (
            ("dtype", chunk.dtype, chunk.dtype == dtype, f"must be {dtype}"),
            ("first", chunk.first, chunk.first == expected[0], f"must be {expected[0]}"),
            ("layers", chunk.layers, chunk.layers[0] == expected[1], f"must start at {expected[1]}"),
            ("layers", chunk.layers, chunk.layers[1] <= cache.num_layers, f"there are {cache.num_layers}"),
            ("num_blocks", chunk.num_blocks, chunk.num_blocks > 0, "must be at least 1"),
            ("num_blocks", chunk.num_blocks, chunk.num_blocks == 1 or num_layers == cache.num_layers, "must be 1"),
            ("num_blocks", chunk.num_blocks, chunk.first + chunk.num_blocks <= len(self._blocks), "are too many"),
            ("num_bytes", chunk.num_bytes, chunk.num_bytes <= largest, f"must be at most {largest}"),
        ):
            if not fits:
                raise PushRefused(Refusal.WRONG, f"{name}={value} in message {chunk.index}: {limit}")
        size = cache.range_bytes(chunk.num_blocks, num_heads, num_layers)
        if chunk.num_bytes != size:
            raise PushRefused(Refusal.WRONG, f"num_bytes={chunk.num_bytes} in message {chunk.index}: must be {size}")

    def _over(self, outcome: str) -> None:
        self._outcome, self._seconds = outcome, time.perf_counter() - self._opened
        self._tell()

    def _tell(self) -> None:
        if self._told is not None and self._outcome is not None:
            told, self._told = self._told, None
            told(self._outcome, self._num_bytes, self._seconds)
