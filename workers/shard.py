"""Shard: one rank of a model, what a Ray actor or a local group holds."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgpack
import torch

from headwise.workers import failpoints
from headwise.workers.backends import find_backend
from headwise.workers.collectives import Collectives
from headwise.workers.cuda import gpu
from headwise.workers.cuda.launch import TRITON
from headwise.workers.cuda.memory import GpuMemory, LargestStep, Step, or_refuse, staging_bytes
from headwise.workers.errors import InvalidValueError
from headwise.workers.failpoints import Point
from headwise.workers.kv.cache import KVCache
from headwise.workers.kv.copier import Copier
from headwise.workers.kv.format import kv_format
from headwise.workers.kv.handoff import HandoffJob
from headwise.workers.kv.handoff_rank import HandoffRank
from headwise.workers.kv.policy import KvPolicy, resolve_policy
from headwise.workers.kv.sizes import affordable, block_bytes, parse_memory
from headwise.workers.kv.store import MAX_STORED_BLOCKS, DiskStore, HostStore
from headwise.workers.kv.transfer import TransferJob, TransferResult
from headwise.workers.machine import free_host_memory
from headwise.workers.model.checkpoint import load_shard
from headwise.workers.model.model import Model
from headwise.workers.model.model_config import load_model_config
from headwise.workers.model.partition import partition_model
from headwise.workers.plan import MAX_MESSAGE_BYTES, StepOutput, StepPlan
from headwise.workers.processes import ProcessId
from headwise.workers.runner import Launched, Runner
from headwise.workers.sampling.best_check import check_best_keys
from headwise.workers.sampling.grammar import Grammars
from headwise.workers.sampling.sampler import Sampler
from headwise.workers.spec import ShardSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Shard:
    """One rank. Call in this order: :meth:`load`, :meth:`affordable_blocks`, :meth:`allocate`, then :meth:`step` and
    :meth:`transfer`."""

    def __init__(
        self,
        spec: ShardSpec,
        collectives: Collectives,
        num_threads: int,
        on_transfer: Callable[[TransferResult], None] = lambda result: None,
        on_failure: Callable[[BaseException], None] = lambda error: None,
        ranks_on_host: Sequence[int] | None = None,
    ) -> None:
        """
        Args:
            num_threads: CPU threads this rank computes with.
            on_transfer: gets the result of each :meth:`transfer`, on a thread of the shard's; never two at a time.
            on_failure: gets the error after which transfers have no results any more, ``on_transfer``'s own too, on
                that thread; the shard is then of no more use.
            ranks_on_host: of this group, this one included: they share the free memory of the host, by their KV heads,
                which is how they need it. None is this one alone.
        """
        self._spec, self._collectives, self._num_threads = spec, collectives, num_threads
        self._ranks_on_host = [collectives.rank] if ranks_on_host is None else ranks_on_host
        self._on_transfer, self._on_failure = on_transfer, on_failure
        self._telling = threading.Lock()
        self._process = asdict(ProcessId.of(os.getpid()))
        self._device = torch.device(spec.device)
        self._gpu = gpu.of(self._device)
        self._gpu_memory = GpuMemory(self._gpu, spec, collectives.rank) if self._gpu is not None else None
        self._dtype = DTYPES[spec.dtype]
        self._config = load_model_config(Path(spec.model_dir))
        self._partitions = partition_model(self._config, spec.tensor_parallel_size)
        self._partition = self._partitions[collectives.rank]
        self._model: Model | None = None
        self._kv_cache: KVCache | None = None
        self._runner: Runner | None = None
        self._grammars: Grammars | None = None
        self._host: HostStore | None = None
        self._disk: DiskStore | None = None
        self._copier: Copier | None = None
        self._handoff: HandoffRank | None = None
        self._policy = self._resolve_policy()
        self._format = kv_format(spec.kv_dtype or spec.dtype, self._config.head_dim)
        self._caps = self._policy.caps(spec.block_size, spec.max_num_seqs, spec.max_num_batched_tokens)
        computing = (self._device, self._dtype, spec.block_size, self._config.head_dim)
        self._backend = find_backend(spec.attention, *computing, self._format, self._policy)
        if self._device.type == "cpu":
            torch.set_num_threads(num_threads if self._backend.torch_computes else 1)

    def load(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Reads and prepares this rank's weights, and on a GPU computes the largest step, to see what memory it needs.
        ``progress`` gets (layers done, layers).

        Raises:
            CheckpointError: a file or tensor is missing or not what the configuration promises.
            InvalidValueError: the host has no memory for ``host_kv_blocks``, or the GPU for the weights or a step; or
                a kernel is wrong on this GPU.
        """
        if self._gpu_memory is None:
            self._model = self._load_model(progress)
        else:
            self._model = self._gpu_memory.hold_weights(lambda: self._load_model(progress))
            check_best_keys(self._device)
            self._measure_steps(self._gpu_memory, self._model)
        self._measure_memory()

    def affordable_blocks(self) -> int:
        """How many KV blocks of each group ``kv_memory`` pays for on this rank, by the memory that is free now; groups
        that cannot make use of so many have fewer (see :meth:`KvPolicy.caps
        <headwise.workers.kv.policy.KvPolicy.caps>`).

        Raises:
            InvalidValueError: the host has no memory for ``host_kv_blocks``, or the GPU for more than steps.
        """
        self._measure_memory()
        return affordable(parse_memory(self._spec.kv_memory, self._free), self._block_bytes, self._caps)

    def allocate(self, num_blocks: int, in_haste: bool = False) -> None:
        """Takes the KV memory and makes the shard ready for steps; the same number on every rank.

        Args:
            num_blocks: of each group, as in :meth:`affordable_blocks`.
            in_haste: the memory's pages are taken beside the steps, and not before the first.

        Raises:
            InvalidValueError: there is no memory for so many blocks, or for ``host_kv_blocks``; ``disk_kv_path`` cannot
                be used, or another engine uses it; ``handoff`` has a host or file that cannot be used.
        """
        spec = self._spec
        assert self._model is not None, "load() comes first"
        if failpoints.ENABLED:
            failpoints.hit(Point.ALLOCATE, self._collectives.rank)
        self._kv_cache = self._room_for(num_blocks, in_haste)
        self._model.attach(self._kv_cache)
        if self._collectives.rank == 0:
            self._grammars = Grammars(Path(spec.model_dir), self._config.vocab_size, self._config.eos_token_ids)
        self._runner = self._make_runner(self._model, self._grammars)
        self._open_mover(self._kv_cache, self._runner)
        self._open_tiers(self._kv_cache)
        self._open_handoff(self._kv_cache)

    def step(self, plan: StepPlan) -> StepOutput:
        """Computes one step; only rank 0's output is of use."""
        return self.finish(self.launch(plan))

    def launch(self, plan: StepPlan) -> Launched:
        """As :meth:`Runner.launch <headwise.workers.runner.Runner.launch>`."""
        assert self._runner is not None, "allocate() comes first"
        return self._runner.launch(plan)

    def finish(self, launched: Launched) -> StepOutput:
        """As :meth:`Runner.finish <headwise.workers.runner.Runner.finish>`; only rank 0's output is of use."""
        assert self._runner is not None, "allocate() comes first"
        return self._runner.finish(launched)

    def transfer(self, job: TransferJob | HandoffJob) -> None:
        """Moves blocks between the device and a tier, or from or to another group, beside the steps; ``on_transfer``
        gets what came of it."""
        if isinstance(job, HandoffJob):
            assert self._handoff is not None, "handoff comes first"
            self._handoff.submit(job)
            return
        assert self._copier is not None, "host_kv_blocks or disk_kv_path comes first"
        self._copier.submit(job)

    def kv_endpoint(self) -> tuple[int, int, str, bytes] | None:
        """Where this rank takes KV: its heads, the address and the host's id of
        :class:`~headwise.workers.kv.handoff.KvEndpoint`; None if it takes none."""
        return self._handoff.endpoint() if self._handoff is not None else None

    def stored_blocks(self) -> list[tuple[bytes, bytes, bytes, bytes]]:
        """(digest, namespace, parent, tokens) of the blocks that were on disk at the start, oldest first; as many as
        fit a message."""
        keys = self._disk.stored_keys() if self._disk is not None else []
        return [(key.digest, key.namespace, key.parent, key.tokens) for key in keys[-self._max_stored_blocks() :]]

    def stats(self) -> dict[str, Any]:
        """This rank's place and memory: pid, process (the fields of ProcessId), rank, heads (global half-open ranges),
        bytes, KV blocks of each group, KV policy and dtype, blocks on disk, and seconds of its steps by part since the
        start, as far as they are measured."""
        heads = self._partition.heads
        return {
            "pid": os.getpid(),
            "process": self._process,
            "rank": self._collectives.rank,
            "query_heads": (heads.q_start, heads.q_stop),
            "kv_heads": (heads.kv_start, heads.kv_stop),
            "kv_bytes": self._kv_cache.nbytes if self._kv_cache else 0,
            "kv_blocks": self._kv_cache.group_blocks if self._kv_cache else (),
            "kv_policy": self._policy.text,
            "kv_dtype": str(self._format),
            "host_kv_bytes": self._host.nbytes if self._host is not None else 0,
            "disk_kv_blocks": len(self._disk) if self._disk is not None else 0,
            "weight_bytes": self._model.nbytes if self._model else 0,
            "seconds": self._seconds(),
        }

    def _seconds(self) -> dict[str, float]:
        model = self._model.seconds if self._model else {}
        return (self._runner.seconds if self._runner else {}) | model

    def abort(self, cause: str) -> None:
        """Tells the peers that this rank gives up, so that none of them waits for it."""
        self._collectives.abort(cause)

    def close(self) -> None:
        """Lets the peers and the memory go; transfers end first, or are abandoned. Idempotent."""
        if self._handoff is not None:
            self._handoff.close()
        ended = self._copier.close() if self._copier is not None else True
        if self._disk is not None and ended:
            self._disk.close()  # a copier's thread that has not ended would use what was closed under it
        if self._host is not None and ended:
            self._host.close()
        if self._grammars is not None:
            self._grammars.close()
        if self._kv_cache is not None:
            self._kv_cache.close()
        # Before the collectives: graphs of the model hold NCCL's operations, and NCCL waits for ever for a communicator
        # that a graph still uses.
        if self._model is not None:
            self._model.detach()  # while the collectives are there
        self._handoff = self._copier = self._host = self._disk = self._grammars = None
        self._runner = self._kv_cache = self._model = None
        self._collectives.close()
        if self._gpu is not None:
            self._gpu.empty_cache()  # in a process that goes on, others can have the memory now

    def _resolve_policy(self) -> KvPolicy:
        config, spec = self._config, self._spec
        policy = resolve_policy(spec.kv_policy, config.num_layers, config.num_kv_heads, config.sliding_windows)
        if policy.num_groups > 1 and self._moves_blocks:
            limit = (
                f"has {policy.num_groups} kinds of heads, with blocks of their own, "
                "and only those of one kind can be kept in host memory or on disk, or handed over to other engines"
            )
            fix = (
                "give all heads one kind (such as sinks:4,1020), or leave out host_kv_memory (--host-kv-memory), "
                "disk_kv_path (--disk-kv-path) and handoffs"
            )
            raise InvalidValueError("kv_policy", spec.kv_policy, limit, fix)
        return policy

    def _load_model(self, progress: Callable[[int, int], None] | None) -> Model:
        directory = Path(self._spec.model_dir)
        weights = load_shard(directory, self._config, self._partition, self._dtype, self._device, progress)
        parts = (self._config, self._partition, weights, self._collectives, self._spec.max_model_len)
        return self._backend.model(*parts, self._num_threads)

    def _make_runner(self, model: Model, grammars: Grammars | None) -> Runner:
        spec = self._spec
        return Runner(
            model,
            Sampler(self._config.vocab_size, spec.max_num_seqs, self._device, grammars),
            self._collectives,
            vocab_sizes=[stop - start for start, stop in (p.vocab for p in self._partitions)],
            block_size=spec.block_size,
            max_num_seqs=spec.max_num_seqs,
            max_model_len=spec.max_model_len,
            max_num_batched_tokens=spec.max_num_batched_tokens,
            reaches=self._policy.reaches,
            device=self._device,
            num_threads=self._num_threads,
        )

    def _measure_steps(self, memory: GpuMemory, model: Model) -> None:
        spec = self._spec
        rows = min(spec.max_num_seqs, spec.max_num_batched_tokens)
        length, groups = max(1, spec.max_model_len - 1), self._policy.num_groups
        largest = LargestStep(rows, spec.max_num_batched_tokens, length, groups)

        def start() -> Step:
            model.attach(self._make_cache(num_blocks=1))
            return self._make_runner(model, grammars=None).step

        memory.measure_steps(largest, start, model.detach)
        if self._moves_blocks:
            memory.reserve(staging_bytes(sum(self._block_bytes)))

    def _measure_memory(self) -> None:
        """Of the ranks of a host, the last to have loaded finds what there really is, and its error or its number of
        blocks is the group's."""
        heads = sum(self._partitions[rank].heads.num_kv for rank in self._ranks_on_host)
        on_host = free_host_memory() * self._partition.heads.num_kv // heads
        tier = self._host_tier_bytes()
        if tier > on_host:
            raise self._no_host_tier(self._has(on_host))
        self._free = on_host - tier if self._gpu_memory is None else self._gpu_memory.for_kv()

    def _host_tier_bytes(self) -> int:
        return self._spec.host_kv_blocks * sum(self._block_bytes)

    def _no_host_tier(self, limit: str) -> InvalidValueError:
        fix = "lower host_kv_memory (--host-kv-memory)"
        return InvalidValueError("host_kv_memory", f"{self._host_tier_bytes()} bytes", limit, fix)

    def _room_for(self, num_blocks: int, in_haste: bool) -> KVCache:
        groups = zip(self._group_blocks(num_blocks), self._block_bytes, strict=True)
        needed = sum(count * size for count, size in groups)
        limit = f"{num_blocks} blocks take {needed} bytes, and {self._has(self._free, self._gpu_memory)}"
        error = InvalidValueError("kv_memory", self._spec.kv_memory, limit, "lower kv_memory (--kv-memory)")
        if needed > self._free:
            raise error
        # Others may have been faster, or it is not to be had in one piece.
        return or_refuse(lambda: self._make_cache(num_blocks, in_haste), lambda: error)

    def _make_cache(self, num_blocks: int, in_haste: bool = False) -> KVCache:
        return KVCache(
            num_layers=self._config.num_layers,
            num_blocks=self._group_blocks(num_blocks),
            num_kv_heads=self._partition.heads.num_kv,
            block_size=self._spec.block_size,
            head_dim=self._config.head_dim,
            dtype=self._dtype,
            device=self._device,
            transposed_keys=bool(self._backend.attention.transposed_keys),
            in_haste=in_haste,
            format=self._format,
            policy=self._local_policy,
        )

    def _group_blocks(self, num_blocks: int) -> tuple[int, ...]:
        return tuple(num_blocks if cap is None else min(num_blocks, cap) for cap in self._caps)

    def _has(self, free: int, memory: GpuMemory | None = None) -> str:
        """Args: ``memory``: what is free is the GPU's; None is the host's."""
        place = f"host memory, as one of {len(self._ranks_on_host)} here"
        if memory is not None:
            place = f"GPU memory, beside the {memory.for_steps} bytes that steps need"
        return f"rank {self._collectives.rank} has {free} bytes of {place}"

    @property
    def _moves_blocks(self) -> bool:
        """Whether blocks ever leave the device, or come from elsewhere."""
        spec = self._spec
        return bool(spec.host_kv_blocks or spec.disk_kv_path is not None or spec.handoff is not None)

    def _open_mover(self, kv_cache: KVCache, runner: Runner) -> None:
        """Gives a GPU's cache what moves its blocks, if any are ever moved."""
        spec, ours = self._spec, gpu.of(self._device)
        if ours is None or not self._moves_blocks:
            return
        if not TRITON:
            limit = "needs Triton for host_kv_memory, disk_kv_path and handoffs, which is not installed"
            raise InvalidValueError("device", spec.device, limit, "pip install 'headwise[cuda]'")
        from headwise.workers.cuda.kv_copy import BlockMover  # who computes on a CPU needs no Triton

        kv_cache.mover = BlockMover(kv_cache, ours, lambda: runner.collected)

    def _open_tiers(self, kv_cache: KVCache) -> None:
        spec, rank, ranks = self._spec, self._collectives.rank, self._spec.tensor_parallel_size
        heads = self._partition.heads
        if spec.host_kv_blocks:
            try:
                self._host = HostStore(spec.host_kv_blocks, kv_cache.block_shape, kv_cache.dtype, gpu.of(self._device))
            except MemoryError:  # a limit of the process or of overcommitment, which is not that of free memory
                raise self._no_host_tier(f"rank {rank} cannot reserve so much host memory") from None
        if spec.disk_kv_path is not None:
            place = (rank, ranks, heads.kv_start, heads.kv_stop)
            kept = (self._policy.text, str(self._format), kv_cache.block_shape, spec.dtype)
            identity = msgpack.packb((spec.kv_identity, place, *kept))
            sizes = (sum(self._block_bytes), self._max_stored_blocks())
            self._disk = DiskStore(spec.disk_kv_path, rank, ranks, identity, *sizes)
        if self._host is not None or self._disk is not None:
            self._copier = Copier(kv_cache, self._host, self._disk, self._tell, self._on_failure)

    def _open_handoff(self, kv_cache: KVCache) -> None:
        if self._spec.handoff is not None:
            heads = [(part.heads.kv_start, part.heads.kv_stop) for part in self._partitions]
            place = (heads, self._collectives.rank, self._spec.handoff)
            self._handoff = HandoffRank(kv_cache, *place, self._tell, self._on_failure)

    def _tell(self, result: TransferResult) -> None:
        with self._telling:
            self._on_transfer(result)

    def _max_stored_blocks(self) -> int:
        """How many blocks of an earlier run the engine can be told of."""
        fitting = (MAX_MESSAGE_BYTES - 1024) // (112 + 4 * self._spec.block_size)  # three digests, tokens, framing
        return min(fitting, MAX_STORED_BLOCKS)

    @property
    def _local_policy(self) -> KvPolicy:
        """Of this rank's KV heads."""
        heads = self._partition.heads
        return self._policy.heads(heads.kv_start, heads.kv_stop)

    @property
    def _block_bytes(self) -> tuple[int, ...]:
        """Of a block of each group on this rank."""
        return block_bytes(self._local_policy, self._format, self._spec.block_size, self._config.head_dim)
