"""How tests ask a sampler: with lists, and for what comes of it on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from headwise.workers.sampling.sampler import ResultCopy, Sampled, Sampler, SampleResult


def ints(values: Sequence[int]) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def sample(
    sampler: Sampler, logits_BV: Tensor, rows: Sequence[int], positions: Sequence[int], generated: Sequence[int]
) -> SampleResult:
    return sampler.sample(logits_BV, ints(rows), ints(positions), ints(generated))


def read(result: SampleResult, rows: Sequence[int]) -> Sampled:
    return ResultCopy(result, rows).read()
