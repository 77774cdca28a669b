"""Attention by FlashInfer. It is not installed here: what stands in for it checks what it is asked, and computes it."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from headwise.workers.backends import BACKENDS, find_backend
from headwise.workers.cuda import flashinfer
from headwise.workers.cuda.flashinfer import FlashInferAttention
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.cache import KVCache
from headwise.workers.model.partition import partition_heads
from tests.effort import examples
from tests.workers.attention_case import Case, assert_close


class Wrapper:
    """What both of the library's wrappers have in common: they are planned with tensors of the host, and attend by the
    last plan over (keys, values), each [pages, KV heads, page size, head_dim]."""

    made: list[Wrapper]

    def __init__(self, workspace: Tensor, kv_layout: str, use_tensor_cores: bool = False) -> None:
        assert workspace.dtype is torch.uint8 and not workspace.any() and kv_layout == "HND"
        self.workspace, self.use_tensor_cores, self.num_plans = workspace, use_tensor_cores, 0
        Wrapper.made.append(self)

    def _plan(self, q_starts_B1: Tensor, page_starts_B1: Tensor, pages_N: Tensor, last_B: Tensor, *sizes: int) -> None:
        for x in (q_starts_B1, page_starts_B1, pages_N, last_B):
            assert x.dtype is torch.int32 and x.device.type == "cpu" and x.is_contiguous()
        assert int(page_starts_B1[-1]) == len(pages_N)
        self._queries, self._page_starts = q_starts_B1.tolist(), page_starts_B1.tolist()
        self._pages, self._last, self._sizes = pages_N.long(), last_B.tolist(), sizes
        self.num_plans += 1

    def run(self, q_THD: Tensor, kv: tuple[Tensor, Tensor]) -> Tensor:
        heads, kv_heads, head_dim, page_size = self._sizes
        assert q_THD.is_contiguous() and q_THD.shape[1:] == (heads, head_dim)
        assert all(x.shape[1:] == (kv_heads, page_size, head_dim) for x in kv) and q_THD.dtype == kv[0].dtype
        rows = []
        for row, last in enumerate(self._last):
            pages = self._pages[self._page_starts[row] : self._page_starts[row + 1]]
            length = (len(pages) - 1) * page_size + last
            q_QHD = q_THD[self._queries[row] : self._queries[row + 1]].double()
            k_CHD, v_CHD = (
                x[pages].transpose(1, 2).flatten(0, 1)[:length].double().repeat_interleave(heads // kv_heads, 1)
                for x in kv
            )
            scores_HQC = torch.einsum("qhd,chd->hqc", q_QHD, k_CHD) * self.sm_scale
            position_Q1 = torch.arange(length - len(q_QHD), length)[:, None]
            scores_HQC.masked_fill_(torch.arange(length) > position_Q1, -float("inf"))
            rows.append(torch.einsum("hqc,chd->qhd", scores_HQC.softmax(-1), v_CHD))
        return torch.cat(rows).to(q_THD.dtype)


class Prefill(Wrapper):
    """As flashinfer 0.7.2's BatchPrefillWithPagedKVCacheWrapper."""

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        assert causal and q_data_type == kv_data_type
        self.sm_scale = sm_scale
        pages = (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self._plan(qo_indptr, *pages, num_qo_heads, num_kv_heads, head_dim_qk, page_size)


class Decode(Wrapper):
    """As flashinfer 0.7.2's BatchDecodeWithPagedKVCacheWrapper."""

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        assert q_data_type == kv_data_type
        self.sm_scale = sm_scale
        queries = torch.arange(len(indptr), dtype=torch.int32)
        self._plan(queries, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size)


@pytest.fixture(scope="module", autouse=True)
def library() -> Any:
    """A library of that name, with little workspace."""
    module = ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = Prefill  # type: ignore[attr-defined]
    module.BatchDecodeWithPagedKVCacheWrapper = Decode  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flashinfer", module)
        patch.setattr(flashinfer, "_WORKSPACE_BYTES", 1 << 10)
        yield


@pytest.fixture(autouse=True)
def nothing_made() -> None:
    Wrapper.made = []


def attend(case: Case, dtype: torch.dtype = torch.float32) -> Tensor:
    cache = case.backend("reference", dtype=dtype).cache
    return case.run(FlashInferAttention(cache, case.q_starts, case.scale))


@examples(30)
@given(
    rows=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 40)), min_size=1, max_size=5),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    block_size=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 99),
)
def test_mixed_steps(rows: list[tuple[int, int]], kv_heads: int, group: int, block_size: int, seed: int) -> None:
    contexts = [(queries, queries + before) for queries, before in rows]
    case = Case(contexts, tuple(range(0, (kv_heads + 1) * group, group)), 8, block_size, seed)
    assert_close(attend(case), case.dense())


