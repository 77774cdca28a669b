"""The best token of each row, and keys of logits: they order as the logits do, and equals by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise.workers.errors import InvalidValueError
from headwise.workers.sampling import best_check
from headwise.workers.sampling.best import best_keys, greedy, keys_of, read_keys
from tests.effort import examples

ORDERED = [-math.inf, -3e38, -1.0, -1e-40, 0.0, 1e-40, 1.0, 3e38, math.inf, math.nan]
logit = st.sampled_from([*ORDERED, -0.0]) | st.floats(width=32)


def key(value: float, token: int) -> int:
    return int(keys_of(torch.tensor([value]), torch.tensor([token])))


@given(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_keys_order_as_logits_do(first: int, second: int) -> None:
    keys = [key(value, first if i % 2 else second) for i, value in enumerate(ORDERED)]
    assert keys == sorted(keys) and len(set(keys)) == len(keys)


@given(logit, st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_of_equals_the_lowest_token_has_the_largest_key(value: float, first: int, second: int) -> None:
    assert (key(value, first) > key(value, second)) == (first < second)
    assert (key(0.0, first) > key(-0.0, second)) == (first < second)
    assert (key(math.nan, first) > key(-math.nan, second)) == (first < second)


@given(logit, st.integers(0, 2**31 - 1))
def test_a_key_tells_its_token_and_whether_its_logit_is_finite(value: float, token: int) -> None:
    tokens, finite = read_keys(torch.tensor([key(value, token)]))
    assert (tokens.tolist(), finite.tolist()) == ([token], [math.isfinite(value)])


@examples(100)
@given(st.lists(st.lists(logit, min_size=7, max_size=7), min_size=1, max_size=5), st.integers(1, 6))
def test_parts_of_the_vocabulary_merge_to_the_whole(rows: list[list[float]], cut: int) -> None:
    logits_BV = torch.tensor(rows)
    parts = best_keys(logits_BV[:, :cut]), best_keys(logits_BV[:, cut:].contiguous(), cut)
    tokens_B, finite_B = read_keys(torch.stack(parts, dim=1).amax(dim=1))
    assert tokens_B.tolist() == greedy(logits_BV)[0].tolist() == np.argmax(logits_BV.numpy(), axis=1).tolist()
    assert finite_B.tolist() == logits_BV.amax(dim=1).isfinite().tolist()


def test_columns_that_lie_apart() -> None:
    logits_BV = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)).T
    assert greedy(logits_BV)[0].tolist() == logits_BV.argmax(dim=1).tolist()


def test_which_rows_are_not_finite() -> None:
    logits_BV = torch.tensor([[0.0, 1.0], [math.nan, 1.0], [0.0, math.inf], [-math.inf] * 2, [-math.inf, 3.0]])
    tokens_B, finite_B = greedy(logits_BV)
    assert finite_B.tolist() == [True, False, False, False, True]
    assert tokens_B.tolist() == [1, 0, 1, 0, 1]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_finds_what_a_cpu_finds() -> None:
    logits_BV = torch.randn(33, 49_153, generator=torch.Generator().manual_seed(1)).mul_(4).round_()
    assert best_keys(logits_BV.cuda(), 5).tolist() == best_keys(logits_BV, 5).tolist()


def test_a_wrong_key_is_found_before_the_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    best_check.check_best_keys(device)
    monkeypatch.setattr(best_check, "best_keys", lambda logits_BV: best_keys(logits_BV, first_id=1))
    with pytest.raises(InvalidValueError, match=r"^device='cpu'.*best token.*pip uninstall triton"):
        best_check.check_best_keys(device)
