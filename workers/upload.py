"""Host arrays to where a shard computes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 16  # bytes: as kernels expect of an address


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array as a tensor on a device: on a CPU a view, on a GPU a copy that the host does not wait for."""
    return upload_together([array], device)[0]


def upload_together(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """As :func:`upload`, of several arrays; to a GPU they go as one copy."""
    tensors = [torch.from_numpy(array) for array in arrays]
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    starts = list(accumulate((-(-x.nbytes // _ALIGNMENT) * _ALIGNMENT for x in tensors), initial=0))
    # A copy from memory that is not pinned makes the host wait for everything before it.
    pinned = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
    for x, part in zip(tensors, _parts(pinned, tensors, starts), strict=True):
        part.copy_(x)
    return _parts(pinned.to(device, non_blocking=True), tensors, starts)


def _parts(buffer: Tensor, tensors: Sequence[Tensor], starts: Sequence[int]) -> list[Tensor]:
    """Views of a buffer, each with the shape and dtype of a tensor."""
    places = zip(tensors, starts[:-1], strict=True)
    return [buffer[start : start + x.nbytes].view(x.dtype).view(x.shape) for x, start in places]