def test_a_step_that_only_decodes_has_a_plan_of_its_own() -> None:
    for group, tensor_cores in ((1, False), (3, False), (4, True), (7, True)):
        Wrapper.made = []
        case = Case([(1, 1), (1, 16), (1, 17), (1, 40)], (0, group, 2 * group), 8)
        assert_close(attend(case), case.dense())
        mixed, decode = Wrapper.made
        assert isinstance(decode, Decode) and (mixed.num_plans, decode.num_plans) == (0, 1)
        assert decode.use_tensor_cores == tensor_cores and decode.workspace is mixed.workspace


def test_one_plan_serves_all_layers_of_a_step_and_the_next_step_has_another() -> None:
    case = Case([(3, 20), (1, 5)], (0, 2, 4), 8)
    backend = FlashInferAttention(case.backend("reference").cache, case.q_starts, case.scale)
    first = case.run(backend)
    q_THD, *_ = case.qkv()
    assert torch.equal(backend.attend(1, q_THD), first)
    assert [wrapper.num_plans for wrapper in Wrapper.made] == [1, 0]
    assert torch.equal(case.run(backend), first)
    assert [wrapper.num_plans for wrapper in Wrapper.made] == [2, 0]


def test_groups_that_differ_are_refused_by_name() -> None:
    """Of 10 query heads and 2 KV heads on four ranks, one rank has two queries of the first and one of the second."""
    q_starts = partition_heads(10, 2, 4)[1].q_starts
    cache = KVCache(1, 1, 2, 16, 64, torch.float32)
    message = r"^attention='flashinfer': needs equally many query heads .* they have \[2, 1\]; .*--tp"
    with pytest.raises(InvalidValueError, match=message):
        FlashInferAttention(cache, q_starts, 1.0)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "obstacle"),
    [
        ("cpu", torch.bfloat16, 128, "device=cpu is not cuda"),
        ("cuda", torch.float32, 128, "dtype=float32 is neither bfloat16 nor float16"),
        ("cuda", torch.float16, 80, "head_dim=80 is none of 64, 128, 256"),
    ],
)
def test_what_it_cannot_do_is_named(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, head_dim: int, obstacle: str
) -> None:
    monkeypatch.setattr(flashinfer, "_installed", lambda: True)
    monkeypatch.setattr(flashinfer, "TRITON", True)
    assert FlashInferAttention.obstacles(torch.device(device), dtype, 16, head_dim) == [obstacle]
    assert FlashInferAttention.obstacles(torch.device("cuda"), torch.bfloat16, 16, 128) == []


def test_only_who_asks_for_it_gets_it_and_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = (torch.device("cuda"), torch.bfloat16, 16, 128)
    monkeypatch.setattr(flashinfer, "TRITON", True)
    monkeypatch.setattr(flashinfer, "_installed", lambda: True)
    assert find_backend("flashinfer", *cache).attention is FlashInferAttention
    assert find_backend(None, *cache).attention is not FlashInferAttention
    assert list(BACKENDS)[-1] == "flashinfer"
    monkeypatch.setattr(flashinfer, "_installed", lambda: False)
    with pytest.raises(InvalidValueError, match=r"^attention='flashinfer': flashinfer is not installed \(pip install"):
        find_backend("flashinfer", *cache)
