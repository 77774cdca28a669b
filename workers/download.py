"""What a step has computed, on its way to the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwise.workers.cuda.gpu import Gpu


class Download:
    """Tensors that are copied to the host, from a GPU as one copy. It is queued now, so that who waits for it does not
    wait for what is queued later."""

    def __init__(self, tensors: Sequence[Tensor], gpu: Gpu | None) -> None:
        """Args: ``gpu``: that the tensors are on; None is a CPU, where nothing is copied."""
        self._tensors = tensors
        self._pinned: Tensor | None = None
        if gpu is not None:
            packed = torch.cat([x.reshape(-1).view(torch.uint8) for x in tensors])
            self._pinned = gpu.pinned(len(packed))
            self._pinned.copy_(packed, non_blocking=True)

    def arrays(self) -> list[NDArray[Any]]:
        """On the host; on a GPU only once it has done the copy, for which the caller waits."""
        if self._pinned is None:
            return [x.numpy() for x in self._tensors]
        host, arrays, start = self._pinned.numpy(), [], 0
        for x in self._tensors:
            dtype = torch.empty(0, dtype=x.dtype).numpy().dtype
            arrays.append(np.frombuffer(host, dtype, x.numel(), start).reshape(x.shape))
            start += x.nbytes
        return arrays
