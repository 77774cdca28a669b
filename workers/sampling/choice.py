"""A random token of each row, after truncation by min_p, top_k and top_p.

The choice is the inverse of the cumulative distribution at one uniform number. Tokens are laid out in token-id order,
not by probability: noise of 1e-6 in the logits (another number of shards, another batch) moves each boundary by about
as much, while in sorted order two close tokens could change places and move by a whole token's probability.
Probabilities are summed as integers (multiples of 2**-40 of the most likely token's), so that the sums are exact and
a parallel scan gives what a loop would.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwise.workers.upload import upload_together

_ONE = 2.0**40
"""The integer weight of the most likely token; 2**23 tokens of that weight still fit in an int64."""


def choose(logits_RV: Tensor, settings_R: NDArray[Any], uniforms_R: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
    """A random token a row, int64, and whether the row was finite.

    Args:
        settings_R: records of settings.SETTINGS.
    """
    cut = np.flatnonzero(settings_R["truncates"])
    ranked = np.flatnonzero(settings_R["ranks"][cut])
    cuts, ranks = settings_R[cut], settings_R[cut[ranked]]
    arrays = (
        *(settings_R["temperature"], uniforms_R, cut, cuts["log_min_p"]),
        *(ranked, ranks["top_k"], ranks["top_p"]),
    )
    sent = upload_together([np.ascontiguousarray(array) for array in arrays], logits_RV.device)
    temperature_R, uniform_R, cut_C, log_min_p_C, ranked_D, top_k_D, top_p_D = sent

    top_R1 = logits_RV.amax(-1, keepdim=True)
    # The largest logit is subtracted before the division, so that no temperature overflows.
    scaled_RV = (logits_RV - top_R1).div_(temperature_R[:, None])
    weights_RV = _weights(scaled_RV)
    if len(cut):
        floor_R1 = torch.full_like(top_R1, -math.inf)
        floor_R1[cut_C] = _floor(take(scaled_RV, cut_C), log_min_p_C[:, None], ranked_D, top_k_D, top_p_D)
        weights_RV.masked_fill_(scaled_RV < floor_R1, 0)
    sums_RV = weights_RV.cumsum(-1)
    total_R1 = sums_RV[:, -1:]
    # The product can round up to the total, which no token's sum exceeds.
    target_R1 = torch.minimum((uniform_R[:, None] * total_R1).to(torch.int64), total_R1 - 1)
    tokens_R1 = torch.searchsorted(sums_RV, target_R1, right=True).clamp_(0, logits_RV.shape[1] - 1)
    return tokens_R1[:, 0], top_R1[:, 0].isfinite()


def take(x_BV: Tensor, index: Tensor) -> Tensor:
    """The rows of ``index``, which is increasing; no copy when that is all of them."""
    return x_BV if len(index) == len(x_BV) else x_BV[index]


def _weights(scaled_RV: Tensor) -> Tensor:
    """Probabilities relative to the most likely token's, as int64 multiples of 2**-40."""
    return scaled_RV.exp().mul_(_ONE).to(torch.int64)


def _floor(scaled_CV: Tensor, log_min_p_C1: Tensor, ranked_D: Tensor, top_k_D: Tensor, top_p_D: Tensor) -> Tensor:
    """The lowest scaled logit that survives min_p, then top_k, then top_p, [C, 1]; tokens equal to it all survive.

    Args:
        ranked_D: which rows have a top_k or top_p.
    """
    if not len(ranked_D):
        return log_min_p_C1
    # Negated, the most likely token comes first in ascending order, which is what searchsorted needs.
    negated_DV = _sort(take(scaled_CV, ranked_D).neg())
    lowest_D1 = torch.maximum(log_min_p_C1[ranked_D], -negated_DV.gather(1, top_k_D[:, None] - 1))
    count_D1 = torch.searchsorted(negated_DV, -lowest_D1, right=True).clamp_(min=1)
    sorted_DV = negated_DV.neg_()
    sums_DV = _weights(sorted_DV).cumsum(-1)
    # The nucleus ends with the token that reaches top_p of the survivors' mass.
    mass_D1 = (sums_DV.gather(1, count_D1 - 1) * top_p_D[:, None]).ceil().to(torch.int64)
    last_D1 = torch.minimum(torch.searchsorted(sums_DV, mass_D1), count_D1 - 1)
    floor_C1 = log_min_p_C1.clone()
    floor_C1[ranked_D] = torch.maximum(lowest_D1, sorted_DV.gather(1, last_D1))
    return floor_C1


def _sort(x_CV: Tensor) -> Tensor:
    if x_CV.device.type != "cpu":
        return x_CV.sort(-1).values
    # NumPy sorts floats with AVX-512, AVX2 or NEON: 0.15 ms for 49,152 of them, torch.sort 3.6 ms, torch.topk(512) 0.3.
    return torch.from_numpy(np.sort(x_CV.numpy(), axis=-1))
