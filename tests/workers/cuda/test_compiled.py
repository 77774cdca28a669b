"""What the kernels become on GPUs that are not there: they compile, fit and spill nothing."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from headwise.workers.cuda import argmax_kernels, attention_kernels, kv_copy_kernels, ops_kernels
from headwise.workers.cuda.argmax import best_keys
from headwise.workers.cuda.attention import HEAD_DIMS, TritonAttention
from headwise.workers.cuda.kv_copy import launch
from headwise.workers.cuda.offline import SHARED_LIMITS, TARGETS, Compiled, compiled_of, offline
from headwise.workers.cuda.ops import TritonOps
from headwise.workers.kv.cache import INTEGERS, KVCache
from headwise.workers.model.attention import AttentionBatch

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.filterwarnings("error:TRITON_DEFAULT_FP_FUSION"),  # a launch has left that to Triton
]

OF_SERVING = [(torch.bfloat16, 64), (torch.bfloat16, 128)]
OTHERS = [
    (dtype, dim)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for dim in HEAD_DIMS
    if (dtype, dim) not in OF_SERVING
]


def cases(pairs: list[tuple[torch.dtype, int]], *marks: Any) -> list[Any]:
    return [pytest.param(*pair, id=f"{str(pair[0])[6:]}-{pair[1]}", marks=marks) for pair in pairs]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "head_dim"), [*cases(OF_SERVING), *cases(OTHERS, pytest.mark.slow)])
def test_attention(target: str, dtype: torch.dtype, head_dim: int) -> None:
    with offline(target):
        attend(dtype, head_dim, group=4)
    compiled = compiled_of(attention_kernels.attend, target) + compiled_of(attention_kernels.add_parts, target)
    for one in compiled:
        assert_fits(one, target)
    for one in (one for one in compiled if one.kernel == "attend"):
        # Keys and values come past the registers, 16 bytes at a time, while what came before is multiplied. So may the
        # entries of block tables, one at a time, where three steps over keys are in flight.
        copies = set(re.findall(r"cp\.async\.(c[ag]).*?(0x\w+)", one.ptx))
        assert copies - {("ca", "0x4")} == {("cg", "0x10")}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_small_operations(target: str, dtype: torch.dtype) -> None:
    with offline(target) as gpu:
        ops, x_TE = TritonOps(), torch.empty(7, 4096, dtype=dtype, device="meta")
        ops.rms_norm(x_TE, x_TE[0], 1e-5)
        ops.add_rms_norm(x_TE, x_TE, x_TE[0], 1e-5)
        ops.silu_mul(torch.empty(7, 2 * 14_336, dtype=dtype, device="meta"))
        cos_TD = torch.empty(7, 64, dtype=dtype, device="meta")
        qkv_TXD = torch.empty(7, 48, 128, dtype=dtype, device="meta")
        cache = KVCache(1, 4, 8, 16, 128, dtype, "meta")
        ops.rotate_and_write(qkv_TXD, cos_TD, cos_TD, cache, 0, torch.empty(7, dtype=torch.int64, device="meta"))
    assert [launch.kernel for launch in gpu.launches] == [
        *("norm_rows", "add_and_norm_rows", "gate_rows", "rotate_and_write")
    ]
    for kernel in ("norm_rows", "add_and_norm_rows", "gate_rows", "rotate_and_write"):
        for one in compiled_of(getattr(ops_kernels, kernel), target):
            assert_fits(one, target)
            assert re.search(r"ld\.global[^;]*\.v4\.b32", one.ptx)


@pytest.mark.parametrize("target", TARGETS)
def test_copies_of_blocks(target: str) -> None:
    """One kernel each for all ranges of heads and layers, and numbers of blocks: none is compiled while steps run."""
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float32):
        cache, integer = KVCache(4, 9, 8, 16, 64, dtype, "meta"), INTEGERS[dtype.itemsize]
        staging = torch.empty(1 << 20, dtype=integer, device="meta")
        for kernel in (kv_copy_kernels.gather, kv_copy_kernels.scatter):
            before = len(compiled_of(kernel, target)) if TARGETS[target] in kernel.device_caches else 0
            with offline(target):
                for number, heads, layers in ((1, (0, 8), (0, 4)), (3, (2, 5), (1, 2)), (16, (7, 8), (3, 4))):
                    listed = torch.empty(number, dtype=torch.int32, device="meta")
                    launch(kernel, cache, staging, listed, heads, layers)
            compiled = compiled_of(kernel, target)
            assert len(compiled) == before + 1
            assert_fits(compiled[-1], target)
            for access in ("ld", "st"):
                assert len(re.findall(rf"{access}\.global[^;]*\.v4\.b32", compiled[-1].ptx)) == 8
                assert not re.search(rf"{access}\.global[^;]*\.(b8|b16|v2)", compiled[-1].ptx)


@pytest.mark.parametrize("target", TARGETS)
def test_the_best_token(target: str) -> None:
    with offline(target) as gpu:
        best_keys(torch.empty(7, 128_256, device="meta"), 0)
    assert [launch.grid for launch in gpu.launches] == [(7, 32, 1)]
    [one] = compiled_of(argmax_kernels.best_keys, target)
    assert_fits(one, target)
    assert re.search(r"ld\.global[^;]*\.v4\.b32", one.ptx)


def attend(dtype: torch.dtype, head_dim: int, group: int) -> None:
    """A step with a decode and a prefill chunk, each with a context of several parts."""
    cache, heads = KVCache(1, 4, 8, 16, head_dim, dtype, "meta"), 8 * group
    attention = TritonAttention(cache, tuple(range(0, heads + 1, group)), head_dim**-0.5)
    starts, contexts = np.array([0, 1, 101], np.int32), np.array([2000, 2000], np.int32)
    attention.begin(AttentionBatch(starts, contexts, np.zeros((2, 125), np.int32)))
    attention.attend(0, torch.empty(101, heads + 16, head_dim, dtype=dtype, device="meta")[:, :heads])


def assert_fits(one: Compiled, target: str) -> None:
    assert one.spilled == 0 and one.registers * 32 * one.warps <= 65_536, one[:5]
    assert one.shared <= SHARED_LIMITS[TARGETS[target]], one[:5]
