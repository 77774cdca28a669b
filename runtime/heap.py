"""The garbage collector, where a process has little to do but to serve one model."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Has the garbage collector leave alone what exists now, such as modules and the model, until the end.

    Now and then it looks at every object, of which a loaded model's process has some hundred thousand. That takes a
    tenth of a second, in which no step is scheduled.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
