"""From a config to an engine on a running shard group."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress as RichProgress

from headwise.cluster.group import GroupFactory, GroupStartError, Progress
from headwise.cluster.local_group import LocalGroupFactory
from headwise.runtime.config import DEFAULT_MIXED_PREFILL_TOKENS, EngineConfig, HandoffConfig
from headwise.runtime.engine.engine import Engine
from headwise.runtime.engine.generation import Generation, GenerationFactory
from headwise.runtime.engine.loop import EngineLoop, EngineStoppedError, is_hung
from headwise.runtime.engine.prefilling import Prefilling
from headwise.runtime.engine.recovery import Recovery
from headwise.runtime.engine.scheduler import Scheduler
from headwise.runtime.engine.tier_sizes import tier_sizes
from headwise.runtime.handoff.local import LocalServer
from headwise.runtime.handoff.messages import VERSION, HelloAnswer, Identity
from headwise.runtime.handoff.outbound import MAX_LEASE_S, MAX_TRANSFERS, Outbound
from headwise.runtime.handoff.service import HandoffService
from headwise.runtime.inputs.processor import InputProcessor
from headwise.runtime.kv.events import KvEvents
from headwise.runtime.kv_settings import heads_notes, kv_name
from headwise.runtime.precision import precision_notes
from headwise.runtime.prepare import best_device, prepare, usable_device
from headwise.runtime.sides import decode_config, prefill_config
from headwise.runtime.tls import channel_credentials
from headwise.runtime.warmup import prepare_kernels
from headwise.workers.addresses import is_loopback
from headwise.workers.errors import HeadwiseError, InvalidValueError
from headwise.workers.kv.handoff import HandoffSpec
from headwise.workers.kv.policy import DENSE
from headwise.workers.leftovers import sweep
from headwise.workers.model.checkpoint import model_fingerprint
from headwise.workers.model.model_config import ModelConfig
from headwise.workers.model.partition import partition_model
from headwise.workers.spec import ShardSpec

T = TypeVar("T")

MEET_TIMEOUT_S = 20.0
"""For the two engines of a program to meet: both run by then."""

STATS_TIMEOUT_S = 5.0
"""For a prefill engine to say what it has done; one that hangs says nothing."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Started:
    """An engine that is ready, and what hands it requests."""

    model_path: Path
    inputs: InputProcessor
    generations: GenerationFactory
    engine: Engine
    recovery: Recovery
    spec: ShardSpec
    prefill: PrefillSide | None = None

    def close(self) -> None:
        """Ends the shards; call it once the engine's thread has ended. Idempotent."""
        # Whatever fails or interrupts one of these, the others are done; the last pushed is the first.
        with contextlib.ExitStack() as stack:
            stack.callback(self.generations.close)
            stack.callback(self.engine.generation.close)
            if self.prefill is not None:  # before the ranks that it pushes to, and after who asks it
                stack.callback(self.prefill.close)
            if self.engine.generation.inbound is not None:
                stack.callback(self.engine.generation.inbound.close)
            stack.callback(self.inputs.close)
            stack.callback(self.recovery.close)

    def hurry(self) -> None:
        """From now on, :meth:`close` waits only a moment for what the shards are at."""
        self.engine.generation.group.hurry()
        self.recovery.hurry()
        if self.prefill is not None:
            self.prefill.hurry()


def run_engine(started: Started, on_failure: Callable[[BaseException], None]) -> EngineLoop:
    """Gives an engine its thread; ends the engine if that fails."""
    try:
        return EngineLoop(started.engine, on_failure, started.recovery)
    except BaseException:
        started.close()
        raise


