"""What the device does at best: copy its memory, multiply matrices, and copy from and to pinned host memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gpu_parts.cases import Case
from gpu_parts.device import GB, Device
from gpu_parts.sizes import Sizes


def measure(device: Device, sizes: Sizes) -> Iterator[Case]:
    """GB/s of a copy within the device, read and written bytes added; TFLOP/s of bfloat16 products; GB/s of copies from
    and to pinned host memory."""
    num_bytes, columns = sizes.ceiling
    yield {"copy_gb_per_s": _copy(device, num_bytes, sizes.repeats)}
    yield {"matmul_tflop_per_s": _matmul(device, columns, sizes.repeats)}
    yield _host_copies(device, num_bytes // 8, sizes.repeats)


def _copy(device: Device, num_bytes: int, repeats: int) -> float:
    source = torch.empty(num_bytes // 4, dtype=torch.float32, device=device.at).normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / device.seconds_of(lambda: target.copy_(source), 2 * repeats) / GB


def _matmul(device: Device, columns: int, repeats: int) -> float:
    # Random numbers: products of zeros take less power, so they are faster than any real ones.
    a, b = (torch.empty(columns, columns, dtype=torch.bfloat16, device=device.at).normal_() for _ in range(2))
    out = torch.empty_like(a)
    return 2 * columns**3 / device.seconds_of(lambda: torch.mm(a, b, out=out), 4 * repeats) / 1e12


def _host_copies(device: Device, num_bytes: int, repeats: int) -> Case:
    host = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=device.is_gpu)
    there = torch.empty_like(host, device=device.at, pin_memory=False)
    out_s = device.seconds_of(lambda: host.copy_(there, non_blocking=True), repeats)
    in_s = device.seconds_of(lambda: there.copy_(host, non_blocking=True), repeats)
    return {"device_to_host_gb_per_s": num_bytes / out_s / GB, "host_to_device_gb_per_s": num_bytes / in_s / GB}
