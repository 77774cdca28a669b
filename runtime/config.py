"""EngineConfig: the settings of an engine, checked when it is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from headwise.runtime.kv.eviction import EvictionName
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.format import KV_DTYPES
from headwise.workers.kv.policy import DENSE_TEXT, check_policy

DEFAULT_KV_MEMORY: dict[str, str | float] = {"cpu": "2GiB", "cuda": 0.9}
"""By device: a fixed size on a CPU, whose memory other programs use too; nearly all that is free on a GPU."""

DEFAULT_MIXED_PREFILL_TOKENS: dict[str, int | None] = {"cpu": 64, "cuda": None}
"""By device: a CPU's step takes longer with every token; a GPU's hardly does up to max_num_batched_tokens."""


class HandoffConfig(BaseModel):
    """How an engine has others compute prompts (decode), or computes prompts for others (prefill).

    Attributes:
        role: ``"prefill"`` or ``"decode"``.
        peers: of decode: the addresses of the prefill engines, ``host:port``.
        min_tokens: of decode: prompts with fewer tokens to compute are computed here. 0 hands over every prompt that
            fills a block; None, the default, decides by what computing takes here and there.
        on_failure: of decode: ``"recompute"``, the default, computes a prompt here if its handoff fails; ``"fail"``
            ends the request.
        lease_s: of decode: seconds after which either side gives a handoff up if it does not hear of the other.
            Default: 30.
        shared_memory: whether ranks on one host hand over blocks in shared memory. Default: True.
        host: of decode: the address on which each rank takes blocks. Default: ``"127.0.0.1"``.
        tls_cert, tls_key: PEM files of this side's certificate. It encrypts those connections where host is not
            loopback, and is shown to the other side.
        ca: a PEM file: whom the certificates of the other side are signed by; a prefill engine without such a one can
            write nothing. None connects in clear text.
        token: of decode: sent to the prefill engines. Of a prefill replica of a deployment: what decode has to send.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    role: Literal["prefill", "decode"]
    peers: tuple[str, ...] = ()
    min_tokens: int | None = Field(default=None, ge=0)
    on_failure: Literal["recompute", "fail"] = "recompute"
    lease_s: float = Field(default=30.0, gt=0, le=120)
    shared_memory: bool = True
    host: str = "127.0.0.1"
    tls_cert: str | None = None
    tls_key: str | None = None
    ca: str | None = None
    token: str | None = Field(default=None, repr=False)


def _kv_policy(text: str) -> str:
    try:
        check_policy(text)
    except InvalidValueError as error:
        raise PydanticCustomError("kv_policy", "{limit}", {"limit": error.limit}) from None
    return text


def _kv_dtype(name: str) -> str:
    if name not in KV_DTYPES:
        raise PydanticCustomError("kv_dtype", "must be one of {names}", {"names": ", ".join(KV_DTYPES)})
    return name


