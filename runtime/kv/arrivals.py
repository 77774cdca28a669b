"""What becomes of blocks that were copied to the device: they are cached, in their order, and idle."""

from __future__ import annotations

from collections.abc import Sequence

from headwise.runtime.kv.blocks import Use
from headwise.runtime.kv.eviction import CachedBlock
from headwise.runtime.kv.identity import TokenBlocks
from headwise.runtime.kv.prefix_cache import PrefixCache


def cache_arrivals(
    cache: PrefixCache, blocks: TokenBlocks, chain: Sequence[CachedBlock], memory: Sequence[int], num_complete: int
) -> int:
    """Caches blocks that have come to the device, and takes away the TRANSFER use of them and of the chain before them.

    Args:
        chain: the cached blocks that hold the sequence's first tokens.
        memory: the device blocks that were reserved for those after it.
        num_complete: how many of these, from the first, hold what they should. The others become free.

    Returns:
        How many are cached. Fewer than ``num_complete`` where a block before them is not cached any more, or the cache
        refuses one.
    """
    nodes, num_cached = list(chain), 0
    complete = all(node.cached for node in nodes)
    held: list[tuple[int, CachedBlock | None]] = []
    for index, own in enumerate(memory):
        complete = complete and index < num_complete
        node = cache.insert(blocks, len(nodes), nodes[-1] if nodes else None, own) if complete else None
        complete = node is not None
        held.append((own, node if node is not None and node.block == own else None))
        if node is not None:
            if node.block != own:  # somebody computed it meanwhile
                cache.hold([node], Use.TRANSFER)
                held.append((node.block, node))
            nodes.append(node)
            num_cached += 1
    for block, node in reversed(held):
        cache.release_block(block, Use.TRANSFER, node)
    cache.release(chain, Use.TRANSFER)
    return num_cached
