"""KV memory that is given as a fraction, where several replicas of one host share its memory."""

from __future__ import annotations

from headwise.runtime.capacity import capacity
from headwise.runtime.config import EngineConfig
from headwise.runtime.models import resolve
from headwise.runtime.precision import resolve_dtype
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.sizes import parse_memory
from headwise.workers.model.model_config import load_model_config


def own_kv_memory(config: EngineConfig, rank_memory: int) -> EngineConfig:
    """A CPU engine's settings with ``kv_memory`` in bytes, if it is a fraction: of what a rank's share of the host's
    memory leaves beside its weights. What is free when the engine starts tells nothing: others have started before it
    or will later, and it may have to start its shards again.

    Args:
        rank_memory: a rank's share, in bytes.

    Raises:
        InvalidValueError: the share is too small for the weights.
    """
    if config.kv_memory is None or config.device != "cpu" or not _is_fraction(config.kv_memory):
        return config
    model = load_model_config(resolve(config.model))
    dtype = resolve_dtype(config.dtype, config.device, model.dtype)
    ranks = capacity(model, config.tensor_parallel_size, dtype, 1, config.block_size).ranks
    taken = max(rank.weight_bytes for rank in ranks)
    taken += parse_memory(config.host_kv_memory, 0) if config.host_kv_memory is not None else 0
    if taken >= rank_memory:
        limit = f"is a fraction of what weights and host_kv_memory leave of {rank_memory} bytes, a rank's share of the "
        limit += f"memory that was free here; they take {taken}"
        raise InvalidValueError("kv_memory", config.kv_memory, limit, "start fewer replicas, or give a size")
    return config.model_copy(update={"kv_memory": parse_memory(config.kv_memory, rank_memory - taken)})


def _is_fraction(kv_memory: str | int | float) -> bool:
    return parse_memory(kv_memory, 1 << 40) != parse_memory(kv_memory, 1 << 41)
