"""What a GPU makes of the kernel that finds the best tokens is compared with plain torch before the first request."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.workers.errors import InvalidValueError
from headwise.workers.sampling.best import best_keys, keys_of


def check_best_keys(device: torch.device) -> None:
    """Of logits with ties, zeros of both signs, and what is no number.

    Raises:
        InvalidValueError: a key is wrong.
    """
    logits_BV = torch.randn((6, 9000), generator=torch.Generator().manual_seed(0))
    logits_BV[1, [70, 8000]] = logits_BV[2, [8999, 3]] = 50.0
    logits_BV[3] = -1.0
    logits_BV[3, [5000, 40]] = torch.tensor([0.0, -0.0])
    logits_BV[4, [100, 4097]] = torch.tensor([float("inf"), float("nan")])
    logits_BV[5] = -float("inf")
    if not torch.equal(best_keys(logits_BV.to(device)).cpu(), keys_of(*_first_best(logits_BV))):
        limit = "on this GPU the kernel that finds the best token of each row is wrong"
        fix = (
            "without Triton plain torch finds it (pip uninstall triton); please report this with the GPU and its driver"
        )
        raise InvalidValueError("device", str(device), limit, fix)


def _first_best(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row, NaN above all, and the lowest of the tokens that have it."""
    values_B = logits_BV.amax(dim=1)  # NaN where there is one
    is_best_BV = (logits_BV == values_B[:, None]) | (logits_BV.isnan() & values_B.isnan()[:, None])
    ids_V = torch.arange(logits_BV.shape[1])
    return values_B, torch.where(is_best_BV, ids_V, len(ids_V)).amin(dim=1)
