"""In which dtype a model is computed, and what a user is told where that is slow or takes more memory than expected."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from headwise.runtime.sizes import size_text
from headwise.workers.backends import BACKENDS, find_backend
from headwise.workers.kv.format import KvFormat, kv_format
from headwise.workers.kv.policy import resolve_policy
from headwise.workers.model.model_config import ModelConfig
from headwise.workers.model.safetensors_index import SafetensorsIndex
from headwise.workers.shard import DTYPES
from headwise.workers.spec import ShardSpec


def resolve_dtype(dtype: str, device: str, checkpoint: str) -> str:
    """The dtype that a model is computed in, and its KV is kept in.

    Args:
        dtype: as set. ``auto`` is the checkpoint's dtype on a GPU. On a CPU it is float32: every checkpoint converts to
            float32 exactly, and only float32 has compiled kernels.
        device: ``cpu`` or ``cuda``.
        checkpoint: the dtype of the checkpoint.
    """
    if dtype != "auto":
        return dtype
    return "float32" if device == "cpu" else checkpoint


def precision_notes(dtype: str, spec: ShardSpec, model: ModelConfig, weights: SafetensorsIndex) -> Iterator[str]:
    """A line each about what a user may not expect.

    Args:
        dtype: as set, perhaps ``auto``.

    Raises:
        InvalidValueError: ``spec.attention`` cannot compute the model.
    """
    kept = kv_format(spec.kv_dtype or spec.dtype, model.head_dim)
    policy = resolve_policy(spec.kv_policy, model.num_layers, model.num_kv_heads, model.sliding_windows)
    cache = (torch.device(spec.device), DTYPES[spec.dtype], spec.block_size, model.head_dim, kept, policy)
    backend = find_backend(spec.attention, *cache)
    if str(kept) != spec.dtype:
        yield _kv_note(spec, model, kept)
    if spec.device != "cpu":
        if spec.attention is None and backend is BACKENDS["reference"]:
            reasons = " and ".join(BACKENDS["cuda"].attention.obstacles(*cache))
            yield f"slow: {reasons}, so the reference backend computes the model, without Triton's kernels"
        return
    if dtype == "auto" and spec.dtype != model.dtype:
        yield (
            f"dtype=auto computes this {model.dtype} checkpoint in {spec.dtype}, which is exact and the fastest on a "
            f"CPU; its weights take {_weight_bytes(spec, model, weights) / 2**30:.2f} GiB"
        )
    if spec.attention is None and backend is BACKENDS["reference"]:
        reasons = " and ".join(BACKENDS["cpu"].attention.obstacles(*cache))
        yield f"slow: {reasons}, so the reference backend computes the model, without compiled kernels"


def _kv_note(spec: ShardSpec, model: ModelConfig, kept: KvFormat) -> str:
    def size(one: KvFormat) -> str:
        heads = model.num_layers * model.num_kv_heads
        return size_text(heads * one.block_bytes(spec.block_size, model.head_dim) // spec.block_size)

    said = f"kv_dtype={kept} keeps keys and values of a token in {size(kept)}, which take "
    said += f"{size(KvFormat(spec.dtype, spec.dtype))} as {spec.dtype}"
    if kept.keys == "float32":
        return said
    return f"{said}; they are rounded, which changes outputs: headwise bench policies measures by how much"


def _weight_bytes(spec: ShardSpec, model: ModelConfig, weights: SafetensorsIndex) -> int:
    """Of all ranks together, but for what each of them holds whole: norms."""
    count = sum(math.prod(tensor.shape) for tensor in weights.tensors.values())
    if model.tie_word_embeddings:  # the products read a packed copy
        count += model.vocab_size * model.hidden_size
    return count * DTYPES[spec.dtype].itemsize
