"""The numbers of every kernel of workers/cuda/, on the device, against the same in float64."""

from __future__ import annotations

import importlib
import math
import pkgutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from triton import KernelInterface

from gpu_parts.cases import Case, WrongNumbersError, each
from gpu_parts.device import Device, relative_error
from gpu_parts.sizes import BLOCK_SIZE, Sizes
from headwise.workers import cuda
from headwise.workers.cuda import kv_copy, kv_copy_kernels
from headwise.workers.cuda.argmax import best_keys
from headwise.workers.cuda.attention import TritonAttention
from headwise.workers.cuda.ops import TritonOps
from headwise.workers.kv.cache import INTEGERS, KVCache
from headwise.workers.model.attention import AttentionBatch
from headwise.workers.reference.attention import ReferenceAttention
from headwise.workers.reference.ops import ReferenceOps
from headwise.workers.sampling.best import read_keys

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""The largest |got - exact| / |exact| that rounding explains."""
EPS = 1e-5


class Check(NamedTuple):
    """Attributes:
    kernels: those that it launches.
    error: computes it, relative to what is exact.
    """

    kernels: tuple[str, ...]
    case: str
    dtype: torch.dtype
    error: Callable[[], float]

    def said(self) -> Case:
        dtype = str(self.dtype).removeprefix("torch.")
        return {"kernels": ", ".join(self.kernels), "case": self.case, "dtype": dtype}


def measure(device: Device, sizes: Sizes, deadline: float) -> Iterator[Case]:
    """One result a check; those that no time is left for are left out, and say so.

    Raises:
        WrongNumbersError: a result is wrong, or there is a kernel that nothing here launches.
    """
    checks = [check for dtype in LIMITS for check in _checks(device, sizes, dtype)]
    unchecked = kernels_of_the_host().keys() - {kernel for check in checks for kernel in check.kernels}
    wrong = [f"no check launches {name}" for name in sorted(unchecked)]

    def compare(check: Check) -> Case:
        if time.monotonic() > deadline:
            return {"left_out": "no time left"}
        error, limit = check.error(), LIMITS[check.dtype]
        if not error <= limit:
            wrong.append(f"{check.kernels} {check.case} {check.dtype}: {error:.2g}")
        return {"error": error if math.isfinite(error) else None, "limit": limit, "right": error <= limit}

    yield from each((check.said(), partial(compare, check)) for check in checks)
    if wrong:
        raise WrongNumbersError("; ".join(wrong))


def kernels_of_the_host() -> dict[str, Any]:
    """All kernels that the host launches, by name: those of workers/cuda/*_kernels.py that no other kernel calls."""
    files = [module.name for module in pkgutil.iter_modules(cuda.__path__) if module.name.endswith("_kernels")]
    kernels = {
        name: value
        for file in files
        for name, value in vars(importlib.import_module(f"{cuda.__name__}.{file}")).items()
        if isinstance(value, KernelInterface)
    }
    called = {name for kernel in kernels.values() for name in kernel.fn.__code__.co_names}
    return {name: kernel for name, kernel in kernels.items() if name not in called}


def _checks(device: Device, sizes: Sizes, dtype: torch.dtype) -> Iterator[Check]:
    """Attention of long contexts and of the first shape comes first: serving needs it most."""
    draw = _Draw(device, dtype)
    for number, (head_dim, group) in enumerate(sizes.shapes):
        for rows in (sizes.long_rows, sizes.rows)[number > 0 :]:
            case = f"{len(rows)} rows, head_dim {head_dim}, group {group}"
            yield Check(("attend", "add_parts"), case, dtype, _Attention(draw, rows, head_dim, group).error)
    for tokens, hidden, columns in sizes.norms:
        yield Check(("norm_rows",), f"{tokens} x {hidden}", dtype, partial(_norm, draw, tokens, hidden))
        yield Check(("add_and_norm_rows",), f"{tokens} x {hidden}", dtype, partial(_add_norm, draw, tokens, hidden))
        yield Check(("gate_rows",), f"{tokens} x {columns}", dtype, partial(_gate, draw, tokens, columns))
        case = f"{tokens} tokens, head_dim {sizes.shapes[0][0]}"
        yield Check(("rotate_and_write",), case, dtype, partial(_rotate, draw, tokens, *sizes.shapes[0]))
    if dtype is torch.float32:  # as logits always are
        yield Check(("best_keys",), "5 x 50,000", dtype, partial(_best, draw))
    yield Check(
        ("gather", "scatter"), "3 blocks, some heads and layers", dtype, partial(_move, draw, sizes.shapes[0][0])
    )


class _Draw:
    """Random tensors on the device."""

    def __init__(self, device: Device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device.at, dtype
        self._generator = torch.Generator(device.at).manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device).to(self.dtype)


def _norm(draw: _Draw, tokens: int, hidden: int) -> float:
    x_TE, weight_E = draw(tokens, hidden), draw(hidden)
    return relative_error(TritonOps().rms_norm(x_TE, weight_E, EPS), _exact_norm(x_TE.double(), weight_E))


def _add_norm(draw: _Draw, tokens: int, hidden: int) -> float:
    residual_TE, delta_TE, weight_E = draw(tokens, hidden), draw(tokens, hidden), draw(hidden)
    sum_TE = residual_TE.double() + delta_TE.double()
    got_TE = TritonOps().add_rms_norm(residual_TE, delta_TE, weight_E, EPS)
    return max(relative_error(residual_TE, sum_TE), relative_error(got_TE, _exact_norm(sum_TE, weight_E)))


def _exact_norm(x_TE: Tensor, weight_E: Tensor) -> Tensor:
    return x_TE * torch.rsqrt(x_TE.square().mean(-1, keepdim=True) + EPS) * weight_E.double()


def _gate(draw: _Draw, tokens: int, columns: int) -> float:
    gate_up_TM = draw(tokens, 2 * columns)
    return relative_error(TritonOps().silu_mul(gate_up_TM), ReferenceOps().silu_mul(gate_up_TM.double()))


def _rotate(draw: _Draw, tokens: int, head_dim: int, group: int) -> float:
    kv_heads = 2
    qkv_TXD = draw(tokens, kv_heads * (group + 2), head_dim)
    cos_TD, sin_TD = draw(tokens, head_dim // 2), draw(tokens, head_dim // 2)
    blocks = -(-tokens // BLOCK_SIZE) + 1
    slots_T = torch.randperm(blocks * BLOCK_SIZE, device=draw.device)[:tokens]
    cache, exact = (
        KVCache(2, blocks, kv_heads, BLOCK_SIZE, head_dim, x, draw.device) for x in (draw.dtype, torch.float64)
    )
    exact_TXD = qkv_TXD.double()
    ReferenceOps().rotate_and_write(exact_TXD, cos_TD.double(), sin_TD.double(), exact, 1, slots_T)
    TritonOps().rotate_and_write(qkv_TXD, cos_TD, sin_TD, cache, 1, slots_T)
    pairs = ((qkv_TXD, exact_TXD), (cache.keys, exact.keys), (cache.values, exact.values))
    return max(relative_error(*pair) for pair in pairs)


def _best(draw: _Draw) -> float:
    """0 if every token is the best of its row, and of equals the one with the lowest id; else infinite."""
    logits_BV = draw(5, 50_000)
    logits_BV[1, [7, 40_000]] = logits_BV[2, [49_999, 3]] = 100.0
    values_B = logits_BV.amax(dim=1, keepdim=True)
    ids_V = torch.arange(logits_BV.shape[1], device=draw.device)
    exact_B = torch.where(logits_BV == values_B, ids_V, len(ids_V)).amin(dim=1)
    tokens_B, finite_B = read_keys(best_keys(logits_BV, 0))
    return 0.0 if torch.equal(tokens_B, exact_B) and bool(finite_B.all()) else math.inf


def _move(draw: _Draw, head_dim: int) -> float:
    """0 if every bit arrives and nothing else is written, and else infinite."""
    heads, layers, blocks = (1, 3), (1, 3), [5, 0, 3]
    cache, into = (KVCache(4, 7, 4, BLOCK_SIZE, head_dim, draw.dtype, draw.device) for _ in range(2))
    for x in (cache.keys, cache.values):
        x.copy_(draw(*x.shape))
    listed = torch.tensor(blocks, dtype=torch.int32, device=draw.device)
    kept = [x[slice(*layers), listed.long(), slice(*heads)] for x in (cache.keys, cache.values)]
    expected = torch.stack(kept, dim=2).transpose(0, 1).contiguous()  # [n, layers, 2, heads, block_size, head_dim]
    moved = torch.empty_like(expected)
    bits = moved.view(INTEGERS[draw.dtype.itemsize]).view(-1)
    kv_copy.launch(kv_copy_kernels.gather, cache, bits, listed, heads, layers)
    kv_copy.launch(kv_copy_kernels.scatter, into, bits, listed, heads, layers)
    right = torch.equal(moved, expected)
    for before, after in ((cache.keys, into.keys), (cache.values, into.values)):
        left = torch.zeros_like(before)
        for block in blocks:
            left[slice(*layers), block, slice(*heads)] = before[slice(*layers), block, slice(*heads)]
        right &= torch.equal(after, left)
    return 0.0 if right else math.inf


class _Attention(NamedTuple):
    """A step over rows of random context, in blocks of random order; whatever no row has written is NaN."""

    draw: _Draw
    rows: tuple[tuple[int, int], ...]
    head_dim: int
    group: int

    def error(self) -> float:
        kv_heads, device, scale = 2, self.draw.device, self.head_dim**-0.5
        needed = [-(-context // BLOCK_SIZE) for _, context in self.rows]
        sizes = (1, sum(needed) + 1, kv_heads, BLOCK_SIZE, self.head_dim)
        cache, exact = (KVCache(*sizes, dtype, device) for dtype in (self.draw.dtype, torch.float64))
        order = np.random.default_rng(0).permutation(sum(needed)).astype(np.int32)
        tables_BN = np.zeros((len(self.rows), max(needed)), np.int32)
        for table_N, count, stop in zip(tables_BN, needed, np.cumsum(needed), strict=True):
            table_N[:count] = order[stop - count : stop]
        for x_NKSD in (cache.keys[0], cache.values[0]):
            x_NKSD.copy_(self.draw(*x_NKSD.shape))
            for (_, context), table_N, count in zip(self.rows, tables_BN, needed, strict=True):
                x_NKSD[int(table_N[count - 1]), :, (context - 1) % BLOCK_SIZE + 1 :] = torch.nan
        exact.keys.copy_(cache.keys)
        exact.values.copy_(cache.values)
        starts_B1 = np.cumsum([0, *(queries for queries, _ in self.rows)], dtype=np.int32)
        batch = AttentionBatch(starts_B1, np.array([context for _, context in self.rows], np.int32), tables_BN)
        q_THD = self.draw(int(starts_B1[-1]), kv_heads * self.group, self.head_dim)
        q_starts = tuple(range(0, kv_heads * self.group + 1, self.group))
        ours, reference = TritonAttention(cache, q_starts, scale), ReferenceAttention(exact, q_starts, scale)
        for backend in (ours, reference):
            backend.begin(batch)
        return relative_error(ours.attend(0, q_THD), reference.attend(0, q_THD.double()))
