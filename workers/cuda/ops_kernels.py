"""The Triton kernels of the small operations between matrix products. All compute in float32 and round like torch."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, no-any-return, untyped-decorator"

import triton
import triton.language as tl

from headwise.workers.cuda.addresses import first_element


@triton.jit
def norm_rows(o, x, weight, eps, x_stride, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """The root-mean-square norm of a row of x for each program: o [T, SIZE], x with x_stride elements from row to row,
    weight [SIZE]."""
    row, e = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED)
    x_E = tl.load(x + row * x_stride + e, mask=e < SIZE, other=0.0)
    _store_norm(o + row * SIZE, x_E, weight, eps, e, SIZE)


@triton.jit
def add_and_norm_rows(o, residual, delta, weight, eps, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Adds a row of delta to residual, both [T, SIZE], and stores the norm of the sum as :func:`norm_rows` does."""
    row, e = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED)
    at = row * SIZE + e
    residual_E = tl.load(residual + at, mask=e < SIZE, other=0.0).to(tl.float32)
    delta_E = tl.load(delta + at, mask=e < SIZE, other=0.0).to(tl.float32)
    sum_E = (residual_E + delta_E).to(residual.dtype.element_ty)
    tl.store(residual + at, sum_E, mask=e < SIZE)
    _store_norm(o + row * SIZE, sum_E, weight, eps, e, SIZE)


@triton.jit
def gate_rows(o, gate_up, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """silu(gate) * up of COLUMNS columns of a row for each program: o [T, SIZE], gate_up [T, 2 SIZE]."""
    row = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    gate_M = tl.load(gate_up + row * 2 * SIZE + m, mask=m < SIZE, other=0.0).to(tl.float32)
    up_M = tl.load(gate_up + row * 2 * SIZE + SIZE + m, mask=m < SIZE, other=0.0).to(tl.float32)
    dtype = o.dtype.element_ty
    silu_M = (gate_M / (1.0 + tl.exp(-gate_M))).to(dtype).to(tl.float32)
    tl.store(o + row * SIZE + m, (silu_M * up_M).to(dtype), mask=m < SIZE)


@triton.jit
def rotate_and_write(
    qkv,
    cos,
    sin,
    keys,
    values,
    slots,
    token_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    PADDED_HALF: tl.constexpr,
):
    """Turns the queries and keys of a token for each program, and puts keys and values at its slot.

    Args:
        qkv: heads of queries, keys and values one after the other, token_stride elements from token to token.
        cos, sin: [T, HEAD_DIM / 2].
        keys, values: of the layer, [N, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM].
        slots: int32 or int64 [T]; a token of slot -1 goes nowhere.
    """
    t = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = HEAD_DIM // 2
    x, d = tl.arange(0, PADDED_HEADS), tl.arange(0, PADDED_HALF)
    is_dim = d < HALF
    cos_D = tl.load(cos + t * HALF + d, mask=is_dim, other=0.0).to(tl.float32)
    sin_D = tl.load(sin + t * HALF + d, mask=is_dim, other=0.0).to(tl.float32)
    slot = tl.load(slots + t).to(tl.int64)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE

    is_turned = (x < NUM_HEADS + NUM_KV_HEADS)[:, None] & is_dim[None, :]
    at_XD = qkv + t * token_stride + x[:, None] * HEAD_DIM + d[None, :]
    first_XD = tl.load(at_XD, mask=is_turned, other=0.0).to(tl.float32)
    second_XD = tl.load(at_XD + HALF, mask=is_turned, other=0.0).to(tl.float32)
    turned_XD = first_XD * cos_D[None, :] - second_XD * sin_D[None, :]
    second_XD = second_XD * cos_D[None, :] + first_XD * sin_D[None, :]
    dtype = qkv.dtype.element_ty
    tl.store(at_XD, turned_XD.to(dtype), mask=is_turned)
    tl.store(at_XD + HALF, second_XD.to(dtype), mask=is_turned)

    if slot >= 0:
        k = x - NUM_HEADS
        is_key = (k >= 0)[:, None] & is_turned
        at_key_X = first_element(block, k, offset, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        at_key_XD = keys + at_key_X[:, None] + d[None, :]
        tl.store(at_key_XD, turned_XD.to(dtype), mask=is_key)
        tl.store(at_key_XD + HALF, second_XD.to(dtype), mask=is_key)

        v = k - NUM_KV_HEADS
        is_value = ((v >= 0) & (v < NUM_KV_HEADS))[:, None] & is_dim[None, :]
        at_value_X = first_element(block, v, offset, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        at_value_XD = values + at_value_X[:, None] + d[None, :]
        tl.store(at_value_XD, tl.load(at_XD, mask=is_value), mask=is_value)
        tl.store(at_value_XD + HALF, tl.load(at_XD + HALF, mask=is_value), mask=is_value)


@triton.jit
def _store_norm(o, x_E, weight, eps, e, SIZE: tl.constexpr):
    x32_E = x_E.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x32_E * x32_E, 0) / SIZE + eps)
    dtype = o.dtype.element_ty
    weight_E = tl.load(weight + e, mask=e < SIZE, other=0.0).to(tl.float32)
    tl.store(o + e, ((x32_E * scale).to(dtype).to(tl.float32) * weight_E).to(dtype), mask=e < SIZE)