class PrefillSide:
    """An engine that computes prompts for another engine of this program."""

    def __init__(self, config: EngineConfig, quiet: bool) -> None:
        with contextlib.ExitStack() as undo:
            self._started = _start(config, quiet)
            undo.callback(self._started.close)
            self.loop = EngineLoop(self._started.engine, self._failed, self._started.recovery)
            undo.callback(self.loop.close)
            self._server = LocalServer(handoff_service(self._started, self.loop))
            undo.pop_all()

    @property
    def address(self) -> str:
        """Where it is asked for prompts."""
        return self._server.address

    def stats(self) -> dict[str, Any]:
        """What it has done, as :meth:`Engine.stats`; empty once it has ended, or hangs."""
        try:
            return self.loop.run(Engine.stats, STATS_TIMEOUT_S)
        except (HeadwiseError, TimeoutError):
            return {}

    def reset_prefix_cache(self) -> None:
        """Forgets every cached block before it computes what it is asked for from now on."""
        self.loop.post(Engine.reset_prefix_cache)

    def close(self) -> None:
        """Idempotent."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._started.close)
            stack.callback(self.loop.close)
            stack.callback(self._server.close)

    def hurry(self) -> None:
        """From now on, :meth:`close` waits only a moment for the step in progress."""
        self.loop.hurry()
        self._started.hurry()

    def _failed(self, error: BaseException) -> None:
        if not isinstance(error, EngineStoppedError) or error.__cause__ is not None:
            _logger.error("the prefill engine has ended, and prompts are computed by the other: %s", error)


def start_engine(config: EngineConfig, quiet: bool) -> Started:
    """Checks everything that can be checked without a shard, then starts the shards.

    Where the config asks for a prefill engine, that one is started first.

    Raises: as :class:`~headwise.runtime.llm.LLM`.
    """
    if config.prefill is None:
        return _start(config, quiet)
    if config.handoff is not None and (config.handoff.role == "prefill" or config.handoff.peers):
        limit = "the prompts of an engine with prefill are computed by that one, and by no other"
        raise InvalidValueError("handoff", config.handoff, limit, "leave out prefill, or role and peers")
    with contextlib.ExitStack() as undo:
        side = PrefillSide(prefill_config(config), quiet)
        undo.callback(side.close)
        started = _start(decode_config(config, side.address), quiet)
        inbound = started.engine.generation.inbound
        assert inbound is not None
        undo.callback(started.close)
        if not all(peer.wait(MEET_TIMEOUT_S) for peer in inbound.peers):
            problems = [peer.problem for peer in inbound.peers]
            raise GroupStartError(f"the prefill engine and this one have not met in {MEET_TIMEOUT_S:g} s: {problems}")
        undo.pop_all()
    return replace(started, prefill=side)


def handoff_service(started: Started, loop: EngineLoop) -> HandoffService:
    """What other engines have a prefill engine compute prompts by.

    Args:
        loop: the engine's.
    """
    engine, spec = started.engine, started.spec

    def post(function: Callable[[], object]) -> None:
        loop.post(lambda engine: function())
        engine.generation.group.wake()  # it may wait for its ranks

    def run(function: Callable[[Outbound], T]) -> Future[T]:
        """Here and now, for a step that is under way may take longer than the caller has time."""
        if loop.ended is not None:
            raise loop.ended
        if engine.rebuilding or is_hung(engine):
            raise EngineStoppedError("the shards are dead" if engine.rebuilding else "a step makes no progress")
        answer, outbound = Future[T](), _outbound(engine.generation)
        with outbound.lock:
            answer.set_result(function(outbound))
        return answer

    def take_over(generation: Generation) -> None:
        _outbound(generation).post = post
        service.about = replace(service.about, epoch=generation.epoch)

    _outbound(engine.generation).post = post
    engine.on_resume.append(take_over)
    partitions = partition_model(started.inputs.model, spec.tensor_parallel_size)
    about = HelloAnswer(
        _identity(started.inputs.model, model_fingerprint(started.model_path), spec),
        engine.generation.epoch,
        [(part.heads.kv_start, part.heads.kv_stop) for part in partitions],
        started.inputs.max_model_len - 1,
        MAX_TRANSFERS,
        MAX_LEASE_S,
    )
    service = HandoffService(about, run, spec.handoff is not None and spec.handoff.ca is not None)
    return service


def _outbound(generation: Generation) -> Outbound:
    assert generation.outbound is not None, "the engine computes no prompts for others"
    return generation.outbound


def _start(config: EngineConfig, quiet: bool) -> Started:
    _check_spare(config)
    sweep()  # what engines have left that were killed together with all of their ranks
    model = prepare(config)
    path, spec, max_model_len = model.path, model.spec, model.max_model_len
    notes = precision_notes(config.dtype, spec, model.config, model.weights)
    for note in (*notes, *heads_notes(config, path)):
        if not quiet:
            print(f"headwise: {note}", file=sys.stderr)
    sizes = tier_sizes(config, model.config, spec, model.policy)
    identity = wire = None
    if config.enable_prefix_caching:
        identity = model.identity(spec.dtype)
        spec = replace(
            spec, host_kv_blocks=sizes.host, disk_kv_path=config.disk_kv_path, kv_identity=identity.namespace()
        )
    if config.handoff is not None:
        if identity is None:
            limit = "handed-over blocks are kept in the prefix cache"
            raise InvalidValueError("enable_prefix_caching", False, limit)
        wire = _identity(model.config, identity.fingerprint, spec)
        spec = replace(spec, handoff=_handoff_spec(config.handoff))
    if spec.device == "cpu":
        prepare_kernels(quiet)
    # Later engines have later epochs, so that a router can tell a restart from a gap.
    events = KvEvents(time.time_ns())
    resolved = config.model_copy(update={"device": spec.device})
    groups = make_factory(config, spec)
    generations = GenerationFactory(resolved, groups, max_model_len, sizes, events, wire, model.policy)
    with contextlib.ExitStack() as undo:  # until all of it stands
        undo.callback(generations.close)
        with _load_progress(quiet) as progress:
            generation = undo.enter_context(contextlib.closing(generations.make(progress)))
        if not quiet:
            print(_kv_memory(generation), file=sys.stderr)
        mixed = config.max_mixed_prefill_tokens or DEFAULT_MIXED_PREFILL_TOKENS[spec.device]
        scheduler = Scheduler(generation.tables, config.max_num_seqs, config.max_num_batched_tokens, mixed)
        engine = Engine(generation, scheduler, events, config.pipeline_depth, config.step_timeout)
        inputs = model.inputs(config.seed, identity)
        prefilling = Prefilling(engine, max_model_len, model.config.vocab_size)

        def take_over(generation: Generation) -> None:
            capacity = generation.tables.capacity
            inputs.max_model_len = max_model_len if capacity is None else min(max_model_len, capacity)
            if generation.outbound is not None:
                generation.outbound.prompts = prefilling

        take_over(generation)
        engine.on_resume.append(take_over)
        recovers = config.on_shard_death == "recover"
        recovery = Recovery(engine, generations, recovers=recovers, warm_spare=config.warm_spare)
        undo.pop_all()
    return Started(path, inputs, generations, engine, recovery, spec)


def _check_spare(config: EngineConfig) -> None:
    """
    Raises:
        InvalidValueError: there can be no spare shards, or they would be of no use.
    """
    if not config.warm_spare:
        return
    limits = {
        "spare shards need on_shard_death='recover'": config.on_shard_death == "recover",
        "the shard of executor='local' dies with this process": config.executor == "ray",
        "spare shards need device='cpu': on GPUs they would need GPUs of their own": config.device == "cpu"
        or (config.device == "auto" and best_device() == "cpu"),
    }
    for limit, holds in limits.items():
        if not holds:
            raise InvalidValueError("warm_spare", True, limit)


def _identity(model: ModelConfig, fingerprint: str, spec: ShardSpec) -> Identity:
    """What the engines of a handoff must have in common."""
    return Identity(
        VERSION,
        VERSION,
        fingerprint,
        kv_name(spec.kv_dtype or spec.dtype, spec.dtype),
        spec.block_size,
        spec.kv_policy,
        model.num_layers,
        model.num_kv_heads,
        model.head_dim,
    )


def _handoff_spec(handoff: HandoffConfig) -> HandoffSpec:
    """
    Raises:
        InvalidValueError: a file cannot be used, or keys and values would go elsewhere in clear text; said here, before
            a model is loaded for nothing.
    """
    files = [None if path is None else Path(path) for path in (handoff.ca, handoff.tls_cert, handoff.tls_key)]
    if handoff.ca is not None:
        channel_credentials(*files)
    if handoff.role == "decode" and not is_loopback(handoff.host) and None in files[1:]:
        limit = "is not loopback, and keys and values would go there in clear text"
        raise InvalidValueError("handoff_host", handoff.host, limit, "give --tls-cert and --tls-key")
    decode, encrypted = handoff.role == "decode", not is_loopback(handoff.host)
    shown = encrypted if decode else handoff.ca is not None
    return HandoffSpec(
        decode,
        handoff.host,
        handoff.shared_memory,
        handoff.tls_cert if shown else None,
        handoff.tls_key if shown else None,
        handoff.ca if encrypted or not decode else None,
    )


def _kv_memory(generation: Generation) -> str:
    found = []
    for cache in generation.tables.caches:
        num_blocks, size = cache.pool.num_blocks, cache.block_size
        found.append(f"{num_blocks * size:,} tokens in {num_blocks:,} blocks of {size}")
        if cache.reach != DENSE:
            found[-1] += f" for {cache.reach}"
    return f"KV memory: {'; '.join(found)}"


def make_factory(config: EngineConfig, spec: ShardSpec) -> GroupFactory:
    if config.executor == "local":
        usable_device(spec.device)
        return LocalGroupFactory(spec, config.cpus_per_rank)
    # Here and not above: executor="local" works where Ray is not installed.
    from headwise.cluster.ray_factory import RayGroupFactory

    return RayGroupFactory(
        spec, address=config.address, cpus_per_rank=config.cpus_per_rank, start_timeout_s=config.start_timeout
    )


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
