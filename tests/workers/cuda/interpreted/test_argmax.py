"""The kernel that finds the best token, against NumPy's argmax, for which a NaN is the largest as well."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from headwise.workers.cuda import argmax
from headwise.workers.cuda.argmax import best_keys
from headwise.workers.sampling.best import keys_of, read_keys
from headwise.workers.sampling.best_check import check_best_keys
from tests.effort import examples

SIZES = [1, 7, 64, 257, 4096, 4097, 9000]
SPECIAL = [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0]


def assert_best(logits_BV: Tensor, first_id: int = 0) -> None:
    tokens_B = torch.from_numpy(np.argmax(logits_BV.numpy(), axis=1))
    values_B = logits_BV.gather(1, tokens_B[:, None])[:, 0]
    keys_B = best_keys(logits_BV, first_id)
    assert keys_B.tolist() == keys_of(values_B, tokens_B + first_id).tolist()
    found_B, finite_B = read_keys(keys_B)
    assert found_B.tolist() == (tokens_B + first_id).tolist()
    assert finite_B.tolist() == values_B.isfinite().tolist()


@examples(30)
@given(
    size=st.sampled_from(SIZES),
    seed=st.integers(0, 2**31),
    specials=st.lists(st.tuples(st.sampled_from(SPECIAL), st.integers(0, 2**31)), max_size=3),
    first_id=st.sampled_from([0, 64_128]),
)
def test_ties_and_what_is_not_finite(size: int, seed: int, specials: list[tuple[float, int]], first_id: int) -> None:
    logits_BV = torch.randn(3, size, generator=torch.Generator().manual_seed(seed)).mul_(2).round_()
    for value, where in specials:
        logits_BV[where % 3, where % size] = value
    assert_best(logits_BV, first_id)


@pytest.mark.parametrize("value", [*SPECIAL, -5.0])
def test_rows_of_one_value(value: float) -> None:
    assert_best(torch.full((2, 300), value))


def test_the_lowest_token_of_equals_in_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(argmax, "_COLUMNS", 64)
    logits_BV = torch.zeros(4, 1000)
    for row, tokens in enumerate([(63, 64), (999, 500), (640, 641), (0, 999)]):
        logits_BV[row, list(tokens)] = 2.0
    assert_best(logits_BV)


def test_rows_that_lie_apart() -> None:
    assert_best(torch.randn(4, 300, generator=torch.Generator().manual_seed(2))[:, 17:250])


def test_the_kernel_passes_the_check_that_a_start_makes() -> None:
    check_best_keys(torch.device("cpu"))
