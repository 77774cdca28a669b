"""Keys and values as integers with scales, and back; see :mod:`~headwise.workers.kv.format`. In plain torch, for any
device: what compiled code does is compared with this, bit for bit.

Of each group of numbers, all in float32 but for the roundings to float16 (KIVI, Liu et al., 2024, arXiv 2402.02750, has
the asymmetric form)::

    zero  = float16(min)
    scale = float16(max(0, max - zero) / levels)      levels: 255 or 15
    code  = round half to even((x - zero) / scale), within 0 and levels; 0 where scale is 0
    x     = code * scale + zero                       the product is exact
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headwise.workers.kv.format import BITS, group_size


class Codes(NamedTuple):
    """Of vectors: codes [..., D], uint8 and unpacked; scales and zeros [..., groups], float16."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor


def quantise(x: Tensor, kind: str) -> Codes:
    """
    Args:
        x: [..., D], any floats. What is not finite makes its group not finite, one way or another.
        kind: a key of BITS.
    """
    x_GS = _folded(x.float(), -1, group_size(kind, x.shape[-1]))
    low_G1, high_G1 = x_GS.aminmax(dim=-1, keepdim=True)
    zeros_G1 = low_G1.half()
    levels = 2 ** BITS[kind] - 1
    scales_G1 = ((high_G1 - zeros_G1.float()).clamp_min(0) / levels).half()
    steps_GS = torch.round((x_GS - zeros_G1.float()) / scales_G1.float())
    codes_GS = torch.where(scales_G1 == 0, 0.0, steps_GS).nan_to_num(0.0).clamp(0, levels).to(torch.uint8)
    return Codes(codes_GS.flatten(-2), scales_G1.squeeze(-1), zeros_G1.squeeze(-1))


def dequantise(coded: Codes) -> Tensor:
    """[..., D], float32."""
    groups = coded.scales.shape[-1]
    codes_GS = _folded(coded.codes, groups, -1).float()
    x_GS = codes_GS * coded.scales.float().unsqueeze(-1) + coded.zeros.float().unsqueeze(-1)
    return x_GS.flatten(-2)


def write_keys(records_NKR: Tensor, kind: str, k_TKD: Tensor, blocks_T: Tensor, offsets_T: Tensor) -> None:
    """Quantises keys, and puts each token's into the records of its block.

    Args:
        records_NKR: uint8; ``block_size`` follows from their length.
        blocks_T, offsets_T: int64.
    """
    coded = quantise(k_TKD, kind)
    packed = coded.codes
    if kind == "int4":
        packed = coded.codes[..., 0::2] | coded.codes[..., 1::2] << 4
    codes_NKDS, scales_NKGS2, zeros_NKGS2 = _key_fields(records_NKR, kind, k_TKD.shape[-1])
    codes_NKDS[blocks_T, :, :, offsets_T] = packed
    scales_NKGS2[blocks_T, :, :, offsets_T] = _bytes(coded.scales)
    zeros_NKGS2[blocks_T, :, :, offsets_T] = _bytes(coded.zeros)


def write_values(records_NKR: Tensor, kind: str, v_TKD: Tensor, blocks_T: Tensor, offsets_T: Tensor) -> None:
    """The same of values."""
    coded = quantise(v_TKD, kind)
    packed = coded.codes
    if kind == "int4":
        low, high = _folded(coded.codes, coded.scales.shape[-1], 2, -1).unbind(-2)
        packed = (low | high << 4).flatten(-2)
    codes_NKSD, scales_NKSG2, zeros_NKSG2 = _value_fields(records_NKR, kind, v_TKD.shape[-1])
    codes_NKSD[blocks_T, :, offsets_T] = packed
    scales_NKSG2[blocks_T, :, offsets_T] = _bytes(coded.scales)
    zeros_NKSG2[blocks_T, :, offsets_T] = _bytes(coded.zeros)


def read_keys(records_NKR: Tensor, kind: str, head_dim: int) -> Tensor:
    """The keys in records: float32 [N, K, block_size, D]."""
    codes_NKDS, scales_NKGS2, zeros_NKGS2 = _key_fields(records_NKR, kind, head_dim)
    if kind == "int4":
        codes_NKDS = torch.stack((codes_NKDS & 15, codes_NKDS >> 4), dim=-2).flatten(-3, -2)
    scales_NKSG, zeros_NKSG = (_halves(x).transpose(-1, -2) for x in (scales_NKGS2, zeros_NKGS2))
    return dequantise(Codes(codes_NKDS.transpose(-1, -2), scales_NKSG, zeros_NKSG))


def read_values(records_NKR: Tensor, kind: str, head_dim: int) -> Tensor:
    """The values in records: float32 [N, K, block_size, D]."""
    codes_NKSD, scales_NKSG2, zeros_NKSG2 = _value_fields(records_NKR, kind, head_dim)
    scales_NKSG, zeros_NKSG = _halves(scales_NKSG2), _halves(zeros_NKSG2)
    if kind == "int4":
        packed = _folded(codes_NKSD, scales_NKSG.shape[-1], -1)
        codes_NKSD = torch.stack((packed & 15, packed >> 4), dim=-2).flatten(-3)
    return dequantise(Codes(codes_NKSD, scales_NKSG, zeros_NKSG))


def _key_fields(records_NKR: Tensor, kind: str, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of codes [N, K, D or D/2, block_size], and of scales and zeros [N, K, groups, block_size, 2]."""
    width, groups, size = _sizes(records_NKR, kind, head_dim)
    codes, scales, zeros = _fields(records_NKR, width * size, groups * size)
    return _folded(codes, width, size), _folded(scales, groups, size, 2), _folded(zeros, groups, size, 2)


def _value_fields(records_NKR: Tensor, kind: str, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of codes [N, K, block_size, D or D/2], and of scales and zeros [N, K, block_size, groups, 2]."""
    width, groups, size = _sizes(records_NKR, kind, head_dim)
    codes, scales, zeros = _fields(records_NKR, width * size, groups * size)
    return _folded(codes, size, width), _folded(scales, size, groups, 2), _folded(zeros, size, groups, 2)


def _fields(records_NKR: Tensor, num_codes: int, num_scales: int) -> tuple[Tensor, Tensor, Tensor]:
    zeros = num_codes + 2 * num_scales
    return records_NKR[..., :num_codes], records_NKR[..., num_codes:zeros], records_NKR[..., zeros:]


def _sizes(records_NKR: Tensor, kind: str, head_dim: int) -> tuple[int, int, int]:
    """Bytes of a token's codes, its groups, and the block size."""
    width, groups = head_dim * BITS[kind] // 8, head_dim // group_size(kind, head_dim)
    return width, groups, records_NKR.shape[-1] // (width + 4 * groups)


def _bytes(x: Tensor) -> Tensor:
    """float16 as [..., 2] bytes. In records they may lie at odd addresses."""
    return x.contiguous().unsqueeze(-1).view(torch.uint8)


def _halves(x: Tensor) -> Tensor:
    """The inverse of :func:`_bytes`."""
    return x.contiguous().view(torch.float16).squeeze(-1)


def _folded(x: Tensor, *shape: int) -> Tensor:
    """A view whose last dimension is several."""
    return x.view(*x.shape[:-1], *shape)
