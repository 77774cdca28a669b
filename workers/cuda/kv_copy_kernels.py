"""The Triton kernels that gather KV blocks out of the cache, and scatter them into it.

They move integers as wide as the cache's elements, so that one kernel moves every dtype, bit for bit.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, no-any-return, untyped-decorator"

import triton
import triton.language as tl

from headwise.workers.cuda.addresses import block_start

_COUNTS = ["num_blocks", "first_layer", "num_layers"]
"""Nothing is gained by a kernel of their own for one of them that is 1, or a multiple of 16."""


@triton.jit(do_not_specialize=_COUNTS)
def gather(
    staging,
    keys,
    values,
    blocks,
    num_blocks,
    first_layer,
    num_layers,
    block_elements,
    first_element,
    run,
    ELEMENTS: tl.constexpr,
):
    """Copies the same heads and layers of some blocks to staging; a program has ELEMENTS keys and values of one block
    and layer.

    The heads of a range lie one after the other in a block, so they are a run of elements.

    Args:
        staging: [n, num_layers, 2 (K, V), run], less than 2**31 elements.
        keys, values: all of the cache, [layers, num_blocks, block_elements] each.
        blocks: int32 [n], within the cache.
        first_layer, num_layers: the range of layers.
        first_element, run: where the run of heads begins in a block, and how long it is.
    """
    place, layer, e, is_element = _part(num_layers, run, ELEMENTS)
    block = tl.load(blocks + place // num_layers)
    at = block_start(first_layer + layer, block, num_blocks, block_elements) + first_element
    into = staging + place * 2 * run
    key_E = tl.load(keys + at + e, mask=is_element)
    value_E = tl.load(values + at + e, mask=is_element)
    tl.store(into + e, key_E, mask=is_element)
    tl.store(into + run + e, value_E, mask=is_element)


@triton.jit(do_not_specialize=_COUNTS)
def scatter(
    staging,
    keys,
    values,
    blocks,
    num_blocks,
    first_layer,
    num_layers,
    block_elements,
    first_element,
    run,
    ELEMENTS: tl.constexpr,
):
    """The inverse of :func:`gather`, with the same arguments; no block comes twice."""
    place, layer, e, is_element = _part(num_layers, run, ELEMENTS)
    block = tl.load(blocks + place // num_layers)
    at = block_start(first_layer + layer, block, num_blocks, block_elements) + first_element
    held = staging + place * 2 * run
    key_E = tl.load(held + e, mask=is_element)
    value_E = tl.load(held + run + e, mask=is_element)
    tl.store(keys + at + e, key_E, mask=is_element)
    tl.store(values + at + e, value_E, mask=is_element)


@triton.jit
def _part(num_layers, run, ELEMENTS: tl.constexpr):
    """What a program moves: a place in staging, its layer in the range, elements of the run, and which of them are."""
    place = tl.program_id(0)
    e = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    return place, place % num_layers, e, e < run
