"""EngineConfig: everything an engine can be told, in one typed tree, validated loudly."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from headwise.runtime.kv.eviction import EvictionName
from headwise.workers.errors import InvalidValueError

DEFAULT_KV_MEMORY: dict[str, str | float] = {"cpu": "2GiB", "cuda": 0.9}
"""By device: a fixed share of a machine that others use too, or nearly all of a GPU that nobody else does."""

DEFAULT_MIXED_PREFILL_TOKENS: dict[str, int | None] = {"cpu": 64, "cuda": None}
"""By device: a CPU's step time grows with every token, a GPU's hardly does before max_num_batched_tokens."""


class EngineConfig(BaseModel):
    """
    Attributes:
        model: a directory in Hugging Face form, a .gguf file, or a name that ``headwise.runtime.models.names`` knows.
        tensor_parallel_size: ranks the model is split over; at most the number of query heads.
        dtype: of weights, activations and KV; ``auto`` is the checkpoint's.
        device: ``auto`` is ``cuda`` where there is one.
        executor: ``ray`` has an actor a rank; ``local`` one rank in this process.
        max_model_len: most tokens of one request, prompt and output; None is what the model was trained for.
        block_size: tokens of a KV block.
        kv_memory: what each rank may spend on KV: bytes, ``"2GiB"``, or a fraction of the memory that is free once
            the weights are loaded; None is DEFAULT_KV_MEMORY.
        num_blocks: never more KV blocks than this, whatever kv_memory affords.
        max_num_batched_tokens: most tokens of one step; a longer prompt is computed in chunks.
        max_mixed_prefill_tokens: most prompt tokens of a step in which a stream gets a token, a bound on how long the
            prompts of others hold that up; None is DEFAULT_MIXED_PREFILL_TOKENS.
        max_num_seqs: most requests that run at once; never more than max_num_batched_tokens.
        pipeline_depth: steps in flight at once; with 2, the next is submitted before the tokens of one are seen.
        attention: the attention backend; None is the fastest that fits.
        seed: of requests that bring none.
        enable_prefix_caching: whether requests share the KV blocks of equal prompts, and find those of earlier ones.
        prefix_eviction: which idle block goes first: ``lru``, the one unused for longest; ``cost_aware``, the one that
            is worth least, by its recompute time and how often it was found.
        cache_quota: the share of the cache, and of each tier, that requests with one cache_salt may fill; None is no
            limit. It bounds what is kept, not what running requests need.
        host_kv_memory: host memory each rank may fill with blocks that had to leave the device, such as ``"4GiB"``.
        disk_kv_path: a folder where each rank keeps blocks that had to leave memory; the next engine with the same
            model and settings finds them.
        disk_kv_limit: the most that each rank's files there may take.
        address: of the Ray to join; None joins RAY_ADDRESS, or starts one here.
        cpus_per_rank: CPUs each rank asks Ray for and computes with; None is cores / ranks.
        start_timeout: seconds until every rank must be placed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    model: str
    tensor_parallel_size: int = Field(default=1, ge=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    executor: Literal["ray", "local"] = "ray"
    max_model_len: int | None = Field(default=None, ge=2)
    block_size: int = Field(default=16, ge=1, le=1024)
    kv_memory: str | int | float | None = None
    num_blocks: int | None = Field(default=None, ge=1)
    max_num_batched_tokens: int = Field(default=1024, ge=1)
    max_mixed_prefill_tokens: int | None = Field(default=None, ge=1)
    max_num_seqs: int = Field(default=128, ge=1, le=4096)
    pipeline_depth: int = Field(default=2, ge=1, le=2)
    attention: Literal["reference", "cpu"] | None = None
    enable_prefix_caching: bool = True
    prefix_eviction: EvictionName = "lru"
    cache_quota: float | None = Field(default=None, gt=0, le=1)
    host_kv_memory: str | int | None = None
    disk_kv_path: str | None = Field(default=None, min_length=1)
    disk_kv_limit: str | int = "16GiB"
    seed: int = Field(default=0, ge=0, lt=2**64)
    address: str | None = None
    cpus_per_rank: float | None = Field(default=None, gt=0)
    start_timeout: float = Field(default=120.0, gt=0)


def engine_config(**fields: Any) -> EngineConfig:
    """The validated config.

    Raises:
        InvalidValueError: of the first field that is wrong.
    """
    try:
        return EngineConfig(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "EngineConfig"
        raise InvalidValueError(name, first["input"], first["msg"]) from None
