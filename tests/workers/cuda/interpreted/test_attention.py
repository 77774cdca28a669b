"""The numbers of the attention kernels, against dense attention in float64 that never saw a block table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from headwise.workers.cuda.attention import TritonAttention
from headwise.workers.cuda.attention_plan import PART_KEYS
from headwise.workers.model.attention import AttentionBatch
from tests.effort import examples
from tests.workers.attention_case import NAN, Case, assert_close

BORDERS = [1, 15, 16, 17, 63, 64, 65, PART_KEYS - 1, PART_KEYS, PART_KEYS + 1, 2 * PART_KEYS, 2 * PART_KEYS + 1]
GROUPS = [1, 3, 4, 8]


def triton(case: Case, dtype: torch.dtype = torch.float32) -> TritonAttention:
    """With NaN wherever no token was written."""
    return TritonAttention(case.backend("reference", dtype=dtype).cache, case.q_starts, case.scale)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    groups = draw(st.lists(st.sampled_from(GROUPS), min_size=1, max_size=2))
    most_queries = 2 * 64 // max(groups) + 6  # on three tiles; more would only take the interpreter seconds
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        context = draw(st.sampled_from(BORDERS) | st.integers(1, 300))
        queries = draw(st.just(1) | st.integers(1, min(context, 70, most_queries)))
        rows.append((queries, context))
    q_starts = tuple(np.cumsum([0, *groups]).tolist())
    head_dim, block_size = draw(st.sampled_from([64, 80, 96, 128, 256])), draw(st.sampled_from([16, 16, 32]))
    return Case(rows, q_starts, head_dim, block_size, draw(st.integers(0, 2**31)))


@examples(10)
@given(case=cases())
def test_is_dense_attention(case: Case) -> None:
    assert_close(case.run(triton(case)), case.dense(), 1e-5)


@pytest.mark.parametrize(("group", "head_dim"), [(1, 128), (3, 64), (4, 128), (8, 64), (16, 128), (32, 64)])
def test_half_precision(group: int, head_dim: int) -> None:
    case = Case([(1, 600), (20, 90), (1, 1), (70, 130)], (0, group, 2 * group), head_dim)
    o_THD = case.run(triton(case, torch.float16))
    assert o_THD.dtype is torch.float16
    assert_close(o_THD, case.dense(), 4e-3)


def test_bfloat16_as_far_as_the_interpreter_goes() -> None:
    """It rounds bfloat16 down, and multiplies it wrongly, so the kernel has it multiply float32 there."""
    case = Case([(1, 600), (20, 90)], (0, 3, 6), 64)
    assert_close(case.run(triton(case, torch.bfloat16)), case.dense(), 0.05)


@examples(4)
@given(case=cases())
def test_a_row_has_the_same_bits_alone(case: Case) -> None:
    backend = triton(case)
    together_THD = case.run(backend)
    batch, q_THD = case.batch(), case.qkv()[0]
    for row, (start, stop) in enumerate(zip(batch.query_starts_B1, batch.query_starts_B1[1:], strict=False)):
        alone = AttentionBatch(
            np.array([0, stop - start], np.int32),
            batch.context_lens_B[row : row + 1],
            batch.block_tables_BN[row : row + 1],
        )
        backend.begin(alone)
        assert torch.equal(bits(backend.attend(1, q_THD[start:stop])), bits(together_THD[start:stop]))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_a_row_that_is_not_finite_stays_alone(where: str) -> None:
    case = Case([(1, 90), (5, 33), (1, 700)], (0, 3, 6), 64)
    clean = case.run(triton(case))
    if where == "q":
        case.q[1][:] = NAN
    else:
        case.kv[1][:, "kv".index(where)] = NAN
    o_THD = case.run(triton(case))
    assert not o_THD[1:6].isfinite().any()
    assert_close(o_THD[[0, 6]], clean[[0, 6]].double())


def test_large_scores_neither_overflow_nor_underflow() -> None:
    case = Case([(1, 600), (30, 60)], (0, 2), 64)
    case.q = [q * 1000 for q in case.q]
    case.kv[0][:, 0].abs_().neg_()
    case.q[0].abs_()
    assert_close(case.run(triton(case)), case.dense(), 1e-3)
