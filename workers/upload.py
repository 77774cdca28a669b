"""Host arrays to where a shard computes."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array as a tensor on a device: on a CPU a view, on a GPU a copy that the host does not wait for."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    # A copy from memory that is not pinned makes the host wait for everything before it.
    return tensor.pin_memory().to(device, non_blocking=True)
