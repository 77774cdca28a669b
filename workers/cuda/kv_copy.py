"""Moves KV blocks between a GPU's cache and host memory, many at a time and beside the steps."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from headwise.workers.cuda import kv_copy_kernels as kernels
from headwise.workers.cuda.gpu import Event, Gpu
from headwise.workers.cuda.launch import FP_FUSION
from headwise.workers.cuda.memory import NUM_LANES, STAGING_BYTES
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.cache import INTEGERS, Bits, KVCache
from headwise.workers.kv.handoff import Range

_PIECES_AT_ONCE = 8
"""In a call: the bus has nothing to do while the first one is gathered, and while the last one is handed out."""
_MAX_BLOCKS = 4096
"""Of a piece."""
_PROGRAM_BYTES = 8192
"""Of keys, and of values: eight loads of 16 bytes a thread are on their way."""

_logger = logging.getLogger(__name__)


class BlockMover:
    """See :class:`~headwise.workers.kv.cache.Mover`. Any thread may call; one call moves at a time.

    A call is cut into pieces, and two *lanes* take them in turn. A lane is a stream with memory at both ends: a kernel
    gathers a piece into the memory on the GPU, and a copy brings it to page-locked host memory. The calling thread
    waits for an event, and hands the piece out while the other lane has the next one on the bus. Writing is the
    inverse. Where the caller's own memory is page-locked, pieces go straight from and to that.

    A copy starts after the last *collected* step, which is one that :meth:`Runner.finish` has waited for; steps that
    were launched since may still run. They leave the blocks alone, because of when the engine sends a job:

    - What is saved is idle, so no step in flight computes with it. It is verified, so collected steps have computed it.
      If its memory is taken before the copy is through, the copy is dropped.
    - What is loaded or received goes to blocks that were free. A request that ends or is preempted keeps its blocks
      until all steps in flight that compute it are collected, also those whose tokens are void. And no step computes
      with the new content before every rank has told that it is there.
    - What is pushed to another engine are full blocks of a prompt, computed by collected steps. Later steps write
      behind them, and the request keeps them until the push is over.

    The engine collects rank 0's output. Another rank may not have finished that step, but its keys and values are
    written and read: rank 0 could not have gone on before all ranks had added up after the last of them.
    """

    def __init__(self, cache: KVCache, gpu: Gpu, collected: Callable[[], Event | None]) -> None:
        """Compiles and checks the kernels. Call it before the first step, on the thread that has made the cache.

        Args:
            collected: the event after the work of the last collected step; None as long as there is none.

        Raises:
            InvalidValueError: they move something else on this GPU; the field is ``device``. Or keys take more bytes
                than values, or less; the field is ``kv_dtype``.
        """
        if cache.keys[0, 0].nbytes != cache.values[0, 0].nbytes:
            limit = "has keys and values of different sizes, which are not moved out of a GPU's memory, or into it"
            fix = "take int8 or int4 for both, or leave out host_kv_memory, disk_kv_path and handoffs"
            raise InvalidValueError("kv_dtype", str(cache.format), limit, fix)
        assert not cache.transposed_keys, "only a CPU's cache has them"
        self._cache, self._gpu, self._collected = cache, gpu, collected
        self._lock = threading.Lock()
        block_bytes = cache.range_bytes(1, cache.num_kv_heads, cache.num_layers)
        lane_bytes = max(block_bytes, min(STAGING_BYTES, cache.nbytes))
        self.blocks_at_once = _PIECES_AT_ONCE * (lane_bytes // block_bytes)
        host = _page_locked(gpu, [lane_bytes, 4 * _MAX_BLOCKS] * NUM_LANES)
        self._lanes = [_Lane(cache, gpu, *host[2 * lane :][:2]) for lane in range(NUM_LANES)]
        self._made = gpu.new_event()
        self._check()

    def read(self, blocks: Sequence[int], heads: Range, layers: Range, out: Sequence[Bits]) -> None:
        with self._alone():
            under_way: deque[_Piece] = deque()
            for piece in self._pieces(blocks, heads, layers, out):
                if len(under_way) == NUM_LANES:
                    under_way.popleft().take_out()
                with piece.lane.submit(piece.blocks) as listed:
                    launch(kernels.gather, self._cache, piece.lane.on_gpu, listed, heads, layers)
                    for host, staged in piece.ends():
                        host.copy_(staged, non_blocking=True)
                under_way.append(piece)
            while under_way:
                under_way.popleft().take_out()

    def write(self, blocks: Sequence[int], heads: Range, layers: Range, data: Sequence[Bits]) -> None:
        with self._alone():
            for piece in self._pieces(blocks, heads, layers, data):
                piece.put_in()
                with piece.lane.submit(piece.blocks) as listed:
                    for host, staged in piece.ends():
                        staged.copy_(host, non_blocking=True)
                    launch(kernels.scatter, self._cache, piece.lane.on_gpu, listed, heads, layers)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """At its end nothing is under way, after an error too: nothing is written once the caller has gone on."""
        with self._lock:
            after = self._collected() or self._made
            for lane in self._lanes:
                lane.stream.wait_event(after)
            try:
                yield
            finally:
                for lane in self._lanes:
                    lane.wait()

    def _pieces(self, blocks: Sequence[int], heads: Range, layers: Range, rows: Sequence[Bits]) -> Iterator[_Piece]:
        block_bytes = self._cache.range_bytes(1, heads[1] - heads[0], layers[1] - layers[0])
        most = min(_MAX_BLOCKS, self._lanes[0].on_host.nbytes // block_bytes)
        pinned = self._pinned(rows)
        for lane, start in zip(cycle(self._lanes), range(0, len(blocks), most)):
            part = slice(start, start + most)
            yield _Piece(lane, blocks[part], rows[part], pinned[part])

    def _pinned(self, rows: Sequence[Bits]) -> list[Tensor]:
        """The rows, if they are page-locked; as the first is, all are. Else nothing."""
        if not all(row.flags.c_contiguous and row.flags.writeable for row in rows):
            return []
        flat = [torch.from_numpy(row.reshape(-1)) for row in rows]
        return flat if flat and self._gpu.is_pinned(flat[0]) else []

    def _check(self) -> None:
        """Moves numbers out of the last block, and others into it. So the kernels are compiled now, which would hold up
        steps later. The block is left as it was."""
        cache, block = self._cache, self._cache.num_blocks - 1
        everything = (0, cache.num_kv_heads), (0, cache.num_layers)
        held = [x.view(INTEGERS[cache.dtype.itemsize])[:, block] for x in (cache.keys, cache.values)]
        before = torch.stack(held, dim=1)
        numbers = (torch.arange(before.numel()) % 127).to(before.dtype).view(before.shape)
        out, others = torch.zeros_like(numbers), 126 - numbers
        for part, x in enumerate(held):
            x.copy_(numbers[:, part])
        self._made.record(self._gpu.current_stream())
        self.read([block], *everything, [out.numpy()])
        self.write([block], *everything, [others.numpy()])
        right = torch.equal(out, numbers) and torch.equal(torch.stack(held, dim=1).cpu(), others)
        for part, x in enumerate(held):
            x.copy_(before[:, part])
        self._made.record(self._gpu.current_stream())
        if not right:
            limit = "on this GPU the kernels that move KV blocks are wrong"
            fix = "leave out host_kv_memory, disk_kv_path and handoffs; please report this with GPU, driver and Triton"
            raise InvalidValueError("device", str(cache.device), limit, fix)


class _Lane:
    """A stream, and memory at both its ends for the blocks of a piece, and for their numbers.

    Attributes:
        on_gpu: integers as wide as the cache's elements.
        on_host: as many of them, page-locked if possible.
    """

    def __init__(self, cache: KVCache, gpu: Gpu, host: Tensor, listed: Tensor) -> None:
        """Args: ``host``, ``listed``: bytes in host memory, for blocks and for their numbers."""
        self._gpu, self.stream, self._done, self._busy = gpu, gpu.new_stream(), gpu.new_event(), False
        self.on_host, self._listed_on_host = host.view(INTEGERS[cache.dtype.itemsize]), listed.view(torch.int32)
        self.on_gpu = torch.empty_like(self.on_host, device=cache.device)
        self._listed_on_gpu = torch.empty_like(self._listed_on_host, device=cache.device)

    @contextmanager
    def submit(self, blocks: Sequence[int]) -> Iterator[Tensor]:
        """What is launched in it goes to the stream; it has the numbers of the blocks, which are on the GPU by then.
        Nothing may be under way before."""
        on_host, on_gpu = (x[: len(blocks)] for x in (self._listed_on_host, self._listed_on_gpu))
        on_host.numpy()[:] = blocks
        self._busy = True
        with self._gpu.use(self.stream):
            try:
                on_gpu.copy_(on_host, non_blocking=True)
                yield on_gpu
            finally:
                self._done.record(self.stream)

    def wait(self) -> None:
        """The host waits for what is under way, if anything is."""
        if self._busy:
            self._done.synchronize()
            self._busy = False


class _Piece(NamedTuple):
    """Blocks that a lane has room for.

    Attributes:
        rows: where each goes, or comes from, in host memory; see :meth:`Mover.read`.
        pinned: the same, flat, if it is page-locked; else empty.
    """

    lane: _Lane
    blocks: Sequence[int]
    rows: Sequence[Bits]
    pinned: Sequence[Tensor]

    def ends(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What is to be copied between host and GPU: there, and here."""
        size = len(self.blocks) * self.rows[0].size
        if self.pinned:
            yield from zip(self.pinned, self.lane.on_gpu[:size].view(len(self.blocks), -1), strict=True)
        else:
            yield self.lane.on_host[:size], self.lane.on_gpu[:size]

    def take_out(self) -> None:
        """Waits for the lane, and hands out what it has brought."""
        self.lane.wait()
        if not self.pinned:
            for row, staged in zip(self.rows, self._staged(), strict=True):
                np.copyto(row, staged)

    def put_in(self) -> None:
        """Waits for the lane, and hands it what it is to bring."""
        self.lane.wait()
        if not self.pinned:
            for row, staged in zip(self.rows, self._staged(), strict=True):
                np.copyto(staged, row)

    def _staged(self) -> Bits:
        size = len(self.blocks) * self.rows[0].size
        staged: Bits = self.lane.on_host[:size].numpy().reshape(len(self.blocks), *self.rows[0].shape)
        return staged


