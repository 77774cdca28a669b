"""What is known of a model before there is a shard: its files are checked, its tokenizer is loaded, no weight is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from headwise.runtime.config import DEFAULT_KV_MEMORY, EngineConfig
from headwise.runtime.inputs.grammars import GrammarChecker
from headwise.runtime.inputs.processor import InputProcessor
from headwise.runtime.inputs.tokenizer import Tokenizer, load_tokenizer
from headwise.runtime.kv.identity import KvIdentity
from headwise.runtime.kv_settings import kv_name, model_format, model_policy
from headwise.runtime.models import resolve
from headwise.runtime.precision import resolve_dtype
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.policy import KvPolicy
from headwise.workers.model.checkpoint import model_fingerprint, verify_checkpoint
from headwise.workers.model.model_config import ModelConfig, load_model_config
from headwise.workers.model.partition import partition_model
from headwise.workers.model.safetensors_index import SafetensorsIndex
from headwise.workers.spec import ShardSpec


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A model that can be loaded, and what takes requests to it.

    Attributes:
        path: its directory.
        weights: what its files hold, by their headers.
        max_model_len: most tokens of a request, whatever the KV memory.
        policy: of the keys and values of its layers and KV heads.
        kv_dtype: as set; None: the dtype that it is computed in.
        spec: of its shards, on the device that torch finds in this process; without tiers of the prefix cache.
    """

    path: Path
    config: ModelConfig
    weights: SafetensorsIndex
    max_model_len: int
    tokenizer: Tokenizer | None
    policy: KvPolicy
    kv_dtype: str | None
    spec: ShardSpec

    def identity(self, dtype: str) -> KvIdentity:
        """Of the KV that engines compute with this dtype."""
        name = kv_name(self.kv_dtype or dtype, dtype)
        return KvIdentity(model_fingerprint(self.path), name, self.spec.block_size, self.policy.text)

    def inputs(self, seed: int, identity: KvIdentity | None) -> InputProcessor:
        """Makes requests. Args: ``seed``: from which those without one get theirs."""
        grammars = GrammarChecker(self.path, self.config.vocab_size, self.config.eos_token_ids)
        return InputProcessor(self.tokenizer, self.config, self.max_model_len, seed, grammars, identity, self.policy)


def prepare(config: EngineConfig) -> PreparedModel:
    """Checks everything of a model that can be checked without a shard.

    Raises:
        InvalidValueError: a setting does not fit the model.
        UnsupportedModelError, CheckpointError: as of :class:`~headwise.runtime.llm.LLM`.
    """
    path = resolve(config.model)
    model = load_model_config(path)
    partition_model(model, config.tensor_parallel_size)
    policy = model_policy(config, model)
    weights = verify_checkpoint(path, model)
    max_model_len = _max_model_len(config, model)
    spec = _spec(config, path, model, max_model_len, policy)
    return PreparedModel(path, model, weights, max_model_len, load_tokenizer(path), policy, config.kv_dtype, spec)


def best_device() -> str:
    """``cuda`` where torch finds a GPU, else ``cpu``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def usable_device(name: str) -> str:
    """Where a process of this host computes.

    Args:
        name: ``cpu``, ``cuda`` or ``auto``.

    Raises:
        InvalidValueError: ``cuda``, and torch finds no GPU.
    """
    found = best_device()
    if name == "cuda" and found != "cuda":
        fix = "device=cpu (--device), or a build of torch with CUDA and a GPU that nvidia-smi shows"
        raise InvalidValueError("device", name, "torch finds no GPU here", fix)
    return found if name == "auto" else name


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    if config.max_model_len is None:
        return model.max_position_embeddings
    if config.max_model_len > model.max_position_embeddings:
        raise InvalidValueError(
            "max_model_len", config.max_model_len, f"the model was trained for {model.max_position_embeddings} tokens"
        )
    return config.max_model_len


def _spec(config: EngineConfig, path: Path, model: ModelConfig, max_model_len: int, policy: KvPolicy) -> ShardSpec:
    device = config.device if config.device != "auto" else best_device()
    dtype = resolve_dtype(config.dtype, device, model.dtype)
    return ShardSpec(
        model_dir=str(path),
        tensor_parallel_size=config.tensor_parallel_size,
        dtype=dtype,
        device=device,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        kv_memory=DEFAULT_KV_MEMORY[device] if config.kv_memory is None else config.kv_memory,
        max_num_batched_tokens=config.max_num_batched_tokens,
        attention=config.attention,
        kv_policy=policy.text,
        kv_dtype=str(model_format(config, model, dtype)),
    )
