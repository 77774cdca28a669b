"""The best token of each row, as one number that ranks with parts of the vocabulary can compare.

A *key* is an int64: a float32 logit as an integer that orders as the logits do, shifted up by 32 bits, plus 2**32 - 1 -
the token's id. So the largest key is that of the largest logit, and among equals that of the lowest id. A NaN counts as
the largest logit of all, then +inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.workers.cpu.argmax import argmax
from headwise.workers.cuda.launch import INTERPRETED, TRITON

_LOW = 0xFFFFFFFF
_NAN = 0x7FFFFFFF
_INFINITY = 0x7F800000


def best_keys(logits_BV: Tensor, first_id: int = 0, num_threads: int = 1) -> Tensor:
    """The largest key of each row, int64 [B].

    Args:
        logits_BV: float32, of the whole vocabulary or of one rank's part of it.
        first_id: the token of its first column.
        num_threads: of a CPU.
    """
    if logits_BV.stride(1) != 1:
        logits_BV = logits_BV.contiguous()
    if _on_cpu(logits_BV):
        values_B, ids_B = _best_on_cpu(logits_BV, num_threads)
        return keys_of(values_B, ids_B + first_id)
    if TRITON:
        from headwise.workers.cuda import argmax as on_gpu  # who computes on a CPU needs no Triton

        return on_gpu.best_keys(logits_BV, first_id)
    values_B, ids_B = logits_BV.max(dim=-1)
    return keys_of(values_B, ids_B + first_id)


def keys_of(values_B: Tensor, ids_B: Tensor) -> Tensor:
    """The keys of logits, float32, and token ids, int64."""
    # Zero has two signs, which are equal. Negative numbers have larger bits the smaller they are.
    bits_B = (values_B + 0.0).view(torch.int32)
    ordered_B = torch.where(values_B.isnan(), _NAN, bits_B ^ (bits_B >> 31 & _NAN))
    return ordered_B.to(torch.int64) << 32 | _LOW - ids_B


def read_keys(keys_B: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of keys, int64, and whether their logits are finite: of a row's largest key, whether the row has no
    NaN, no +inf and not only -inf."""
    ordered_B = keys_B >> 32
    # The bits of -inf are those of +inf with the sign, and the order of negative numbers is turned around.
    return _LOW - (keys_B & _LOW), (ordered_B < _INFINITY) & (ordered_B > -_INFINITY - 1)


def greedy(logits_BV: Tensor, num_threads: int = 1) -> tuple[Tensor, Tensor]:
    """The best token of each row of the whole vocabulary, int64, and whether the row is finite."""
    if _on_cpu(logits_BV) and logits_BV.stride(1) == 1:
        # The same without keys: to make them takes longer than to find the tokens.
        values_B, ids_B = _best_on_cpu(logits_BV, num_threads)
        return ids_B, values_B.isfinite()
    return read_keys(best_keys(logits_BV, 0, num_threads))


def _on_cpu(logits_BV: Tensor) -> bool:
    return logits_BV.device.type == "cpu" and not INTERPRETED


def _best_on_cpu(logits_BV: Tensor, num_threads: int) -> tuple[Tensor, Tensor]:
    ids_B = argmax(logits_BV, num_threads)
    return logits_BV.gather(1, ids_B.unsqueeze(1)).squeeze(1), ids_B
