"""Where keys and values lie in the cache."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, no-any-return, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def first_element(block, kv_head, offset, NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Of a token, the first of HEAD_DIM elements in a layer, [N, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]; int64, for caches
    have more than 2**31 elements."""
    return ((block.to(tl.int64) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + offset) * HEAD_DIM


@triton.jit
def block_start(layer, block, num_blocks, block_elements):
    """Of a block, the first of block_elements in all layers, [L, num_blocks, block_elements]; int64 as well."""
    return (layer.to(tl.int64) * num_blocks + block) * block_elements
