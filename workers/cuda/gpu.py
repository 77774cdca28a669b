"""What steps and copies ask of a GPU besides kernels: streams, events, graphs, page-locked memory, and what is free.

Everything of torch.cuda that orders or waits is called here, so that a test without a GPU can put another in its place
and see it. Ask for it with ``gpu.of(device)``, and not by importing ``of``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A point in the work of a stream."""

    def record(self, stream: Any = None) -> None:
        """The point is after what the stream, or the current one, has been given so far."""

    def synchronize(self) -> None:
        """The host waits for it."""

    def query(self) -> bool:
        """Whether the device has come so far."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this event to another; both are timed, and the device has passed them."""


class Stream(Protocol):
    """Work that the device does in order."""

    def wait_event(self, event: Any) -> None:
        """What the stream is given from now on comes after the event. The host does not wait."""


class Graph(Protocol):
    """Launches that were captured, and are done again by one."""

    def replay(self) -> None:
        """On the current stream, with the same addresses and whatever lies there now."""

    def reset(self) -> None:
        """Gives its memory up."""


class Gpu(Protocol):
    """One GPU."""

    def new_stream(self) -> Stream: ...

    def current_stream(self) -> Stream:
        """Of the calling thread."""

    def use(self, stream: Stream) -> AbstractContextManager[Any]:
        """In it, the stream is the current one."""

    def new_event(self, timed: bool = False) -> Event: ...

    def pinned(self, num_bytes: int) -> Tensor:
        """Page-locked host memory, uint8: copies from and to it need not be waited for. Once the tensor is given up,
        nobody gets the memory before the copies that were started with it are done."""

    def pin(self, memory: Tensor) -> None:
        """Page-locks host memory that is there, and no more of it: :meth:`pinned` takes powers of two. It is to be
        given up only after :meth:`unpin`.

        Raises:
            RuntimeError: the system has not so much to lock.
        """

    def unpin(self, memory: Tensor) -> None:
        """The inverse of :meth:`pin`, once no copy is under way."""

    def is_pinned(self, memory: Tensor) -> bool:
        """Whether host memory is page-locked."""

    def capture(self, run: Callable[[], None], pool: Any) -> Graph:
        """What ``run`` launches as a graph.

        Args:
            pool: of :meth:`new_pool`; graphs that are replayed one after the other may share one.

        Raises:
            RuntimeError: it cannot be captured, or memory is short.
        """

    def new_pool(self) -> Any: ...

    def synchronize(self) -> None:
        """The host waits for everything."""

    def free_memory(self) -> int:
        """Bytes that can be allocated now."""

    def peak_memory(self, run: Callable[[], None]) -> int:
        """Bytes that ``run`` has allocated at the most, beyond what is allocated now."""

    def empty_cache(self) -> None:
        """Memory that only this process's allocator keeps is free for others."""


_ALONE = threading.RLock()
"""Of who captures, or waits for a whole device: that another thread waits for it spoils a capture."""


def of(device: torch.device) -> Gpu | None:
    """The GPU of a device; None where the device is none."""
    return TorchGpu(device) if device.type == "cuda" else None


class TorchGpu:
    """See :class:`Gpu`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def new_stream(self) -> Stream:
        stream: Stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return stream

    def current_stream(self) -> Stream:
        return torch.cuda.current_stream(self._device)

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def new_event(self, timed: bool = False) -> Event:
        event: Event = torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]
        return event

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def pin(self, memory: Tensor) -> None:
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        error = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        if error:
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=self._device)  # takes the error, of which else the next kernel would be told
            raise torch.cuda.CudaError(error)

    def unpin(self, memory: Tensor) -> None:
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        runtime.cudaHostUnregister(memory.data_ptr())

    def is_pinned(self, memory: Tensor) -> bool:
        return memory.is_pinned()

    def capture(self, run: Callable[[], None], pool: Any) -> Graph:
        graph, stream = torch.cuda.CUDAGraph(), _capture_stream(self._device)
        # Only this thread's calls can spoil it: those of copies and of NCCL's watchdog go on meanwhile. The stream is
        # entered here, too, for torch does not leave it where the capture fails in its end.
        capturing = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        with _ALONE, torch.cuda.stream(stream), capturing:
            run()
        return graph

    def new_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def synchronize(self) -> None:
        with _ALONE:
            torch.cuda.synchronize(self._device)

    def free_memory(self) -> int:
        self.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._device)
        return int(free)

    def peak_memory(self, run: Callable[[], None]) -> int:
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        run()
        self.synchronize()
        return int(torch.cuda.max_memory_allocated(self._device)) - before

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()


@lru_cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One a device: libraries keep memory for each stream that they were used on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
