"""What a GPU makes of the kernels is compared with plain torch before the first request, on a small step.

The kernels' numbers are tested in Triton's interpreter. What a compiler, a driver and a GPU make of them is not known
before they are there. A wrong answer is no outcome, so a shard whose kernels are wrong does not start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from headwise.workers.cuda.attention import TritonAttention
from headwise.workers.cuda.attention_plan import PART_KEYS
from headwise.workers.cuda.ops import TritonOps
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.cache import KVCache
from headwise.workers.model.attention import AttentionBackend, AttentionBatch
from headwise.workers.model.ops import Ops
from headwise.workers.reference.attention import ReferenceAttention
from headwise.workers.reference.ops import ReferenceOps

_ROWS = ((1, PART_KEYS + 100), (20, 90), (1, 1))
"""Tokens of the step and of the context: one that is divided into parts, a prefill chunk, and the shortest there is."""
_DECODES = ((1, PART_KEYS + 100), (1, 17), (1, 1))
"""Some backends have other kernels for steps that only decode."""
_TOLERANCES = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}
"""Of numbers around 1. Rounding is off by a tenth of it, and what is wrong by ten times as much."""
_EPS = 1e-5


def check_kernels(
    like: KVCache,
    q_starts: tuple[int, ...],
    scale: float,
    width: int,
    attention: type[AttentionBackend] = TritonAttention,
    name: str = "cuda",
) -> None:
    """Compares attention and the small operations with plain torch.

    Args:
        like: a cache of the same dtype, block size, heads, head dim and device; it is left alone.
        q_starts, scale: see :class:`~headwise.workers.model.attention.AttentionBackend`.
        width: of the model's hidden rows.
        attention, name: the backend's.

    Raises:
        InvalidValueError: they differ; the field is ``attention``.
    """
    num_blocks = sum(-(-context // like.block_size) for _, context in _ROWS)
    caches = [
        KVCache(1, num_blocks, like.num_kv_heads, like.block_size, like.head_dim, like.dtype, like.device)
        for _ in range(2)
    ]
    ours = _results(TritonOps(), attention(caches[0], q_starts, scale), width)
    plain = _results(ReferenceOps(), ReferenceAttention(caches[1], q_starts, scale), width)
    _compare(ours, plain, _TOLERANCES[like.dtype], name)


def _results(ops: Ops, attention: AttentionBackend, width: int) -> dict[str, Tensor]:
    """By operation, what it makes of numbers that are always the same."""
    cache, generator = attention.cache, torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(cache.device, cache.dtype)

    for memory in (cache.keys, cache.values):
        memory.copy_(random(*memory.shape))
    tokens = sum(queries for queries, _ in _ROWS)
    qkv_TXD = random(tokens, attention.q_starts[-1] + 2 * cache.num_kv_heads, cache.head_dim)
    angles_TD = random(tokens, cache.head_dim // 2)
    slots_T = torch.arange(tokens, device=cache.device) * 3
    ops.rotate_and_write(qkv_TXD, angles_TD.cos(), angles_TD.sin(), cache, 0, slots_T)
    q_THD = qkv_TXD[:, : attention.q_starts[-1]]
    attention.begin(_batch(_ROWS, cache.block_size))
    o_THD = attention.attend(0, q_THD)
    attention.begin(_batch(_DECODES, cache.block_size))
    decoded_BHD = attention.attend(0, q_THD[: len(_DECODES)])
    x_TE, delta_TE, weight_E = random(tokens, width), random(tokens, width), random(width)
    return {
        "rotate_and_write": torch.cat((qkv_TXD.flatten(), cache.keys.flatten(), cache.values.flatten())),
        "attention": torch.cat((o_THD, decoded_BHD)),
        "rms_norm": ops.rms_norm(x_TE, weight_E, _EPS),
        "add_rms_norm": ops.add_rms_norm(x_TE, delta_TE, weight_E, _EPS),
        "silu_mul": ops.silu_mul(random(tokens, 2 * width)),
    }


def _batch(rows: Sequence[tuple[int, int]], block_size: int) -> AttentionBatch:
    queries, contexts = zip(*rows, strict=True)
    needed = [-(-context // block_size) for context in contexts]
    blocks = np.random.default_rng(0).permutation(sum(needed)).astype(np.int32)
    tables_BN = np.zeros((len(rows), max(needed)), np.int32)
    for row, row_blocks in enumerate(np.split(blocks, np.cumsum(needed)[:-1])):
        tables_BN[row, : len(row_blocks)] = row_blocks
    return AttentionBatch(np.cumsum([0, *queries], dtype=np.int32), np.array(contexts, np.int32), tables_BN)


def _compare(ours: Mapping[str, Tensor], plain: Mapping[str, Tensor], tolerance: float, backend: str) -> None:
    for name, expected in plain.items():
        off = float((ours[name].float() - expected.float()).abs().max())
        if not off <= tolerance:  # it may be NaN
            limit = f"on this GPU the kernel of {name} is off by {off:.3g}; at most {tolerance:g} is allowed"
            fix = 'attention="reference" (--attention) is slow and right; please report this with GPU and driver'
            raise InvalidValueError("attention", backend, limit, fix)
