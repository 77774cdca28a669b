"""The Triton kernel that finds the best token of each row of logits."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, no-any-return, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def best_keys(keys, logits, first_id, size, row_stride, COLUMNS: tl.constexpr):
    """The largest key of COLUMNS columns of a row for each program, as sampling/best.py says what a key is.

    Args:
        keys: int64 [B, programs of a row].
        logits: float32 [B, size], row_stride elements from row to row.
        first_id: the token of the first column.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = part * COLUMNS + tl.arange(0, COLUMNS)
    # A column past the end is -inf with an id that loses to all others.
    x_V = tl.load(logits + row * row_stride + v, mask=v < size, other=-float("inf"))
    bits_V = tl.where(x_V == 0.0, 0.0, x_V).to(tl.int32, bitcast=True)
    ordered_V = tl.where(x_V != x_V, 0x7FFFFFFF, bits_V ^ ((bits_V >> 31) & 0x7FFFFFFF)).to(tl.int64)
    key_V = (ordered_V << 32) | (0xFFFFFFFF - (v.to(tl.int64) + first_id))
    tl.store(keys + row * tl.num_programs(1) + part, tl.max(key_V, 0))
