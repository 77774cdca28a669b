"""From a config to an engine on a running shard group."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress as RichProgress

from headwise.cluster.group import GroupFactory, Progress
from headwise.cluster.local_group import LocalGroupFactory
from headwise.runtime.config import DEFAULT_KV_MEMORY, DEFAULT_MIXED_PREFILL_TOKENS, EngineConfig
from headwise.runtime.engine.engine import Engine
from headwise.runtime.engine.generation import Generation, GenerationFactory
from headwise.runtime.engine.scheduler import Scheduler
from headwise.runtime.engine.tier_sizes import tier_sizes
from headwise.runtime.inputs.grammars import GrammarChecker
from headwise.runtime.inputs.processor import InputProcessor
from headwise.runtime.inputs.tokenizer import load_tokenizer
from headwise.runtime.kv.events import KvEvents
from headwise.runtime.kv.identity import KvIdentity
from headwise.runtime.models import resolve
from headwise.runtime.precision import precision_notes, resolve_dtype
from headwise.runtime.warmup import prepare_kernels
from headwise.workers.errors import InvalidValueError
from headwise.workers.model.checkpoint import model_fingerprint, verify_checkpoint
from headwise.workers.model.model_config import ModelConfig, load_model_config
from headwise.workers.model.partition import partition_model
from headwise.workers.spec import ShardSpec


@dataclass(frozen=True, slots=True)
class Started:
    """An engine that is ready, and what hands it requests."""

    model_path: Path
    inputs: InputProcessor
    generations: GenerationFactory
    engine: Engine
    spec: ShardSpec

    def close(self) -> None:
        """Ends the shards; call it once the engine's thread has ended. Idempotent."""
        # Whatever fails or interrupts one of these, the others are done; the last pushed is the first.
        with contextlib.ExitStack() as stack:
            stack.callback(self.generations.close)
            stack.callback(self.engine.generation.close)
            stack.callback(self.inputs.close)


def start_engine(config: EngineConfig, quiet: bool) -> Started:
    """Checks everything that can be checked without a shard, then starts the shards.

    Raises: as :class:`~headwise.runtime.llm.LLM`.
    """
    path = resolve(config.model)
    model = load_model_config(path)
    partition_model(model, config.tensor_parallel_size)
    weights = verify_checkpoint(path, model)
    max_model_len = _max_model_len(config, model)
    tokenizer = load_tokenizer(path)
    spec = _spec(config, path, model, max_model_len)
    for note in precision_notes(config.dtype, spec, model, weights):
        if not quiet:
            print(f"headwise: {note}", file=sys.stderr)
    sizes = tier_sizes(config, model, spec.dtype)
    identity = None
    if config.enable_prefix_caching:
        identity = KvIdentity(model_fingerprint(path), spec.dtype, config.block_size)
        spec = replace(
            spec, host_kv_blocks=sizes.host, disk_kv_path=config.disk_kv_path, kv_identity=identity.namespace()
        )
    if spec.device == "cpu":
        prepare_kernels(quiet)
    # Later engines have later epochs, so that a router can tell a restart from a gap.
    events = KvEvents(time.time_ns() // 1_000_000)
    generations = GenerationFactory(config, make_factory(config, spec), max_model_len, sizes, events)
    with contextlib.ExitStack() as undo:  # until all of it stands
        undo.callback(generations.close)
        with _load_progress(quiet) as progress:
            generation = undo.enter_context(contextlib.closing(generations.make(progress)))
        if not quiet:
            print(_kv_memory(generation), file=sys.stderr)
        mixed = config.max_mixed_prefill_tokens or DEFAULT_MIXED_PREFILL_TOKENS[spec.device]
        scheduler = Scheduler(generation.tables, config.max_num_seqs, config.max_num_batched_tokens, mixed)
        engine = Engine(generation, scheduler, events, config.pipeline_depth)
        grammars = GrammarChecker(path, model.vocab_size, model.eos_token_ids)
        inputs = InputProcessor(tokenizer, model, max_model_len, config.seed, grammars, identity)
        undo.pop_all()
    return Started(path, inputs, generations, engine, spec)


def _kv_memory(generation: Generation) -> str:
    num_blocks, size = generation.cache.pool.num_blocks, generation.cache.block_size
    return f"KV memory: {num_blocks * size:,} tokens in {num_blocks:,} blocks of {size}"


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    if config.max_model_len is None:
        return model.max_position_embeddings
    if config.max_model_len > model.max_position_embeddings:
        raise InvalidValueError(
            "max_model_len", config.max_model_len, f"the model was trained for {model.max_position_embeddings} tokens"
        )
    return config.max_model_len


def _spec(config: EngineConfig, path: Path, model: ModelConfig, max_model_len: int) -> ShardSpec:
    device = config.device if config.device != "auto" else _best_device()
    return ShardSpec(
        model_dir=str(path),
        tensor_parallel_size=config.tensor_parallel_size,
        dtype=resolve_dtype(config.dtype, device, model.dtype),
        device=device,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        kv_memory=DEFAULT_KV_MEMORY[device] if config.kv_memory is None else config.kv_memory,
        attention=config.attention,
    )


def make_factory(config: EngineConfig, spec: ShardSpec) -> GroupFactory:
    if config.executor == "local":
        return LocalGroupFactory(spec, config.cpus_per_rank)
    # Here and not above: executor="local" works where Ray is not installed.
    from headwise.cluster.ray_factory import RayGroupFactory

    return RayGroupFactory(
        spec, address=config.address, cpus_per_rank=config.cpus_per_rank, start_timeout_s=config.start_timeout
    )


def _best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def _load_progress(quiet: bool) -> Iterator[Progress | None]:
    if quiet:
        yield None
        return
    with RichProgress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting shards", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, description="loading layers", completed=done, total=total)

        yield show
