"""Both attention backends against dense attention in float64 that never saw a block table."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

import numba
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from headwise.workers.backends import create_backend, default_backend, transposed_keys
from headwise.workers.cpu import attention_plan as cpu_plan
from headwise.workers.cpu import attention_simd as simd
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.cache import KVCache
from headwise.workers.model.attention import AttentionBackend, AttentionBatch
from tests.examples import examples

NAN = float("nan")
BORDERS = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129]


@dataclass
class Case:
    """A step over rows that have some context already: random numbers, blocks in shuffled order, NaN everywhere else.

    rows: (tokens of this step, tokens of context once they are written) of each row.
    """

    rows: list[tuple[int, int]]
    q_starts: tuple[int, ...]
    head_dim: int
    block_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.num_kv_heads, self.scale = len(self.q_starts) - 1, 1.3 * self.head_dim**-0.5
        self.kv = [self.random(context, 2, self.num_kv_heads, self.head_dim) for _, context in self.rows]
        self.q = [self.random(queries, self.q_starts[-1], self.head_dim) for queries, _ in self.rows]
        used = [-(-context // self.block_size) for _, context in self.rows]
        self.num_blocks = sum(used) + 2
        blocks = torch.split(torch.randperm(self.num_blocks, generator=self.generator).int(), [*used, 2])[:-1]
        self.tables_BN = torch.nn.utils.rnn.pad_sequence(list(blocks), batch_first=True)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def slots(self, row: int) -> Tensor:
        positions = torch.arange(self.rows[row][1])
        return self.tables_BN[row].long()[positions // self.block_size] * self.block_size + positions % self.block_size

    def batch(self) -> AttentionBatch:
        queries, contexts = (torch.tensor(x, dtype=torch.int32) for x in zip(*self.rows, strict=True))
        starts = torch.cat([torch.zeros(1, dtype=torch.int32), queries.cumsum(0).int()])
        slots = torch.cat([self.slots(row)[-queries:] for row, (queries, _) in enumerate(self.rows)])
        return AttentionBatch(starts, contexts, self.tables_BN, slots, int(queries.max()), int(contexts.max()))

    def backend(
        self, name: str, threads: int = 1, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> AttentionBackend:
        """A backend whose cache holds the context from before this step in layer 1."""
        sizes = (2, self.num_blocks, self.num_kv_heads, self.block_size, self.head_dim)
        cache = KVCache(*sizes, dtype, device, transposed_keys(name))
        cache.keys.fill_(NAN)
        cache.values.fill_(NAN)
        for row, (queries, context) in enumerate(self.rows):
            before = self.kv[row][: context - queries].to(device, dtype)
            cache.write(1, before[:, 0], before[:, 1], self.slots(row)[: context - queries].to(device))
        return create_backend(name, cache, self.q_starts, self.scale, threads)

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """The step's queries, keys and values as views of one tensor."""
        parts = [torch.cat([q, kv[-len(q) :].flatten(1, 2)], 1) for q, kv in zip(self.q, self.kv, strict=True)]
        heads = [self.q_starts[-1], self.num_kv_heads, self.num_kv_heads]
        q_THD, k_TKD, v_TKD = torch.split(torch.cat(parts), heads, dim=1)
        return q_THD, k_TKD, v_TKD

    def run(self, backend: AttentionBackend, batch: AttentionBatch | None = None) -> Tensor:
        batch = batch or self.batch()
        q_THD, k_TKD, v_TKD = self.qkv()
        backend.write(1, k_TKD, v_TKD, batch)
        return backend.attend(1, q_THD, batch)

    def dense(self) -> Tensor:
        """What comes out by definition, in float64."""
        outputs = []
        for (queries, context), q_QHD, kv_C2KD in zip(self.rows, self.q, self.kv, strict=True):
            for i in range(queries):
                k_CKD, v_CKD = kv_C2KD[: context - queries + i + 1].double().unbind(1)
                heads = []
                for head, (first, last) in enumerate(zip(self.q_starts, self.q_starts[1:], strict=False)):
                    scores_HC = q_QHD[i, first:last].double() @ k_CKD[:, head].T * self.scale
                    heads.append(scores_HC.softmax(-1) @ v_CKD[:, head])
                outputs.append(torch.cat(heads))
        return torch.stack(outputs)


def assert_close(o_THD: Tensor, expected_THD: Tensor, tolerance: float = 1e-5) -> None:
    assert o_THD.shape == expected_THD.shape and o_THD.is_contiguous()
    torch.testing.assert_close(o_THD.double(), expected_THD, rtol=0, atol=tolerance)


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
    with mock.patch.object(cpu_plan, "_PARALLEL_COST", 0):
        assert_close(case.run(case.backend("cpu", threads)), expected)


@pytest.mark.parametrize("q_starts", [(0, 1), (0, 1, 2), (0, 2, 3), (0, 3, 6, 9), (0, 100)])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_uneven_and_large_groups(q_starts: tuple[int, ...], threads: int) -> None:
    case = Case([(1, 130), (40, 40), (3, 65)], q_starts, 16)
    with mock.patch.object(cpu_plan, "_PARALLEL_COST", 0):
        assert_close(case.run(case.backend("cpu", threads)), case.dense())


