"""What computes a shard's steps, by device and dtype: one line a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from headwise.workers.collectives import Collectives
from headwise.workers.cpu.attention import CpuAttention
from headwise.workers.cpu.llama import CpuLlama
from headwise.workers.cuda.attention import TritonAttention
from headwise.workers.cuda.flashinfer import FlashInferAttention
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.format import KvFormat
from headwise.workers.kv.policy import KvPolicy
from headwise.workers.model.attention import AttentionBackend
from headwise.workers.model.checkpoint import ShardWeights
from headwise.workers.model.model import Model
from headwise.workers.model.model_config import ModelConfig
from headwise.workers.model.partition import ShardPartition
from headwise.workers.reference.attention import ReferenceAttention
from headwise.workers.reference.llama import Llama
from headwise.workers.reference.ops import ReferenceOps


class Backend(NamedTuple):
    """The classes of one backend.

    Attributes:
        model: makes the model, of its configuration, this rank's partition and weights, the group's collectives, the
            most tokens of a row, and how many CPU threads it may use.
        attention: what that model attends with; says which caches it works on, and how their keys are to lie.
        torch_computes: whether torch's threads are to compute; otherwise they would stand in the way of others.
    """

    model: Callable[[ModelConfig, ShardPartition, ShardWeights, Collectives, int, int], Model]
    attention: type[AttentionBackend]
    torch_computes: bool


def find_backend(
    name: str | None,
    device: torch.device,
    dtype: torch.dtype,
    block_size: int,
    head_dim: int,
    format: KvFormat | None = None,
    policy: KvPolicy | None = None,
) -> Backend:
    """The backend of a name, or for None the first one that works on such a cache.

    Args:
        dtype: that the model is computed in.
        format: of keys and values; None is the floats of ``dtype``.
        policy: None is dense.

    Raises:
        InvalidValueError: there is no backend of that name, or it does not work on such a cache.
    """
    cache = (device, dtype, block_size, head_dim, format, policy)
    if name is None:
        return next(b for b in BACKENDS.values() if not b.attention.obstacles(*cache))
    if name not in BACKENDS:
        raise InvalidValueError("attention", name, f"must be one of {', '.join(BACKENDS)}")
    if obstacles := BACKENDS[name].attention.obstacles(*cache):
        fix = "change that, or leave attention out: then the fastest backend that can serve the model does"
        raise InvalidValueError("attention", name, " and ".join(obstacles), fix)
    return BACKENDS[name]


def _reference_llama(
    config: ModelConfig,
    partition: ShardPartition,
    weights: ShardWeights,
    collectives: Collectives,
    max_model_len: int,
    num_threads: int,
) -> Model:
    """Computes with the threads that torch was given."""
    return Llama(config, partition, weights, collectives, max_model_len, ReferenceOps(), ReferenceAttention)


def _cuda_llama(*parts: Any) -> Model:
    from headwise.workers.cuda.llama import CudaLlama  # who computes on a CPU needs no Triton

    return CudaLlama(*parts)


def _flashinfer_llama(*parts: Any) -> Model:
    from headwise.workers.cuda.llama import FlashInferLlama

    return FlashInferLlama(*parts)


BACKENDS = {
    "cpu": Backend(CpuLlama, CpuAttention, torch_computes=False),
    "cuda": Backend(_cuda_llama, TritonAttention, torch_computes=True),
    "reference": Backend(_reference_llama, ReferenceAttention, torch_computes=True),
    # Last, which is only where it is asked for: the reference serves every model.
    "flashinfer": Backend(_flashinfer_llama, FlashInferAttention, torch_computes=True),
}
"""By name, in the order in which they are tried."""
