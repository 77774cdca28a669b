"""On a GPU: blocks move bit for bit, and do not wait for steps in flight."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from headwise.workers.cuda import gpu
from headwise.workers.cuda.kv_copy import BlockMover
from headwise.workers.kv.cache import KVCache
from headwise.workers.kv.store import HostStore

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_blocks_move_between_a_gpu_and_the_host() -> None:
    device = torch.device("cuda")
    ours, collected = gpu.of(device), torch.cuda.Event()
    assert ours is not None
    cache = KVCache(3, 40, 2, 16, 64, torch.bfloat16, device)
    recorded: list[torch.cuda.Event] = []
    cache.mover = BlockMover(cache, ours, lambda: recorded[0] if recorded else None)
    cache.keys.normal_()
    cache.values.normal_()
    collected.record()
    recorded.append(collected)
    store = HostStore(4, cache.block_shape, cache.dtype, ours)  # before: to lock its pages may wait for the GPU
    in_flight = torch.cuda.Event()
    torch.cuda._sleep(4_000_000_000)  # cycles: seconds
    in_flight.record()
    store.put([b"a", b"b"], lambda slots: cache.read_blocks([4, 1], slots))
    held = [store.get(digest) for digest in (b"a", b"b")]
    assert all(block is not None and block.is_pinned() for block in held)
    cache.write_blocks([0, 33], [block for block in held if block is not None])
    part = bytearray(cache.range_bytes(2, 1, 2))
    cache.read_range([4, 1], (1, 2), (1, 3), part)
    cache.write_range([2, 20], (0, 1), (0, 2), bytes(part))
    assert not in_flight.query()
    store.close()
    torch.cuda.synchronize()
    for from_block, to_block in ((4, 0), (1, 33)):
        assert torch.equal(cache.keys[:, to_block], cache.keys[:, from_block])
        assert torch.equal(cache.values[:, to_block], cache.values[:, from_block])
    assert torch.equal(cache.keys[:2, 2, 0], cache.keys[1:, 4, 1])
    assert torch.equal(cache.values[:2, 20, 0], cache.values[1:, 1, 1])
