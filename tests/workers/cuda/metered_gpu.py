"""A fake GPU of a certain size, which knows how much of the CPU's memory torch's tensors take."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headwise.workers.cuda import gpu
from headwise.workers.kv import cache
from tests.workers.cuda.fake_gpu import FakeGpu


class Meter(TorchDispatchMode):
    """Counts the memory of every tensor that is made on this thread, as long as it lives.

    Attributes:
        live, peak: bytes now, and the most there were since somebody set it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = weakref.WeakSet[torch.UntypedStorage]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and (memory := x.untyped_storage()).data_ptr() not in given:
                self._add(memory)
        return result

    def _add(self, memory: torch.UntypedStorage) -> None:
        if memory not in self._known:
            self._known.add(memory)
            self.live += memory.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(memory, self._remove, memory.nbytes())

    def _remove(self, num_bytes: int) -> None:
        self.live -= num_bytes


class MeteredGpu(FakeGpu):
    """Has ``total`` bytes, some of which this thread's tensors take."""

    def __init__(self, total: int, meter: Meter) -> None:
        super().__init__()
        self.total, self.meter = total, meter

    def free_memory(self) -> int:
        return self.total - self.meter.live

    def peak_memory(self, run: Callable[[], None]) -> int:
        before = self.meter.peak = self.meter.live
        run()
        return self.meter.peak - before


@pytest.fixture
def metered_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[MeteredGpu]:
    """Every device is this GPU of 64 MiB, for this thread."""

    def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(shape, dtype=dtype)  # and not of memory that is NumPy's

    with Meter() as meter:
        fake = MeteredGpu(64 << 20, meter)
        monkeypatch.setattr(gpu, "of", lambda device: fake)
        monkeypatch.setattr(cache, "_zeros", zeros)
        yield fake
