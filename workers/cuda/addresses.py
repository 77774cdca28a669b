"""Where the keys and values of a token lie in the cache of a layer."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, no-any-return, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def first_element(block, kv_head, offset, NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The first of HEAD_DIM elements of [N, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]; int64, for caches have more than 2**31
    elements."""
    return ((block.to(tl.int64) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + offset) * HEAD_DIM