class EngineConfig(BaseModel):
    """The settings of an engine, checked when it is made. All but ``model`` have a default.

    A *rank* is one of the processes that a model is split over. A *KV block* holds the keys and values of a few tokens
    (``block_size``) in a rank's memory. The *prefix cache* is the blocks that are kept for prompts that begin alike.

    Attributes:
        model: the path of a directory with config.json and safetensors files, or of a .gguf file; or ``"smollm2"``.
        tensor_parallel_size: ranks that the model is split over; at most its number of query heads. Default: 1.
        dtype: of weights and activations, and of the KV cache where kv_dtype names no other. ``"auto"``, the default,
            is the checkpoint's on a GPU, and ``"float32"`` on a CPU, where the other dtypes are slow; a checkpoint
            converts to float32 exactly.
        device: ``"cpu"`` or ``"cuda"``; ``"auto"``, the default, is ``"cuda"`` where there is one.
        executor: ``"ray"``, the default, runs each rank as a Ray actor; ``"local"`` runs one rank in this process,
            without Ray.
        max_model_len: most tokens of one request, prompt and output together; None, the default, is what the model was
            trained for. With a kv_policy that gives every head a window it limits the prompt, and an output may go on
            past it, up to its max_tokens.
        block_size: tokens of a KV block. Default: 16.
        kv_memory: memory of each rank for KV blocks: a number of bytes, a size such as ``"2GiB"``, or a fraction of
            the memory that is free once the weights are loaded. On a CPU, the ranks of a host share that; on a GPU,
            what the largest step needs is taken off first. None, the default, is ``"2GiB"`` on a CPU and 0.9 on a GPU.
        num_blocks: most KV blocks, even if kv_memory has room for more; None, the default, is no such limit.
        max_num_batched_tokens: most tokens of one step; a longer prompt is computed in chunks. Default: 1024.
        max_mixed_prefill_tokens: most prompt tokens of a step that also generates a token of a stream. A low limit
            keeps streams fluent while others' prompts are computed. None, the default, is 64 on a CPU and no limit on
            a GPU.
        max_num_seqs: most requests that run at the same time, and at most max_num_batched_tokens. Default: 128.
        pipeline_depth: steps in flight at the same time, 1 or 2. With 2, the default, a step is submitted before the
            tokens of the step before it are known.
        attention: the attention backend, ``"reference"``, ``"cpu"``, ``"cuda"`` (Triton) or ``"flashinfer"`` (the
            library flashinfer-python); the last two have not run on a GPU yet. None, the default, is the fastest of the
            first three that can serve the model.
        kv_policy: which keys and values are kept, and so which earlier tokens a token attends to. ``"dense"``, the
            default, is all of them; ``"window:L"`` the last L tokens, itself included; ``"sinks:S,L"`` the first S
            tokens, too (StreamingLLM). Parts name layers, or KV heads as ``layer.head``, and the first part that names
            a head decides: ``"dense@0-3;sinks:4,252@*"``. See :mod:`headwise.workers.kv.policy`.
        kv_dtype: in what form keys and values are kept: ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"int8"``,
            ``"int4"``, or one for keys and one for values, ``"int8/int4"``. None, the default, is dtype.
        streaming_heads: a JSON file of ``headwise calibrate``, which names heads that do without most tokens, and their
            policy; kv_policy is for all others. None, the default, is no such file.
        seed: requests without a seed of their own get one that is derived from this. Default: 0.
        enable_prefix_caching: whether requests use the KV blocks of requests that began with the same tokens.
            Default: True.
        prefix_eviction: which block of the prefix cache makes room when memory is full. ``"lru"``, the default, takes
            the one unused for longest; ``"cost_aware"`` the one that is worth least, by the time to compute it again
            and by how often it was used.
        cache_quota: largest share, from 0 to 1, of the prefix cache and of each tier below it that requests with the
            same cache_salt may fill; on a server with tokens, that a tenant may fill, whatever its salts. It limits
            what is kept, not what running requests need. None, the default, is no limit.
        host_kv_memory: host memory of each rank for KV blocks that left the device, in bytes or such as ``"4GiB"``.
            None, the default, keeps none there.
        disk_kv_path: a folder where each rank keeps KV blocks that left its memory, as files. The next engine with the
            same model and settings finds them. It must be the user's own, and nobody else may write to it. None, the
            default, keeps none.
        disk_kv_limit: most that the files of each rank there may take. Default: ``"16GiB"``.
        address: the Ray cluster to join. None, the default, joins the one that RAY_ADDRESS names, or the one that this
            process uses already, or starts one on this machine.
        cpus_per_rank: CPUs that each rank asks Ray for and computes with; None, the default, is the cores that
            may be used here (by affinity and CPU quota), or that the Ray cluster's largest node has, divided by the
            ranks.
        start_timeout: seconds until every rank must have a place in the Ray cluster. Default: 120.
        step_timeout: seconds that a step may take before it counts as hanging, which is as good as its shards' death.
            None, the default, is four times the slowest recent step, more for more tokens, and at least 8.
        on_shard_death: ``"recover"``, the default, starts the shards again when one of them dies, and requests go on
            with the tokens that they would have had; ``"fail"`` ends the engine.
        warm_spare: whether shards that have their weights wait to take the place of those that die. They take as much
            memory as the weights once more. Default: False.
        prefill: the settings in which an engine of its own differs that computes the prompts for this one, such as
            ``{"tensor_parallel_size": 1}``; both share the CPUs. None, the default, is no such engine.
        handoff: how prompts are handed over from or to other engines; None, the default, is not at all.

    Raises:
        pydantic.ValidationError: a field is wrong; :func:`engine_config` raises InvalidValueError instead.
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
    attention: Literal["reference", "cpu", "cuda", "flashinfer"] | None = None
    kv_policy: Annotated[str, AfterValidator(_kv_policy)] = DENSE_TEXT
    kv_dtype: Annotated[str, AfterValidator(_kv_dtype)] | None = None
    streaming_heads: str | None = Field(default=None, min_length=1)
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
    step_timeout: float | None = Field(default=None, gt=0)
    on_shard_death: Literal["recover", "fail"] = "recover"
    warm_spare: bool = False
    prefill: dict[str, Any] | None = None
    handoff: HandoffConfig | None = None


def engine_config(**fields: Any) -> EngineConfig:
    """An EngineConfig of these fields.

    Raises:
        InvalidValueError: a field is wrong; names the first such one.
    """
    with _named("EngineConfig"):
        return EngineConfig(**fields)


def handoff_config(**fields: Any) -> HandoffConfig:
    """A HandoffConfig of these fields; raises as :func:`engine_config`, and names the flag of ``headwise serve``."""
    with _named("handoff", "handoff_{}", {"role": "role", "on_failure": "on_handoff_failure"}):
        return HandoffConfig(**fields)


@contextmanager
def _named(kind: str, form: str = "{}", names: Mapping[str, str] = {}) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else None
        name = kind if field is None else names.get(field, form.format(field))
        raise InvalidValueError(name, first["input"], first["msg"]) from None
