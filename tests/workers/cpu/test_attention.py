"""Both attention backends against dense attention in float64 that never saw a block table."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import numba
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from headwise.workers.backends import BACKENDS, find_backend
from headwise.workers.cpu import attention_plan
from headwise.workers.cpu import attention_simd as simd
from headwise.workers.cpu.attention import CpuAttention
from headwise.workers.cuda import attention
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.cache import KVCache
from headwise.workers.model.attention import PART_KEYS, AttentionBatch
from tests.effort import examples
from tests.workers.attention_case import NAN, Case, assert_close

BORDERS = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        context = draw(st.sampled_from(BORDERS) | st.integers(1, 300))
        rows.append((draw(st.just(1) | st.sampled_from([1, context]) | st.integers(1, context)), context))
    groups = draw(st.lists(st.sampled_from([1, 2, 3, 4, 7]), min_size=1, max_size=3))
    q_starts = tuple(np.cumsum([0, *groups]).tolist())
    head_dim, block_size = draw(st.sampled_from([8, 16, 24, 32, 64, 80, 128])), draw(st.sampled_from([16, 16, 32]))
    return Case(rows, q_starts, head_dim, block_size, draw(st.integers(0, 2**31)))


@examples(60)
@given(case=cases(), threads=st.sampled_from([1, 2]))
def test_backends_agree_with_dense_attention(case: Case, threads: int) -> None:
    expected = case.dense()
    assert_close(case.run(case.backend("reference")), expected)
    with mock.patch.object(attention_plan, "_PARALLEL_COST", 0):
        assert_close(case.run(case.backend("cpu", threads)), expected)


@st.composite
def companies(draw: st.DrawFn) -> tuple[Case, list[tuple[int, int]]]:
    """A case of whole rows, and for each the tokens of a step: (first, how many)."""
    borders = [edge + n * PART_KEYS for n in (0, 1, 2) for edge in (1, 63, 64, 65, PART_KEYS - 1, PART_KEYS)]
    contexts = draw(st.lists(st.sampled_from(borders) | st.integers(1, 3 * PART_KEYS), min_size=1, max_size=3))
    groups = draw(st.lists(st.sampled_from([1, 2, 3, 7]), min_size=1, max_size=2))
    head_dim, block_size = draw(st.sampled_from([8, 24, 64])), draw(st.sampled_from([16, 32]))
    rows = [(context, context) for context in contexts]
    case = Case(rows, tuple(np.cumsum([0, *groups]).tolist()), head_dim, block_size, draw(st.integers(0, 2**31)))
    firsts = [draw(st.just(context - 1) | st.integers(0, context - 1)) for context in contexts]
    return case, [(first, draw(st.integers(1, c - first))) for first, c in zip(firsts, contexts, strict=True)]


@examples(60)
@given(drawn=companies(), threads=st.integers(1, 3), parallel_cost=st.sampled_from([0, 10**12]))
def test_a_row_has_the_same_bits_in_any_chunk_batch_and_number_of_threads(
    drawn: tuple[Case, list[tuple[int, int]]], threads: int, parallel_cost: int
) -> None:
    case, steps = drawn
    backend = case.backend("cpu", threads)
    alone = case.backend("cpu")
    with mock.patch.object(attention_plan, "_PARALLEL_COST", parallel_cost):
        case.run(backend)  # all keys and values are in the cache now, also those that a step may not see
        case.run(alone)
        starts = np.cumsum([0, *(count for _, count in steps)], dtype=np.int32)
        contexts = np.array([first + count for first, count in steps], np.int32)
        backend.begin(AttentionBatch(starts, contexts, case.tables_BN.numpy()))
        o_THD = backend.attend(
            1, torch.cat([q[first:][:count] for q, (first, count) in zip(case.q, steps, strict=True)])
        )
    token = 0
    for row, (first, count) in enumerate(steps):
        for position in range(first, first + count):
            table_1N, ends = case.tables_BN[row : row + 1].numpy(), np.array([0, 1], np.int32)
            alone.begin(AttentionBatch(ends, np.array([position + 1], np.int32), table_1N))
            assert torch.equal(bits(alone.attend(1, case.q[row][position : position + 1])[0]), bits(o_THD[token]))
            token += 1


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


@pytest.mark.parametrize("q_starts", [(0, 1), (0, 1, 2), (0, 2, 3), (0, 3, 6, 9), (0, 100)])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_uneven_and_large_groups(q_starts: tuple[int, ...], threads: int) -> None:
    case = Case([(1, 130), (40, 40), (3, 65)], q_starts, 16)
    with mock.patch.object(attention_plan, "_PARALLEL_COST", 0):
        assert_close(case.run(case.backend("cpu", threads)), case.dense())


@pytest.mark.parametrize("rows", [[(1, 2000)], [(40, 1500)], [(1, 900), (1, 3), (70, 700)]])
def test_a_long_context_is_divided_over_threads(rows: list[tuple[int, int]]) -> None:
    case = Case(rows, (0, 3), 64)
    backend, batch = case.backend("cpu", 2), case.batch()
    backend.begin(batch)
    assert isinstance(backend, CpuAttention) and backend.work.sums_rows > 0
    covered = int((backend.work.items["key_end"] - backend.work.items["key_start"]).sum())
    tiles = [(queries, context, token) for queries, context in rows for token in range(0, queries, 32)]
    assert covered == sum(context - queries + min(queries, token + 32) for queries, context, token in tiles)
    o_THD = case.run(backend, batch)
    assert_close(o_THD, case.dense())
    assert torch.equal(bits(o_THD), bits(case.run(case.backend("cpu"))))


def test_layers_and_steps_do_not_mix() -> None:
    case = Case([(1, 40), (20, 20)], (0, 2, 4), 32)
    backend = case.backend("cpu")
    first = case.run(backend)
    q_THD, k_TKD, v_TKD = case.qkv()
    case.write(backend, 0, -k_TKD, -v_TKD)
    backend.begin(replace(case.batch(), context_lens_B=np.array([1, 20], np.int32)))
    # The rows' last tokens sit behind a context that layer 0 does not have; the second row is complete in both.
    assert torch.equal(backend.attend(0, -q_THD)[1:], -first[1:])
    backend.begin(case.batch())
    assert torch.equal(backend.attend(1, q_THD), first)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("poison", [NAN, float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_a_row_that_is_not_finite_stays_alone(threads: int, poison: float, where: str) -> None:
    case = Case([(1, 90), (5, 33), (1, 200)], (0, 3, 6), 32)
    with mock.patch.object(attention_plan, "_PARALLEL_COST", 0):
        clean = case.run(case.backend("cpu", threads))
        if where == "q":
            case.q[1][:] = poison
        else:
            case.kv[1][:, "kv".index(where)] = poison
        for backend in (case.backend("cpu", threads), case.backend("reference")):
            o_THD = case.run(backend)
            assert not o_THD[1:6].isfinite().any()
            assert_close(o_THD[[0, 6]], clean[[0, 6]].double())


def test_large_scores_neither_overflow_nor_underflow() -> None:
    case = Case([(1, 100), (30, 60)], (0, 2), 16)
    case.q = [q * 1000 for q in case.q]
    case.kv[0][:, 0].abs_().neg_()
    case.q[0].abs_()
    assert_close(case.run(case.backend("cpu")), case.dense(), 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_reference_takes_half_precision(dtype: torch.dtype) -> None:
    case = Case([(1, 40), (7, 17)], (0, 2, 3), 16)
    o_THD = case.run(case.backend("reference", dtype=dtype))
    assert o_THD.dtype is dtype
    torch.testing.assert_close(o_THD.double(), case.dense(), rtol=0, atol=0.05)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_reference_on_cuda() -> None:
    case = Case([(1, 40), (7, 17), (64, 300)], (0, 2, 3), 64)
    assert_close(case.run(case.backend("reference", device="cuda")).cpu(), case.dense())


@pytest.mark.parametrize("threads", [1, 2])
def test_backends_work_in_several_threads_at_once(threads: int) -> None:
    made = [Case([(1, 300), (33, 100)], (0, 3), 64, seed=seed) for seed in range(4)]
    results: dict[int, list[Tensor]] = {}

    def work(index: int) -> None:
        backend = made[index].backend("cpu", threads)
        results[index] = [made[index].run(backend) for _ in range(20)]

    workers = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert sorted(results) == [0, 1, 2, 3]
    for index, outputs in results.items():
        expected = made[index].dense()
        for o_THD in outputs:
            assert_close(o_THD, expected)


def test_exp2_is_right_to_a_few_ulp() -> None:
    x = np.concatenate([np.linspace(-124.9, 0, 200_001), -np.logspace(-8, 2, 1000)]).astype(np.float32)
    exact = np.exp2(x.astype(np.float64))
    ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
    exp2 = numba.njit(lambda value: simd.exp2_of(value))
    got = np.array([exp2(value) for value in x], dtype=np.float64)
    assert np.abs((got - exact) / ulp).max() < 2
    assert exp2(np.float32(0)) == 1 and np.isnan(exp2(np.float32(NAN)))
    assert 0 <= exp2(np.float32(-1e30)) < 1e-37 and 0 <= exp2(np.float32("-inf")) < 1e-37


@pytest.mark.parametrize(
    ("break_it", "field"),
    [
        (lambda b: replace(b, block_tables_BN=b.block_tables_BN + 1000), "batch"),
        (lambda b: replace(b, block_tables_BN=b.block_tables_BN[:, :1]), "batch"),
        (lambda b: replace(b, context_lens_B=b.context_lens_B * 0), "batch"),
        (lambda b: replace(b, query_starts_B1=b.query_starts_B1 + 1), "batch"),
        (lambda b: replace(b, query_starts_B1=b.query_starts_B1 * 2), "q_THD"),
    ],
)
def test_a_batch_that_would_touch_foreign_memory_is_refused(
    break_it: Callable[[AttentionBatch], AttentionBatch], field: str
) -> None:
    case = Case([(1, 40)], (0, 2), 16)
    with pytest.raises(InvalidValueError, match=rf"^{field}="):
        case.run(case.backend("cpu"), break_it(case.batch()))


def test_tensors_of_the_wrong_kind_are_refused() -> None:
    case = Case([(1, 40)], (0, 2), 16)
    backend, (q_THD, _, _) = case.backend("cpu"), case.qkv()
    backend.begin(case.batch())
    for wrong in (q_THD.half(), q_THD.transpose(0, 1).contiguous(), q_THD.transpose(1, 2).contiguous().transpose(1, 2)):
        with pytest.raises(InvalidValueError, match=r"^q_THD="):
            backend.attend(1, wrong)


def test_backends_refuse_what_they_cannot_serve() -> None:
    cache = KVCache(1, 1, 2, 16, 8, torch.float32, "cpu", transposed_keys=True)
    for q_starts in ((0, 1), (1, 2, 3), (0, 2, 2)):
        with pytest.raises(InvalidValueError, match=r"^q_starts="):
            CpuAttention(cache, q_starts, 1.0)
    with pytest.raises(InvalidValueError, match=r"^num_threads=0"):
        CpuAttention(cache, (0, 1, 2), 1.0, 0)
    with pytest.raises(InvalidValueError, match=r"^transposed_keys=False"):
        CpuAttention(KVCache(1, 1, 1, 16, 8, torch.float32), (0, 1), 1.0)
    for block_size, head_dim in ((8, 8), (16, 12)):
        other = KVCache(1, 1, 1, block_size, head_dim, torch.float32, transposed_keys=True)
        with pytest.raises(InvalidValueError, match=r"^attention="):
            CpuAttention(other, (0, 1), 1.0)


@pytest.mark.parametrize("triton", [True, False])
def test_a_device_and_dtype_have_a_backend(monkeypatch: pytest.MonkeyPatch, triton: bool) -> None:
    monkeypatch.setattr(attention, "TRITON", triton)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert find_backend(None, cpu, torch.float32, 16, 64) is BACKENDS["cpu"]
    for device, dtype, block_size, head_dim in (
        (cpu, torch.float32, 8, 8),
        (cpu, torch.float32, 16, 12),
        (cpu, torch.bfloat16, 16, 8),
        (cuda, torch.float64, 16, 64),
    ):
        assert find_backend(None, device, dtype, block_size, head_dim) is BACKENDS["reference"]
    assert find_backend(None, cuda, torch.bfloat16, 16, 64) is BACKENDS["cuda" if triton else "reference"]
    assert find_backend("reference", cpu, torch.float32, 16, 64) is BACKENDS["reference"]
    with pytest.raises(InvalidValueError, match=r"^attention='fast'.*cpu, cuda, reference"):
        find_backend("fast", cpu, torch.float32, 16, 64)
    with pytest.raises(InvalidValueError, match=r"^attention='cpu': device=cuda is not cpu and dtype=bfloat16 is not"):
        find_backend("cpu", cuda, torch.bfloat16, 16, 64)
