"""A fake GPU whose streams put off what they are given, until the host waits for it.

Whoever reads memory before the copy to it is done, or overwrites it before the copy from it is, finds that out here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

from tests.workers.cuda.fake_gpu import FakeEvent, FakeGpu, FakeStream


class LateStream(FakeStream):
    """Attributes:
    work: that it was given, and has not done.
    """

    def __init__(self, fake: LateGpu, name: str) -> None:
        super().__init__(fake, name)
        self.work: list[Callable[[], None]] = []

    def wait_event(self, event: FakeEvent) -> None:
        super().wait_event(event)
        assert isinstance(event, LateEvent)
        self.work.append(event.reach)

    def reach(self, mark: Callable[[], None]) -> None:
        """Does its work up to a mark in it, if that has not been done."""
        while mark in self.work:
            self.work.pop(0)()


class LateEvent(FakeEvent):
    reach: Callable[[], None]

    def record(self, stream: FakeStream | None = None) -> None:
        super().record(stream)
        on = stream or self._fake.current_stream()
        assert isinstance(on, LateStream)

        def mark() -> None:
            pass

        on.work.append(mark)
        self.reach = lambda: on.reach(mark)

    def synchronize(self) -> None:
        super().synchronize()
        self.reach()


class LateGpu(FakeGpu):
    """See :class:`~headwise.workers.cuda.gpu.Gpu`. What is launched while a stream is used is put off: kernels, and
    copies with ``non_blocking``."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = LateStream(self, "steps")
        self._current = [self.steps]

    def new_stream(self) -> LateStream:
        self._num_streams += 1
        return LateStream(self, f"stream {self._num_streams}")

    def new_event(self, timed: bool = False) -> LateEvent:
        self._num_events += 1
        return LateEvent(self, f"event {self._num_events}", timed)

    @contextlib.contextmanager
    def _using(self, stream: LateStream) -> Iterator[None]:
        with super()._using(stream), _PutOff(self, stream), pytest.MonkeyPatch.context() as patch:
            run = GridExecutor.__call__

            def launch(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
                def work() -> None:
                    with _disable_current_modes():
                        run(executor, *args, **kwargs)

                self.log.append(("kernel", (executor.fn.__name__, stream.name)))
                stream.work.append(work)

            patch.setattr(GridExecutor, "__call__", launch)
            yield


class _PutOff(TorchDispatchMode):
    def __init__(self, late: LateGpu, stream: LateStream) -> None:
        super().__init__()
        self._late, self._stream = late, stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        target, source, non_blocking = args
        assert non_blocking, "the host waits for this copy"
        pinned = [self._late.is_pinned(one) for one in (target, source)]
        self._late.log.append(("copy", (self._stream.name, target.nbytes, "pinned" if any(pinned) else "unpinned")))
        self._stream.work.append(lambda: func(target, source))
        return target
