"""What becomes of blocks that were copied to the device: they are cached, in their order, and idle."""

from __future__ import annotations

from collections.abc import Sequence

from headwise.runtime.kv.blocks import Use
from headwise.runtime.kv.eviction import CachedBlock, Chain
from headwise.runtime.kv.identity import TokenBlocks
from headwise.runtime.kv.prefix_cache import PrefixCache


def cache_arrivals(
    cache: PrefixCache,
    blocks: TokenBlocks,
    chain: Chain,
    indices: Sequence[int],
    memory: Sequence[int],
    sound: Sequence[bool],
) -> list[int]:
    """Caches blocks that have come to the device, and takes away the TRANSFER use of them and of the chain beside them.

    Args:
        chain: cached blocks of the sequence that are held.
        indices, memory: of the sequence's other blocks, rising, and the device blocks that were reserved for them.
        sound: which of them hold what they should. The others become free.

    Returns:
        Which of the indices are cached. Not all that are sound where the cache refuses one, or a block before it is not
        cached, unless there is a window: then each block stands for itself.
    """
    windowed = cache.reach.window is not None
    before: CachedBlock | None = chain[-1] if chain and not windowed else None
    complete = windowed or all(node is not None and node.cached for node in chain)
    cached: list[int] = []
    held: list[tuple[int, CachedBlock | None]] = []
    for index, own, is_sound in zip(indices, memory, sound, strict=True):
        node = cache.insert(blocks, index, before, own) if is_sound and complete else None
        held.append((own, node if node is not None and node.block == own else None))
        if node is None:
            complete = windowed
            continue
        if node.block != own:  # somebody computed it meanwhile
            cache.hold([node], Use.TRANSFER)
            held.append((node.block, node))
        before = None if windowed else node
        cached.append(index)
    for block, held_node in reversed(held):
        cache.release_block(block, Use.TRANSFER, held_node)
    cache.release(chain, Use.TRANSFER)
    return cached
