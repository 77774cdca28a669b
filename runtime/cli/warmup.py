"""``headwise warmup``: compiles the CPU kernels ahead."""

from __future__ import annotations

import time

from headwise.runtime.cli.options import AsJson
from headwise.runtime.cli.printing import print_json


def warmup(as_json: AsJson = False) -> None:
    """Compile the CPU kernels ahead.

    They are compiled once for a version of Headwise and a kind of CPU, and kept; otherwise the first start does it.
    """
    from headwise.runtime.warmup import compile_kernels
    from headwise.workers.jit.kernel_cache import kernel_folder

    started = time.perf_counter()
    compiled, folder = compile_kernels(), str(kernel_folder())
    seconds = time.perf_counter() - started
    if as_json:
        print_json({"folder": folder, "compiled": compiled, "seconds": round(seconds, 3)})
    else:
        print(f"{folder}: {f'compiled in {seconds:.1f} s' if compiled else 'ready'}")
