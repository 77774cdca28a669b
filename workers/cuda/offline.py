"""What kernels become on a GPU that is not there: compiled for a target, with the launches that would have run them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver

TARGETS = {"sm_80": 80, "sm_90a": 90, "sm_100a": 100}
"""By name: the compute capability as Triton writes it."""
SHARED_LIMITS = {80: 166912, 90: 232448, 100: 232448}
"""Bytes of shared memory a block may have, by compute capability: CUDA C++ Programming Guide, Technical Specifications
per Compute Capability."""


class Launch(NamedTuple):
    """A launch that was asked for.

    Attributes:
        kernel: its name.
        grid: how many programs.
    """

    kernel: str
    grid: tuple[int, int, int]


class Compiled(NamedTuple):
    """What a kernel became.

    Attributes:
        shared: bytes of shared memory of a program.
        registers: of a thread; spilled: bytes that a thread stores and loads because its registers do not suffice.
    """

    kernel: str
    registers: int
    spilled: int
    shared: int
    warps: int
    ptx: str


class OfflineDriver(DriverBase):  # type: ignore[misc]  # Triton has no types
    """Stands in for Triton's driver: kernels are compiled as for a GPU, launches are noted and do not run.

    Attributes:
        launches: in their order.
    """

    def __init__(self, capability: int) -> None:
        self._capability = capability
        self.utils = self
        self.launches: list[Launch] = []

    @classmethod
    def is_active(cls) -> bool:
        return False

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        # Triton keeps what it has compiled by device, without a look at the target.
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_LIMITS[self._capability]}

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        name = source.fn.__name__

        def launch(*args: Any) -> None:
            self.launches.append(Launch(name, args[:3]))

        return launch

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[None, None, int, int, int]:
        return None, None, 0, 0, 1024

    def unload_module(self, module: None) -> None:
        pass

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


@contextmanager
def offline(target: str) -> Iterator[OfflineDriver]:
    """Compiles kernels for a target of TARGETS while it is open, and launches nothing.

    Tensors are on torch's device "meta"; their addresses count as multiples of 16, as an allocator's are.
    """
    ours = OfflineDriver(TARGETS[target])
    before = driver._active
    driver.set_active(ours)
    try:
        yield ours
    finally:
        driver._active = before


def compiled_of(kernel: Any, target: str) -> list[Compiled]:
    """Everything that :func:`offline` has made of a kernel for a target."""
    cache = kernel.device_caches[TARGETS[target]][0]
    return [_describe(kernel.__name__, one) for one in cache.values()]


def _describe(name: str, kernel: Any) -> Compiled:
    metadata = kernel.metadata
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        target = next(target for target, capability in TARGETS.items() if capability == metadata.target.arch)
        command = [get_ptxas(metadata.target.arch).path, "-v", f"--gpu-name={target}", source]
        said = subprocess.run([*command, "-o", f"{source}.cubin"], capture_output=True, text=True, check=True).stderr
    registers = int(re.findall(r"Used (\d+) registers", said)[0])
    spilled = sum(int(size) for size in re.findall(r"(\d+) bytes spill", said))
    return Compiled(name, registers, spilled, metadata.shared, metadata.num_warps, kernel.asm["ptx"])
