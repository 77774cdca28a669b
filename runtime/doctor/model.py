"""A model: its files, its heads on so many ranks, GPUs for them, and memory for keys and values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from headwise.runtime.capacity import Capacity
from headwise.runtime.doctor.finding import Finding, failed, passed, refused, warned
from headwise.runtime.inputs.tokenizer import load_tokenizer
from headwise.runtime.sizes import size_text
from headwise.workers.backends import BACKENDS, find_backend
from headwise.workers.errors import CheckpointError, HeadwiseError, InvalidValueError
from headwise.workers.kv.format import KvFormat
from headwise.workers.kv.policy import KvPolicy
from headwise.workers.kv.sizes import parse_memory
from headwise.workers.model.checkpoint import verify_checkpoint
from headwise.workers.model.model_config import ModelConfig
from headwise.workers.model.partition import partition_heads
from headwise.workers.shard import DTYPES

_FETCH = "fetch the model's files again, all of them"


def weights(directory: Path, config: ModelConfig) -> Finding:
    """Whether the files are safetensors, whole, and hold what config.json promises; reads no weight."""
    if missing := _missing_shards(directory):
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        said = f"{shown} of model.safetensors.index.json {'is' if len(missing) == 1 else 'are'} not in {directory}"
        return failed("weights", said, f"{_FETCH}: hf download REPOSITORY --local-dir {directory}")
    try:
        index = verify_checkpoint(directory, config)
    except CheckpointError as error:
        return refused("weights", error, _FETCH)
    kinds = ", ".join(sorted({tensor.dtype for tensor in index.tensors.values()}))
    return passed("weights", f"{len(index.tensors)} tensors ({kinds}) in {len(index.headers)} safetensors file(s)")


def _missing_shards(directory: Path) -> list[str]:
    """Files that the index names and that are not there; none where the index cannot be read, which is said else."""
    try:
        named = set(json.loads((directory / "model.safetensors.index.json").read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    if (directory / "model.safetensors").is_file():
        return []
    return sorted(str(name) for name in named if not (directory / str(name)).is_file())


def tokenizer(directory: Path) -> Finding:
    try:
        found = load_tokenizer(directory)
    except CheckpointError as error:
        return refused("tokenizer", error, _FETCH)
    if found is None:
        said = f"{directory} has none, so that prompts can be token ids alone"
        return warned("tokenizer", said, "copy the model's tokenizer.json there")
    return passed("tokenizer", "can be loaded")


def heads(num_heads: int, num_kv_heads: int, tp: int) -> Finding:
    """Whether the heads go into so many ranks, and who gets how many."""
    try:
        parts = partition_heads(num_heads, num_kv_heads, tp)
    except InvalidValueError as error:
        said = f"--tp {tp} is more than the model's {num_heads} query heads" if tp > num_heads else str(error)
        fix = f"--tp {num_heads} at most, for each rank needs one; up to {num_kv_heads} keep each KV head once"
        return failed("heads", said, fix)
    shared = "+".join(str(part.num_q) for part in parts), "+".join(str(part.num_kv) for part in parts)
    said = f"{num_heads} query heads on {tp} rank(s) are {shared[0]}, {num_kv_heads} KV heads {shared[1]}"
    copies = sum(part.num_kv for part in parts)
    if copies > num_kv_heads:
        said += f": KV takes {copies / num_kv_heads:.2g} times the memory of one rank's, for ranks share KV heads"
        return warned("heads", said, f"--tp {num_kv_heads} or less keeps each KV head once")
    return passed("heads", said)


def gpus(device: str, tp: int, available: int, where: str) -> Finding:
    """Whether each rank can have a GPU of its own.

    Args:
        device: ``cpu`` or ``cuda``.
        available: how many GPUs torch sees, or Ray has.
        where: they are: ``this machine``.
    """
    if device != "cuda":
        return passed("GPUs", f"none is needed: --device {device}")
    if available < tp:
        said = f"--tp {tp} needs {tp}, and {where} has {available}"
        fix = f"--tp {available}, or add GPUs" if available else "--device cpu, or add GPUs"
        return failed("GPUs", said, fix)
    return passed("GPUs", f"{available} at {where} for {tp} rank(s)")


def gpu_build(cuda: str | None, driver: bool, visible: int) -> Finding:
    """Whether torch can use the GPUs that this machine has.

    Args:
        cuda: the version of CUDA that torch is built for; None: for none.
        driver: whether this machine has NVIDIA's driver.
        visible: how many GPUs torch sees.
    """
    if not driver:
        return passed("torch and CUDA", "no driver of NVIDIA's here, so ranks compute on CPUs")
    if cuda is None:
        said = "this machine has NVIDIA's driver, and torch is built for CPUs alone"
        return warned("torch and CUDA", said, "install the torch of the same version that is built for CUDA")
    if visible == 0:
        said = f"this machine has NVIDIA's driver, and torch, built for CUDA {cuda}, sees no GPU"
        fix = f"unset CUDA_VISIBLE_DEVICES if it is empty; else install a driver that knows CUDA {cuda} (nvidia-smi)"
        return warned("torch and CUDA", said, fix)
    return passed("torch and CUDA", f"torch for CUDA {cuda} sees {visible} GPU(s)")


def kernels(
    attention: str | None,
    device: str,
    dtype: str,
    block_size: int,
    head_dim: int,
    format: KvFormat | None = None,
    policy: KvPolicy | None = None,
) -> Finding:
    """Whether the model is computed by kernels made for the device, or by plain torch.

    Args:
        attention: the backend that is asked for; None: the fastest.
        device: ``cpu`` or ``cuda``.
        dtype: a key of DTYPES.
        format, policy: of keys and values; None: the floats of ``dtype``, and dense.
    """
    cache = (torch.device(device), DTYPES[dtype], block_size, head_dim, format, policy)
    try:
        backend = find_backend(attention, *cache)
    except InvalidValueError as error:
        return refused("kernels", error, "leave out --attention")
    if attention is not None or backend is not BACKENDS["reference"]:
        name = next(name for name, one in BACKENDS.items() if one is backend)
        return passed("kernels", f"attention={name} computes the model in {dtype}")
    obstacles = BACKENDS[device].attention.obstacles(*cache)
    said = f"slow: {' and '.join(obstacles)}, so plain torch computes the model"
    if any(obstacle.startswith("dtype=") for obstacle in obstacles):
        return warned("kernels", said, "--dtype float32")
    if any(obstacle.startswith("triton") for obstacle in obstacles):
        return warned("kernels", said, "pip install 'headwise[cuda]'")
    if any(obstacle.startswith("kv_") for obstacle in obstacles):
        fix = "leave out --kv-policy, --streaming-heads and --kv-dtype, unless the windows are the model's own; "
        return warned("kernels", said, f"{fix}it works, but slowly")
    return warned("kernels", said, "serve a model of another head_dim; it works, but there are no kernels for this one")


def kv_memory(taken: Capacity, free: Sequence[int], kv: str | int | float, device: str) -> Finding:
    """Whether weights and keys and values fit, and at least one request with them. What steps need for a time is
    measured when an engine starts, and comes on top.

    Args:
        taken: what the model takes; its ``request_tokens`` are the longest request's.
        free: bytes of memory: on ``cuda`` of each rank's GPU, on ``cpu`` of the host, which the ranks share.
        kv: what of what the weights leave KV may take: a size or a fraction.
    """
    left = _left(taken, free, device)
    place = "GPU" if device == "cuda" else "host"
    if min(left) <= 0:
        said = f"the weights take {size_text(taken.weight_bytes)}, and the {place} has {size_text(min(free))} free"
        return failed("KV memory", said, "raise --tp, take a smaller --dtype, or use more memory")
    try:
        budgets = [parse_memory(kv, room) for room in left]
    except InvalidValueError as error:
        return refused("KV memory", error, "--kv-memory 2GiB, or 0.9")
    for budget, room in zip(budgets, left, strict=True):
        if budget > room:
            said = f"--kv-memory {kv} is more than the {size_text(room)} that the weights leave a rank of the {place}'s"
            return failed("KV memory", said, f"--kv-memory {room >> 20}MiB or less, or a fraction such as 0.9")
    blocks = taken.num_blocks(tuple(budgets))
    tokens, requests = blocks * taken.block_size, taken.num_requests(blocks)
    said = f"{size_text(min(budgets))} of KV a rank hold {tokens:,} tokens"
    if requests < 1:
        needed = max(rank.kv_bytes_per_request for rank in taken.ranks)
        shorter = f", or --max-model-len {tokens}" if tokens > 1 and taken.constant_after is None else ""
        fix = f"--kv-memory {-(-needed >> 20)}MiB{shorter}"
        return failed("KV memory", f"{said}, and one request may have {taken.request_tokens:,}", fix)
    return passed("KV memory", f"{said}: {requests:,} request(s) of {taken.request_tokens:,} at a time")


def _left(taken: Capacity, free: Sequence[int], device: str) -> list[int]:
    """By rank, what the weights leave."""
    if device == "cuda":
        return [room - rank.weight_bytes for room, rank in zip(free, taken.ranks, strict=True)]
    left, all_kv = free[0] - taken.weight_bytes, taken.kv_bytes_per_token
    return [left * rank.kv_bytes_per_token // all_kv for rank in taken.ranks]


def kv_settings(error: HeadwiseError) -> Finding:
    """The policy or the form of keys and values is none for the model."""
    return refused("KV settings", error, "correct --kv-policy, --streaming-heads or --kv-dtype")


def shapes(name: str, error: HeadwiseError) -> Finding:
    """The model cannot be found, or its config.json not be used."""
    return refused(name, error, "give the directory of a Llama model with its config.json")
