"""The device that is measured, and how time is taken on it."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from headwise.workers.cuda import gpu
from headwise.workers.machine import free_host_memory

GB = 1e9


class Device:
    """A GPU, or a CPU on which Triton's interpreter runs the kernels."""

    def __init__(self, at: torch.device) -> None:
        self.at, self._gpu = at, gpu.of(at)

    @property
    def is_gpu(self) -> bool:
        return self._gpu is not None

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.at) if self.is_gpu else "cpu, interpreter: the times mean nothing"

    def here(self) -> AbstractContextManager[Any]:
        """In it, the device is torch's current one."""
        return torch.cuda.device(self.at) if self.is_gpu else nullcontext()

    def free_bytes(self) -> int:
        return self._gpu.free_memory() if self._gpu is not None else free_host_memory()

    def wait(self) -> None:
        if self._gpu is not None:
            self._gpu.synchronize()

    def mark(self) -> Any:
        """A moment for :meth:`between`: by the device's own clock where it is a GPU, by the host's elsewhere."""
        if self._gpu is None:
            return time.perf_counter()
        event = self._gpu.new_event(timed=True)
        event.record()
        return event

    def between(self, first: Any, last: Any) -> float:
        """Seconds between two marks. Waits until the device has come to the last of them."""
        if self._gpu is None:
            return float(last - first)
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    def seconds_of(self, work: Callable[[], object], repeats: int) -> float:
        """The median of the device's seconds for a piece of work, which is done before, too."""
        for _ in range(-(-repeats // 4)):
            work()
        marks = []
        for _ in range(repeats):
            first = self.mark()
            work()
            marks.append((first, self.mark()))
        return statistics.median(self.between(*both) for both in marks)

    def captured(self, work: Callable[[], None]) -> Callable[[], None]:
        """The work as a graph, so that the time is not that of launching it; the work itself where there are none."""
        if self._gpu is None:
            return work
        work()  # compiles what it needs, which a capture must not
        self.wait()
        return self._gpu.capture(work, self._gpu.new_pool()).replay

    def count_waits(self, work: Callable[[], object]) -> int | None:
        """How often the host waits for the device, by torch's own count; None where there is no GPU."""
        if not self.is_gpu:
            work()
            return None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                work()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """|got - exact| / |exact|, infinite if anything is not finite."""
    error = float((got.double() - exact.double()).norm() / exact.double().norm())
    return error if math.isfinite(error) else math.inf
