"""Log-probabilities of tokens, and their way to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from headwise.workers.plan import TokenLogprobs

_MOST_LOGPROBS = 20
"""The largest ``num_logprobs``."""


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Those of the rows that asked; K is _MOST_LOGPROBS, or the vocabulary if that is smaller.

    Attributes:
        counts: by row, how many of the most likely tokens it asked for.
        tensors: chosen_L, rank_L, top_LK and ids_LK, on the device.
    """

    counts: dict[int, int]
    tensors: tuple[Tensor, ...]

    def by_row(self, arrays: Sequence[NDArray[Any]]) -> dict[int, TokenLogprobs]:
        """Args: ``arrays``: what the tensors are on the host."""
        chosen, rank, top, ids = (array.tolist() for array in arrays)
        return {
            row: TokenLogprobs(chosen[i], rank[i], tuple(ids[i][:count]), tuple(top[i][:count]))
            for i, (row, count) in enumerate(self.counts.items())
        }


def logprobs_of(logits_LV: Tensor, tokens_L: Tensor, counts: dict[int, int]) -> Logprobs:
    logprobs_LV = logits_LV.log_softmax(-1)
    chosen_L1 = logprobs_LV.gather(1, tokens_L[:, None])
    rank_L = (logits_LV > logits_LV.gather(1, tokens_L[:, None])).sum(-1) + 1
    # Always as many, for which of equals come first depends on how many are asked for.
    top_LK, ids_LK = logprobs_LV.topk(min(_MOST_LOGPROBS, logits_LV.shape[1]), dim=-1)
    return Logprobs(counts, (chosen_L1[:, 0], rank_L, top_LK, ids_LK))