def launch(kernel: Any, cache: KVCache, staging: Tensor, listed: Tensor, heads: Range, layers: Range) -> None:
    """Has one of the kernels move heads and layers of blocks between a cache and staging memory.

    Args:
        staging: room for [n, layers, 2, heads, block_size * head_dim, or bytes of a record] integers, on the cache's
            device.
        listed: int32 [n], the blocks.
    """
    integer, num_layers = INTEGERS[cache.dtype.itemsize], layers[1] - layers[0]
    head = cache.keys[0, 0, 0].numel()
    run, elements = (heads[1] - heads[0]) * head, _PROGRAM_BYTES // cache.dtype.itemsize
    kernel[len(listed) * num_layers, -(-run // elements)](
        *(staging, cache.keys.view(integer), cache.values.view(integer), listed),
        *(cache.num_blocks, layers[0], num_layers, cache.num_kv_heads * head, heads[0] * head, run),
        ELEMENTS=elements,
        enable_fp_fusion=FP_FUSION,
    )


def _page_locked(gpu: Gpu, sizes: Sequence[int]) -> list[Tensor]:
    """Host memory of so many bytes each; copies from and to it can be waited for later only if it is page-locked."""
    try:
        return [gpu.pinned(size) for size in sizes]
    except RuntimeError as error:
        _logger.warning("%d bytes of host memory cannot be page-locked, so KV is copied slower: %s", sum(sizes), error)
        return [torch.empty(size, dtype=torch.uint8) for size in sizes]
