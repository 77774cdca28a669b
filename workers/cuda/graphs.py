"""The CUDA graphs of decode steps: launched one by one, the kernels of a step take the host longer than the GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headwise.workers.cuda.attention import TritonAttention
from headwise.workers.cuda.attention_plan import max_slots
from headwise.workers.cuda.gpu import Gpu, Graph
from headwise.workers.cuda.step_pack import most_items, token_places

Compute = Callable[[Tensor, bool], Tensor]
"""The logits of all rows of a step whose array it gets; of this rank alone, without those of the others, if told so."""

_logger = logging.getLogger(__name__)


class DecodeGraph:
    """The graph of steps of one token a row that are padded to a bucket.

    Attributes:
        step_I: where it reads the step's array.
    """

    def __init__(self, graph: Graph, room: _Room, num_slots: int) -> None:
        self._graph, self._num_slots = graph, num_slots
        self._room = room  # the graph has its addresses, so nobody else may get the memory
        self.step_I = room.step_I

    def takes(self, size: int, num_slots: int) -> bool:
        """Whether there is room for a step whose array has such a size, and whose items use so many slots."""
        return size <= len(self.step_I) and num_slots <= self._num_slots

    def replay(self, host_I: Tensor) -> Tensor:
        """Computes a step of the graph's bucket.

        Args:
            host_I: its array, in page-locked memory.

        Returns:
            The logits of every row, the padded ones too, and rows of other buckets. Good until the next step.
        """
        self.step_I[: len(host_I)].copy_(host_I, non_blocking=True)
        self._graph.replay()
        return self._room.logits_BV

    def close(self) -> None:
        self._graph.reset()


class _Room(NamedTuple):
    """What graphs read and write.

    Attributes:
        step_I: the step's array.
        sums: of divided contexts, float32.
        logits_BV: float32.
    """

    step_I: Tensor
    sums: Tensor
    logits_BV: Tensor


class DecodeGraphs:
    """By bucket. They share memory, since they are replayed one after the other: capture the largest first, so that the
    others find room in what it has left."""

    def __init__(self, attention: TritonAttention, max_model_len: int, gpu: Gpu | None) -> None:
        """Args: ``gpu``: None makes no graphs."""
        self._attention, self._gpu = attention, gpu
        self._max_model_len = max_model_len
        self._max_blocks = -(-max_model_len // attention.cache.block_size)
        self._graphs: dict[int, DecodeGraph] = {}
        self._pool: Any = None
        self._room = _Room(torch.empty(0), torch.empty(0), torch.empty((0, 0)))
        self._has_warned = False

    def find(self, bucket: int, size: int, num_slots: int) -> DecodeGraph | None:
        """The graph that computes such a step, if there is one; see :meth:`DecodeGraph.takes`."""
        graph = self._graphs.get(bucket)
        return graph if graph is not None and graph.takes(size, num_slots) else None

    def capture(self, bucket: int, compute: Compute) -> None:
        """Makes the graph of a bucket. If that cannot be done, it says so once, and such steps are launched kernel by
        kernel. Other ranks may have the graph all the same: it does what the launches do."""
        if self._gpu is None or bucket in self._graphs:
            return
        try:
            self._graphs[bucket] = self._make(self._gpu, bucket, compute)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            self._pool = None  # torch takes no graph into a pool after one that failed
            self._warn(bucket, error)

    def close(self) -> None:
        """Gives the memory up. Idempotent."""
        if self._gpu is not None and self._graphs:
            self._gpu.synchronize()  # none may be at work
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        self._pool, self._room = None, _Room(torch.empty(0), torch.empty(0), torch.empty((0, 0)))

    def _make(self, gpu: Gpu, bucket: int, compute: Compute) -> DecodeGraph:
        num_slots = max_slots(bucket, self._max_model_len)
        step_I, sums = self._room_for(bucket, num_slots)
        # A step without rows: no item is attended to, and no token writes anything.
        step_I.zero_()
        step_I[token_places(bucket, bucket).slots] = -1
        self._attention.begin_capture(step_I, sums, num_slots)
        # Compiles kernels and opens what libraries open at first, neither of which can be captured. Alone: if memory
        # runs out on this rank in the midst of it, the others' sums would wait for those that this one has left out.
        logits_BV = compute(step_I, True)
        if bucket <= len(self._room.logits_BV):
            logits_BV = self._room.logits_BV  # of every graph: those of 256 rows are 131 MB
        self._room = room = _Room(step_I, sums, logits_BV)
        if self._pool is None:
            self._pool = gpu.new_pool()

        def run() -> None:
            room.logits_BV[:bucket] = compute(step_I, False)

        return DecodeGraph(gpu.capture(run, self._pool), room, num_slots)

    def _room_for(self, bucket: int, num_slots: int) -> tuple[Tensor, Tensor]:
        """The step's array and the sums: those of the graph before, where they are large enough."""
        device, step_I, sums = self._attention.cache.device, self._room.step_I, self._room.sums
        size = token_places(bucket, bucket).end + bucket * self._max_blocks + most_items(bucket + num_slots) + 4
        if size > len(step_I):
            step_I = torch.empty(size, dtype=torch.int32, device=device)
        if (floats := self._attention.sums_of_decodes(num_slots)) > len(sums):
            sums = torch.empty(floats, device=device)
        return step_I, sums

    def _warn(self, bucket: int, error: RuntimeError) -> None:
        if not self._has_warned:
            _logger.warning(
                "no graph of %d rows can be captured (%s: %s): steps of such buckets are launched kernel by kernel, "
                "which is slower; lower kv_memory (--kv-memory) if memory is short",
                *(bucket, type(error).__name__, error),
            )
        self._has_warned = True
