"""KV blocks to host memory and back, as tiers copy them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch

from gpu_parts.cases import Case, WrongNumbersError
from gpu_parts.device import GB
from gpu_parts.served import Served


def measure(served: Served, ceilings: dict[str, float]) -> Iterator[Case]:
    """GB/s of scattered blocks, from the call to its end, over those of one copy from or to pinned memory.

    Raises:
        WrongNumbersError: a block that went out and came back has other bits.
    """
    cache, count = served.cache, min(served.sizes.copied, served.cache.num_blocks // 2)
    order = torch.randperm(cache.num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
    from_blocks, to_blocks = order[:count], order[count : 2 * count]
    shape = (count, *cache.block_shape)
    host = torch.zeros(shape, dtype=cache.dtype, pin_memory=served.device.is_gpu)
    read_s = _seconds(lambda: cache.read_blocks(from_blocks, host), served.sizes.repeats)
    write_s = _seconds(lambda: cache.write_blocks(to_blocks, host), served.sizes.repeats)
    read, written = host.nbytes / read_s / GB, host.nbytes / write_s / GB
    yield {
        "megabytes": host.nbytes / 1e6,
        "export_gb_per_s": read,
        "export_of_copy": read / ceilings["device_to_host_gb_per_s"],
        "import_gb_per_s": written,
        "import_of_copy": written / ceilings["host_to_device_gb_per_s"],
    }
    back = torch.empty_like(host)
    cache.read_blocks(to_blocks, back)
    if not torch.equal(host.view(torch.uint8), back.view(torch.uint8)):
        raise WrongNumbersError("blocks that were copied to host memory and back have other bits")


def _seconds(work: Callable[[], object], repeats: int) -> float:
    work()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