@pytest.mark.parametrize("rows", [[(1, 2000)], [(40, 1500)], [(1, 900), (1, 3), (70, 700)]])
def test_a_long_context_is_divided_over_threads(rows: list[tuple[int, int]]) -> None:
    case = Case(rows, (0, 3), 64)
    backend, batch = case.backend("cpu", 2), case.batch()
    step = cpu_plan.cut_step(batch, backend.cache, np.array(case.q_starts), 2)
    assert step.parallel and step.num_parts > 1
    covered = sum(int(item[cpu_plan.KEY_END] - item[cpu_plan.KEY_START]) for item in step.items)
    tiles = [(queries, context, token) for queries, context in rows for token in range(0, queries, 32)]
    assert covered == sum(context - queries + min(queries, token + 32) for queries, context, token in tiles)
    assert_close(case.run(backend, batch), case.dense())


def test_layers_and_steps_do_not_mix() -> None:
    case = Case([(1, 40), (20, 20)], (0, 2, 4), 32)
    backend = case.backend("cpu")
    first = case.run(backend)
    q_THD, k_TKD, v_TKD = case.qkv()
    batch = replace(case.batch(), context_lens_B=torch.tensor([1, 20], dtype=torch.int32))
    backend.write(0, -k_TKD, -v_TKD, case.batch())
    # The rows' last tokens sit behind a context that layer 0 does not have; the second row is complete in both.
    assert torch.equal(backend.attend(0, -q_THD, batch)[1:], -first[1:])
    assert torch.equal(backend.attend(1, q_THD, case.batch()), first)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("poison", [NAN, float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_a_row_that_is_not_finite_stays_alone(threads: int, poison: float, where: str) -> None:
    case = Case([(1, 90), (5, 33), (1, 200)], (0, 3, 6), 32)
    with mock.patch.object(cpu_plan, "_PARALLEL_COST", 0):
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
    q_THD, k_TKD, v_TKD = (x.to(dtype) for x in case.qkv())
    backend, batch = case.backend("reference", dtype=dtype), case.batch()
    backend.write(1, k_TKD, v_TKD, batch)
    o_THD = backend.attend(1, q_THD, batch)
    assert o_THD.dtype is dtype
    torch.testing.assert_close(o_THD.double(), case.dense(), rtol=0, atol=0.05)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_reference_on_cuda() -> None:
    case = Case([(1, 40), (7, 17), (64, 300)], (0, 2, 3), 64)
    batch = case.batch()
    tensors = ("query_starts_B1", "context_lens_B", "block_tables_BN", "slots_T")
    batch = replace(batch, **{name: getattr(batch, name).cuda() for name in tensors})
    q_THD, k_TKD, v_TKD = (x.cuda() for x in case.qkv())
    backend = case.backend("reference", device="cuda")
    backend.write(1, k_TKD, v_TKD, batch)
    assert_close(backend.attend(1, q_THD, batch).cpu(), case.dense())


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
        (lambda b: replace(b, slots_T=torch.tensor([10**6])), "slots_T"),
        (lambda b: replace(b, slots_T=torch.tensor([-1])), "slots_T"),
        (lambda b: replace(b, block_tables_BN=b.block_tables_BN + 1000), "batch"),
        (lambda b: replace(b, block_tables_BN=b.block_tables_BN[:, :1]), "batch"),
        (lambda b: replace(b, context_lens_B=b.context_lens_B * 0), "batch"),
        (lambda b: replace(b, query_starts_B1=b.query_starts_B1 + 1), "batch"),
        (lambda b: replace(b, slots_T=b.slots_T.repeat(2)), "k_TKD"),
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
    backend, batch, (q_THD, k_TKD, v_TKD) = case.backend("cpu"), case.batch(), case.qkv()
    with pytest.raises(InvalidValueError, match=r"^v_TKD="):
        backend.write(1, k_TKD, v_TKD.half(), batch)
    with pytest.raises(InvalidValueError, match=r"^q_THD="):
        backend.attend(1, q_THD.transpose(0, 1).contiguous(), batch)


def test_backends_refuse_what_they_cannot_serve() -> None:
    cache = KVCache(1, 1, 2, 16, 8, torch.float32, "cpu", transposed_keys=True)
    with pytest.raises(InvalidValueError, match=r"^attention_backend='fast'.*reference, cpu"):
        create_backend("fast", cache, (0, 1, 2), 1.0)
    for q_starts in ((0, 1), (1, 2, 3), (0, 2, 2)):
        with pytest.raises(InvalidValueError, match=r"^q_starts="):
            create_backend("cpu", cache, q_starts, 1.0)
    with pytest.raises(InvalidValueError, match=r"^num_threads=0"):
        create_backend("cpu", cache, (0, 1, 2), 1.0, 0)
    with pytest.raises(InvalidValueError, match=r"^transposed_keys=False"):
        create_backend("cpu", KVCache(1, 1, 1, 16, 8, torch.float32), (0, 1), 1.0)
    for block_size, head_dim, dtype in ((8, 8, torch.float32), (16, 12, torch.float32), (16, 8, torch.bfloat16)):
        other = KVCache(1, 1, 1, block_size, head_dim, dtype, transposed_keys=True)
        with pytest.raises(InvalidValueError, match=r"^attention_backend="):
            create_backend("cpu", other, (0, 1), 1.0)
        assert default_backend("cpu", dtype, block_size, head_dim) == "reference"
    assert default_backend("cpu", torch.float32, 16, 64) == "cpu"
    assert default_backend("cuda", torch.float32, 16, 64) == "reference"
