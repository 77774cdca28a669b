"""A GPU that is none: its memory is the CPU's, its streams do everything at once, and it keeps a log.

A graph is the list of operations and kernels that were run while it was captured, each with the very tensors; a replay
runs them again into the tensors that came out the first time. So what a graph reads anew, and what it has kept, is as
on a GPU.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

from headwise.workers.cuda import gpu

WAITS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__")
"""Methods of a tensor for which the host waits, where the tensor is on a GPU."""


class FakeGpu:
    """See :class:`~headwise.workers.cuda.gpu.Gpu`.

    Attributes:
        log: what was asked for, in order: (what, which stream, event or number).
        free: bytes, as :meth:`free_memory` tells them.
        peak: bytes, as :meth:`peak_memory` tells them.
    """

    def __init__(self) -> None:
        self.log: list[tuple[str, Any]] = []
        self.steps = FakeStream(self, "steps")
        self._current = [self.steps]
        self._num_streams = self._num_events = 0
        self.free, self.peak = 1 << 30, 0
        self._spoiled: Any = None  # the pool of a capture that has failed
        self._pinned: dict[int, Tensor] = {}  # by address, which nothing else gets as long as this object lives

    @property
    def syncs(self) -> list[tuple[str, Any]]:
        """For what the host has waited."""
        return [entry for entry in self.log if entry[0].startswith("sync")]

    def new_stream(self) -> FakeStream:
        self._num_streams += 1
        return FakeStream(self, f"stream {self._num_streams}")

    def current_stream(self) -> FakeStream:
        return self._current[-1]

    @contextlib.contextmanager
    def _using(self, stream: Any) -> Iterator[None]:
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        return self._using(stream)

    def new_event(self, timed: bool = False) -> FakeEvent:
        self._num_events += 1
        return FakeEvent(self, f"event {self._num_events}", timed)

    def pinned(self, num_bytes: int) -> Tensor:
        self.log.append(("pinned", num_bytes))
        memory = torch.empty(num_bytes, dtype=torch.uint8)
        self._pinned[_memory(memory)] = memory
        return memory

    def pin(self, memory: Tensor) -> None:
        self.log.append(("pin", memory.nbytes))
        self._pinned[_memory(memory)] = memory

    def unpin(self, memory: Tensor) -> None:
        self.log.append(("unpin", memory.nbytes))
        del self._pinned[_memory(memory)]

    def is_pinned(self, memory: Tensor) -> bool:
        start, stop = memory.data_ptr(), memory.data_ptr() + memory.nbytes
        return any(at <= start and stop <= at + one.nbytes for at, one in self._pinned.items())

    def capture(self, run: Callable[[], None], pool: Any) -> FakeGraph:
        self.log.append(("capture", pool))
        if self._spoiled == pool:
            raise RuntimeError("use_count > 0: torch takes no graph into a pool in which a capture has failed")
        graph = FakeGraph(self)
        self._spoiled = pool
        with _Recording(graph), _recorded_kernels(graph), waits_are_errors(self):
            run()
        self._spoiled = None
        return graph

    def new_pool(self) -> Any:
        self.log.append(("pool", len(self.log)))
        return self.log[-1]

    def synchronize(self) -> None:
        self.log.append(("sync", "device"))

    def free_memory(self) -> int:
        return self.free

    def peak_memory(self, run: Callable[[], None]) -> int:
        run()
        self.log.append(("peak", self.peak))
        return self.peak

    def empty_cache(self) -> None:
        self.log.append(("empty cache", None))


class FakeStream:
    def __init__(self, fake: FakeGpu, name: str) -> None:
        self._fake, self.name = fake, name

    def wait_event(self, event: FakeEvent) -> None:
        self._fake.log.append(("wait", (self.name, event.name)))


class FakeEvent:
    def __init__(self, fake: FakeGpu, name: str, timed: bool) -> None:
        self._fake, self.name, self._timed = fake, name, timed
        self.recorded_on: str | None = None

    def record(self, stream: FakeStream | None = None) -> None:
        self.recorded_on = (stream or self._fake.current_stream()).name
        self._fake.log.append(("record", (self.name, self.recorded_on)))

    def synchronize(self) -> None:
        assert self.recorded_on is not None, "nobody has recorded it"
        self._fake.log.append(("sync event", self.name))

    def query(self) -> bool:
        return self.recorded_on is not None

    def elapsed_time(self, end_event: FakeEvent) -> float:
        assert self._timed and end_event._timed, "not timed"
        return 1.0


class FakeGraph:
    def __init__(self, fake: FakeGpu) -> None:
        self._fake = fake
        self.calls: list[Callable[[], None]] = []

    def replay(self) -> None:
        self._fake.log.append(("replay", self._fake.current_stream().name))
        for call in self.calls:
            call()

    def reset(self) -> None:
        self._fake.log.append(("reset", None))
        self.calls = []


class _Recording(TorchDispatchMode):
    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = {_memory(x) for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)}

        def again() -> None:
            outputs = zip(tree_flatten(result)[0], tree_flatten(func(*args, **kwargs))[0], strict=True)
            for kept, new in outputs:
                if isinstance(kept, Tensor) and _memory(kept) not in inputs:
                    kept.copy_(new)

        self._graph.calls.append(again)
        return result


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


@contextlib.contextmanager
def _recorded_kernels(graph: FakeGraph) -> Iterator[None]:
    def alone(run: Callable[[], None]) -> None:
        with _disable_current_modes():  # what the interpreter does with tensors is no part of the graph
            run()

    def record(run: Callable[[], None]) -> None:
        alone(run)
        graph.calls.append(lambda: alone(run))

    with _around_kernels(record):
        yield


@contextlib.contextmanager
def waits_are_errors(fake: FakeGpu) -> Iterator[None]:
    """In it, the host must not read a tensor that is not pinned, nor wait for a copy from or to one that is; the
    interpreter of kernels may."""
    in_kernel = threading.local()

    def allow(run: Callable[[], None]) -> None:
        in_kernel.now = True
        try:
            with _disable_current_modes():
                run()
        finally:
            in_kernel.now = False

    def refusing(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if getattr(in_kernel, "now", False) or fake.is_pinned(x):
                return method(x, *args, **kwargs)
            raise RuntimeError(f"the host would wait for the GPU in Tensor.{name}")

        return refuse

    with pytest.MonkeyPatch.context() as patch, _around_kernels(allow), _CopiesOnly(fake):
        for name in WAITS:
            patch.setattr(Tensor, name, refusing(name, getattr(Tensor, name)))
        yield


class _CopiesOnly(TorchDispatchMode):
    def __init__(self, fake: FakeGpu) -> None:
        super().__init__()
        self._fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            target, source, *non_blocking = args
            if self._fake.is_pinned(target) != self._fake.is_pinned(source) and not any(non_blocking):
                raise RuntimeError("the host would wait for a copy")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _around_kernels(around: Callable[[Callable[[], None]], None]) -> Iterator[None]:
    from triton.runtime.interpreter import GridExecutor

    with pytest.MonkeyPatch.context() as patch:
        run = GridExecutor.__call__

        def called(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
            around(lambda: run(self, *args, **kwargs))

        patch.setattr(GridExecutor, "__call__", called)
        yield


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """Every device is this GPU."""
    fake = FakeGpu()
    monkeypatch.setattr(gpu, "of", lambda device: fake)
    return fake
