"""Kernels that are right pass, and each that is wrong is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headwise.workers.cuda import attention_kernels
from headwise.workers.cuda.flashinfer import FlashInferAttention
from headwise.workers.cuda.ops import TritonOps
from headwise.workers.cuda.self_check import check_kernels
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.cache import KVCache
from tests.workers.cuda.test_flashinfer import Decode, Wrapper, library

__all__ = ["library"]

Q_STARTS = (0, 3, 6)


def check(dtype: torch.dtype = torch.float32) -> None:
    check_kernels(KVCache(1, 2, 2, 16, 64, dtype), Q_STARTS, 64**-0.5, 192)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernels_are_right(dtype: torch.dtype) -> None:
    check(dtype)


@pytest.mark.parametrize("operation", ["rms_norm", "add_rms_norm", "silu_mul", "rotate_and_write"])
def test_an_operation_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    right = getattr(TritonOps, operation)

    def wrong(self: TritonOps, x: torch.Tensor, *args: Any) -> torch.Tensor:
        o: torch.Tensor = right(self, x, *args) + 0.5
        return o

    def idle(self: TritonOps, *args: Any) -> None:
        pass

    monkeypatch.setattr(TritonOps, operation, idle if operation == "rotate_and_write" else wrong)
    with pytest.raises(InvalidValueError, match=f'the kernel of {operation} is off .* attention="reference"'):
        check()


class _Nothing:
    """A kernel that does nothing: what it should have written is what lay there."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("kernel", ["attend", "add_parts"])
def test_a_kernel_of_attention_that_does_nothing_is_found(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    monkeypatch.setattr(attention_kernels, kernel, _Nothing())
    with pytest.raises(InvalidValueError, match="the kernel of attention is off"):
        check()


def test_numbers_that_are_none_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonOps, "silu_mul", lambda self, x: x[:, : x.shape[1] // 2] * float("nan"))
    with pytest.raises(InvalidValueError, match="the kernel of silu_mul is off by nan"):
        check()


def test_the_kernels_of_a_library_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those for steps that only decode as well, which are others."""

    def check() -> None:
        check_kernels(KVCache(1, 2, 2, 16, 64, torch.float32), Q_STARTS, 0.125, 192, FlashInferAttention, "flashinfer")

    Wrapper.made = []
    check()
    assert [wrapper.num_plans for wrapper in Wrapper.made] == [1, 1]
    monkeypatch.setattr(Decode, "run", lambda self, q_THD, kv: q_THD)
    with pytest.raises(InvalidValueError, match=r"^attention='flashinfer': on this GPU the kernel of attention is off"):
        check()
