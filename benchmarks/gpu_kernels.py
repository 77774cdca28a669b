"""What the Triton kernels of workers/cuda/ become on GPUs that are not here: registers, spills, shared memory.

    python benchmarks/gpu_kernels.py [--targets sm_80 sm_90a sm_100a] [--dtypes bfloat16 float16 float32] [--json]

Compiles every kernel as serving launches it, for each dtype and head dim, and asks ptxas; neither a GPU nor a driver is
needed. It takes minutes: --jobs processes share the work. Attention has four query heads a KV head here, as in Llama 3,
and a form for each size of tile: `decode` for rows with few tokens in a step, `prefill` for others.

Prints a table of registers and shared memory, from the least to the most where a line stands for several dtypes or head
dims, or with --json one line with all of it. The exit code is 1 if a kernel spills, or if no form launches it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from gpu_parts.kernels import kernels_of_the_host

from headwise.workers.cuda import kv_copy, kv_copy_kernels
from headwise.workers.cuda.argmax import best_keys
from headwise.workers.cuda.attention import HEAD_DIMS, TritonAttention
from headwise.workers.cuda.offline import TARGETS, compiled_of, offline
from headwise.workers.cuda.ops import TritonOps
from headwise.workers.kv.cache import INTEGERS, KVCache
from headwise.workers.model.attention import AttentionBatch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
GROUP, KV_HEADS, BLOCK_SIZE = 4, 8, 16
HIDDEN, COLUMNS = 4096, 14_336


class Form(NamedTuple):
    """A way in which serving launches kernels.

    Attributes:
        head_dim: 0 where it does not matter.
        launch: on tensors of torch's device "meta".
    """

    name: str
    dtype: str
    head_dim: int
    launch: Callable[[], object]


class Became(NamedTuple):
    """What a kernel became; registers are of a thread, `spilled` its bytes, `shared` the bytes of a program."""

    kernel: str
    form: str
    dtype: str
    head_dim: int
    target: str
    registers: int
    spilled: int
    shared: int
    warps: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    tasks = [(dtype, target) for dtype in arguments.dtypes for target in arguments.targets]
    found: list[Became] = []
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        for task, became in zip(tasks, pool.imap(compiled, tasks), strict=True):
            found += became
            print(*task, "done", file=sys.stderr, flush=True)
    if arguments.json:
        print(json.dumps({"benchmark": "gpu_kernels", "kernels": [one._asdict() for one in found]}))
    else:
        print("\n".join(table(found, arguments.targets, arguments.dtypes[0])))
    missing = sorted(kernels_of_the_host().keys() - {one.kernel for one in found})
    if missing:
        print(f"no form launches {', '.join(missing)}: add one to benchmarks/gpu_kernels.py", file=sys.stderr)
    return int(bool(missing) or any(one.spilled for one in found))


def forms(name: str) -> Iterator[Form]:
    """All of a dtype."""
    dtype = DTYPES[name]
    for head_dim in HEAD_DIMS:
        yield Form("decode", name, head_dim, partial(attend, dtype, head_dim, 1))
        yield Form("prefill", name, head_dim, partial(attend, dtype, head_dim, 100))
        yield Form("both", name, head_dim, partial(rotate, dtype, head_dim))
    yield Form("both", name, 0, partial(small_operations, dtype))


def attend(dtype: torch.dtype, head_dim: int, tokens: int) -> None:
    """One row with so many tokens in the step, and a context of several parts."""
    cache, heads = KVCache(1, 4, KV_HEADS, BLOCK_SIZE, head_dim, dtype, "meta"), KV_HEADS * GROUP
    attention = TritonAttention(cache, tuple(range(0, heads + 1, GROUP)), head_dim**-0.5)
    starts, contexts = np.array([0, tokens], np.int32), np.array([2000], np.int32)
    attention.begin(AttentionBatch(starts, contexts, np.zeros((1, 125), np.int32)))
    qkv_TXD = torch.empty(tokens, heads + 2 * KV_HEADS, head_dim, dtype=dtype, device="meta")
    attention.attend(0, qkv_TXD[:, :heads])


def rotate(dtype: torch.dtype, head_dim: int) -> None:
    cos_TD = torch.empty(7, head_dim // 2, dtype=dtype, device="meta")
    qkv_TXD = torch.empty(7, KV_HEADS * (GROUP + 2), head_dim, dtype=dtype, device="meta")
    cache = KVCache(1, 4, KV_HEADS, BLOCK_SIZE, head_dim, dtype, "meta")
    TritonOps().rotate_and_write(qkv_TXD, cos_TD, cos_TD, cache, 0, torch.empty(7, dtype=torch.int64, device="meta"))


def small_operations(dtype: torch.dtype) -> None:
    ops, x_TE = TritonOps(), torch.empty(7, HIDDEN, dtype=dtype, device="meta")
    ops.rms_norm(x_TE, x_TE[0], 1e-5)
    ops.add_rms_norm(x_TE, x_TE, x_TE[0], 1e-5)
    ops.silu_mul(torch.empty(7, 2 * COLUMNS, dtype=dtype, device="meta"))
    best_keys(torch.empty(7, 128_256, device="meta"), 0)
    cache, listed = (
        KVCache(1, 4, KV_HEADS, BLOCK_SIZE, 128, dtype, "meta"),
        torch.empty(3, dtype=torch.int32, device="meta"),
    )
    staging = torch.empty(1 << 20, dtype=INTEGERS[dtype.itemsize], device="meta")
    for kernel in (kv_copy_kernels.gather, kv_copy_kernels.scatter):
        kv_copy.launch(kernel, cache, staging, listed, (0, KV_HEADS), (0, 1))


def compiled(task: tuple[str, str]) -> list[Became]:
    """What the forms of a dtype are on a target."""
    dtype, target = task
    found, kernels = [], kernels_of_the_host().values()
    with offline(target):
        for form in forms(dtype):
            for kernel in kernels:
                kernel.device_caches.clear()  # of what other forms have made of it
            form.launch()
            ones = [one for kernel in kernels for one in compiled_of(kernel, target)]
            found += [
                Became(one.kernel, *form[:3], target, one.registers, one.spilled, one.shared, one.warps) for one in ones
            ]
    return found


def table(found: Sequence[Became], targets: Sequence[str], whole: str) -> Iterator[str]:
    """Markdown; a line for each head dim of attention in the dtype `whole`, and else for all of them."""
    lines: dict[tuple[str, ...], list[Became]] = {}
    for one in found:
        dtype = one.dtype if one.kernel == "attend" else "all"
        head_dim = "" if not one.head_dim else str(one.head_dim) if dtype == whole else "all"
        lines.setdefault((one.kernel, one.form, dtype, head_dim), []).append(one)
    yield f"| kernel | form | dtype | head dim | {' | '.join(targets)} | spilled |"
    yield f"|{'---|' * (5 + len(targets))}"
    for names, ones in sorted(
        lines.items(), key=lambda line: (line[0][0] != "attend", line[0][2] != whole, line[0][:2])
    ):
        cells = [cell([one for one in ones if one.target == target]) for target in targets]
        yield f"| {' | '.join((*names, *cells))} | {max(one.spilled for one in ones)} |"


def cell(ones: Sequence[Became]) -> str:
    """Registers, and kibibytes of shared memory."""

    def span(values: list[Any]) -> str:
        least, most = min(values), max(values)
        return f"{least}" if least == most else f"{least}-{most}"

    shared = [round(one.shared / 1024) for one in ones]
    return f"{span([one.registers for one in ones])}" + (f", {span(shared)} KiB" if max(shared) else "")


if __name__ == "__main__":
    sys.exit(main())
