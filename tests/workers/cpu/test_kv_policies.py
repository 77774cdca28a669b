"""The CPU kernels under KV policies and with quantised keys and values, against what they are by definition."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise.workers.cpu import attention_plan
from headwise.workers.cpu.attention_plan import PART_KEYS
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.format import KV_DTYPES
from headwise.workers.kv.policy import DENSE, Reach
from tests.effort import examples
from tests.workers.attention_case import assert_close
from tests.workers.policy_case import LAYERS, PolicyCase

REACHES = {
    "window": [Reach(0, 40)],
    "narrow": [Reach(0, 1), Reach(0, 3)],
    "sinks": [Reach(4, 60)],
    "many sinks": [Reach(300, 20)],
    "mixed": [DENSE, Reach(0, 100), Reach(4, 252), Reach(4, 252)],
    "long": [Reach(1, 700)],
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("name", list(REACHES))
def test_reaches(name: str, shifted: bool, threads: int) -> None:
    reaches = REACHES[name]
    rows = [(1, 1), (1, 41), (70, 400), (1, 1000), (3, 700), (300, 300), (1, 64)]
    case = PolicyCase(reaches, rows, tuple(range(0, 3 * len(reaches) + 1, 3)), shifted=shifted)
    with mock.patch.object(attention_plan, "_PARALLEL_COST", 0):
        backend = case.backend(threads)
        for layer in range(LAYERS):
            assert_close(case.run(backend, layer), case.expected(layer))


@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 64, 80, 96])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_formats(kv_dtype: str, head_dim: int) -> None:
    if "int4" in kv_dtype and head_dim % min(head_dim, 32):
        pytest.skip("no such format")
    reaches = [DENSE, Reach(4, 100), Reach(0, 70)]
    rows = [(1, 300), (40, 45), (1, 17), (9, 600)]
    case = PolicyCase(reaches, rows, (0, 3, 4, 6), head_dim, 32 if head_dim % 3 else 16, kv_dtype)
    assert_close(case.run(case.backend()), case.expected())


FORMS = [(64, "int8/int4"), (24, "bfloat16"), (8, "int4"), (72, "int8"), (96, "int4/int8"), (40, "float16")]


@st.composite
def policy_cases(draw: st.DrawFn) -> tuple[PolicyCase, list[tuple[int, int]]]:
    """A case of whole rows, and for each row tokens of a step: (first, how many)."""
    sizes = st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257]) | st.integers(1, 300)
    sinks = draw(st.just(Reach(4, 60)) | st.builds(Reach, sizes, sizes))
    reach = st.just(DENSE) | st.builds(Reach, st.just(0), sizes) | st.just(sinks)
    groups = draw(st.lists(st.sampled_from([1, 2, 3, 7]), min_size=1, max_size=3))
    reaches = [draw(reach) for _ in groups]
    borders = [edge + n * PART_KEYS for n in (0, 1, 2) for edge in (1, 63, 64, 65, PART_KEYS - 1, PART_KEYS)]
    contexts = draw(st.lists(st.sampled_from(borders) | st.integers(1, 3 * PART_KEYS), min_size=1, max_size=3))
    firsts = [draw(st.just(context - 1) | st.integers(0, context - 1)) for context in contexts]
    steps = [(first, draw(st.integers(1, c - first))) for first, c in zip(firsts, contexts, strict=True)]
    rows = [(count, first + count) for first, count in steps]
    q_starts = [sum(groups[:i]) for i in range(len(groups) + 1)]
    head_dim, kv_dtype = draw(st.sampled_from([*FORMS, (8, "float32"), (32, "float32")]))
    block_size, shifted, seed = draw(st.sampled_from([16, 32, 48])), draw(st.booleans()), draw(st.integers(0, 2**31))
    return PolicyCase(reaches, rows, tuple(q_starts), head_dim, block_size, kv_dtype, shifted, seed), steps


@examples(40)
@given(drawn=policy_cases(), threads=st.integers(1, 3), parallel_cost=st.sampled_from([0, 10**12]))
def test_a_row_is_right_and_has_the_same_bits_in_any_company(
    drawn: tuple[PolicyCase, list[tuple[int, int]]], threads: int, parallel_cost: int
) -> None:
    case, steps = drawn
    with mock.patch.object(attention_plan, "_PARALLEL_COST", parallel_cost):
        o_THD = case.run(case.backend(threads))
    assert_close(o_THD, case.expected(), 2e-5)
    token = 0
    for row, (first, count) in enumerate(steps):
        alone, others = case.backend(), [(0, 1)] * row
        for position in {first, first + count // 2, first + count - 1}:
            o_1HD = case.run(alone, 0, [*others, (position, 1), *[(0, 1)] * (len(steps) - row - 1)])[row]
            assert torch.equal(bits(o_1HD), bits(o_THD[token + position - first]))
        token += count


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32)


def test_queries_of_the_sinks_must_be_given() -> None:
    case = PolicyCase([Reach(4, 60)], [(1, 100)], (0, 2))
    backend = case.backend()
    backend.begin(case.batch(backend))
    with pytest.raises(InvalidValueError, match=r"^q_sinks_THD="):
        backend.attend(0, case.q[0][-1:, 0])
