"""Compiles every CPU kernel before anyone waits for it, by serving tiny models; kernel_cache.py keeps the result.

``python -m headwise.workers.warmup`` is the process that does it; :func:`ensure_warm` starts that where it is needed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from headwise.workers.disk_cache import locked
from headwise.workers.errors import HeadwiseError
from headwise.workers.jit import kernel_cache
from headwise.workers.plan import RowAdmit, RowSampling, StepPlan

if TYPE_CHECKING:
    from headwise.workers.shard import Shard

Progress = Callable[[int, int], None]
"""Gets (kernels compiled, kernels there are)."""

# Long enough that all that a prefill does is worth a second thread.
_PROMPT_TOKENS, _BATCH = 2048, 8
_MODEL = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": _PROMPT_TOKENS + 64,
}


class WarmUpError(HeadwiseError):
    """Kernels could not be compiled ahead of their use."""


WARM_UPS: list[Callable[[], None]] = [
    lambda: serve(),
    lambda: serve(threads=2),
    lambda: serve(ranks=2),
    lambda: multiply(),
]
"""What compiles everything. A kernel that is called in a form that none of these reaches needs one more."""


def ensure_warm(progress: Progress | None = None, quiet: bool = False) -> bool:
    """Fills this machine's kernel folder unless that has been done; returns whether there was anything to do.

    In a process of its own: OpenMP's threads belong to the thread that first computes, and a second team beside that
    of the shard would slow it down; and here Numba may have been given a single thread.

    Args:
        quiet: what the process says on stderr is dropped.

    Raises:
        WarmUpError: the folder cannot be written, or the process failed; kernels are then compiled when first called.
    """
    folder = kernel_cache.kernel_folder()
    if folder is None:
        raise WarmUpError("there is no folder to keep compiled CPU kernels in")
    if kernel_cache.kernels_ready():
        return False
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    threads = {"NUMBA_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    environment = os.environ | threads | {"PYTHONPATH": paths, "HEADWISE_CACHE": str(folder.parent.parent)}
    command = [sys.executable, "-P", "-m", __name__]
    stderr = subprocess.DEVNULL if quiet else None
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            done, total = line.split()
            if progress is not None:
                progress(int(done), int(total))
    if process.returncode:
        raise WarmUpError(f"compiling CPU kernels ended with exit code {process.returncode}")
    return True


def warm_up(progress: Progress | None = None) -> None:
    """Calls every kernel in this process, so that each is compiled and kept, and marks the folder as ready."""
    folder = kernel_cache.kernel_folder()
    if folder is None:
        raise WarmUpError("there is no folder to keep compiled CPU kernels in")
    with locked(folder / "warm-up.lock", "compiles CPU kernels"):
        if not kernel_cache.kernels_ready():  # the process that held the lock may have done it
            _run(progress or (lambda done, total: None))
            kernel_cache.mark_ready()


def serve(ranks: int = 1, threads: int = 1) -> None:
    """Serves requests of a tiny random model: a long prompt, a batch of short ones, greedy and sampled tokens."""
    from headwise.workers import collectives
    from headwise.workers.shard import Shard
    from headwise.workers.spec import ShardSpec

    with tempfile.TemporaryDirectory(prefix="headwise-warm-up-") as folder:
        _write_model(Path(folder))
        spec = ShardSpec(
            model_dir=folder,
            tensor_parallel_size=ranks,
            dtype="float32",
            device="cpu",
            block_size=16,
            max_num_seqs=_BATCH,
            max_model_len=_PROMPT_TOKENS + 64,
            kv_memory="64MiB",
        )
        rendezvous = collectives.open_rendezvous("solo" if ranks == 1 else "shared_memory", ranks)

        def run(rank: int) -> None:
            shard = Shard(spec, collectives.connect(rendezvous, rank, ranks, 60.0, "cpu"), threads)
            try:
                shard.load()
                shard.allocate(shard.affordable_blocks())
                _step(shard)
            except BaseException as error:
                shard.abort(repr(error))
                raise
            finally:
                shard.close()

        with ThreadPoolExecutor(ranks) as pool:
            for done in [pool.submit(run, rank) for rank in range(ranks)]:
                done.result()


def multiply() -> None:
    """Calls a product by itself, as the benchmarks of the machine's limits do."""
    import torch

    from headwise.workers.cpu.linear import PackedLinear

    for threads in (1, 2):
        PackedLinear(torch.zeros(32, 32))(torch.zeros(1, 32), threads)


def _run(progress: Progress) -> None:
    # What counts has to be imported before it is counted.
    from headwise.workers import shard  # noqa: F401
    from headwise.workers.collectives import shared_memory  # noqa: F401

    total, compiled, lock = kernel_cache.count(), 0, threading.Lock()

    def one_more() -> None:
        nonlocal compiled
        with lock:
            compiled += 1
            progress(min(compiled, total), total)

    progress(0, total)
    kernel_cache.watch_compiles(one_more)
    for warm in WARM_UPS:
        warm()
    progress(total, total)


def _write_model(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    hidden, mlp, vocab = _MODEL["hidden_size"], _MODEL["intermediate_size"], _MODEL["vocab_size"]
    q = _MODEL["num_attention_heads"] * _MODEL["head_dim"]
    kv = _MODEL["num_key_value_heads"] * _MODEL["head_dim"]
    linears = {"self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden)}
    linears |= {"self_attn.o_proj": (hidden, q), "mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden)}
    linears |= {"mlp.down_proj": (hidden, mlp)}
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (vocab, hidden), "norm.weight": (hidden,)}
    for layer in range(_MODEL["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"layers.{layer}.{norm}.weight"] = (hidden,)
        for name, shape in linears.items():
            shapes[f"layers.{layer}.{name}.weight"] = shape
    tensors = {f"model.{name}": torch.randn(shape) / 10 for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    others = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(_MODEL | others))


def _step(shard: Shard) -> None:
    """Steps of one row and of all, alone and mixed, of one token and of many."""
    blocks = -(-_PROMPT_TOKENS // 16) + 1
    prompts = [_PROMPT_TOKENS] + [3] * (_BATCH - 1)
    starts = [0] + [blocks + row for row in range(_BATCH - 1)]
    admits = [
        RowAdmit(row, [1] * length, length, 0, list(range(start, start + (1 if row else blocks))), RowSampling())
        for row, (length, start) in enumerate(zip(prompts, starts, strict=True))
    ]
    # The last one has everything done to its logits that can be.
    admits[-1] = replace(admits[-1], sampling=RowSampling(1.0, 5, 0.9, 0.1, 1.1, 0.1, 0.1, num_logprobs=2))
    rows = range(_BATCH)
    shard.step(StepPlan(0, admits=admits[:1], computes=[(0, _PROMPT_TOKENS - 9)]))
    shard.step(StepPlan(1, computes=[(0, 9)]))
    shard.step(StepPlan(2, admits=admits[1:-1], computes=[(0, 1)] + [(row, 3) for row in rows[1:-1]]))
    shard.step(StepPlan(3, computes=[(row, 1) for row in rows[:-1]]))
    shard.step(StepPlan(4, admits=admits[-1:], computes=[(_BATCH - 1, 3)]))
    shard.step(StepPlan(5, computes=[(row, 1) for row in rows]))


def main() -> None:
    """Compiles, and prints a line with ``done total`` at each kernel; for :func:`ensure_warm`."""

    def show(done: int, total: int) -> None:
        print(done, total, flush=True)

    try:
        warm_up(show)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
