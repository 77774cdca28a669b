"""Moves KV blocks between the device and the tiers below it, on threads beside the steps."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

import torch
from torch import Tensor

from headwise.workers import failpoints
from headwise.workers.failpoints import Point
from headwise.workers.kv.cache import KVCache
from headwise.workers.kv.store import DiskStore, HostStore
from headwise.workers.kv.transfer import BlockKey, Op, Tier, TransferJob, TransferResult

_logger = logging.getLogger(__name__)


class Copier:
    """Two threads, so that copies in memory never wait for a disk: one for each tier's jobs, first come, first served.

    The engine sees to it that no step and no other job touches a block, on the device or in a tier, while it is moved.
    """

    def __init__(
        self,
        kv_cache: KVCache,
        host: HostStore | None,
        disk: DiskStore | None,
        done: Callable[[TransferResult], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        """
        Args:
            host, disk: the tiers there are; jobs for the others fail. From now on only the copier calls them, but
                for what they allow to any thread.
            done: gets the result of each job, on the job's thread but never two at a time; of one tier's jobs in
                their order.
            failed: gets the error, of ``done`` too, that ended a thread: its jobs have no results any more.
        """
        self._kv_cache, self._host, self._disk, self._done, self._failed = kv_cache, host, disk, done, failed
        self._done_lock = threading.Lock()
        self._queues: dict[Tier, SimpleQueue[TransferJob | None]] = {tier: SimpleQueue() for tier in Tier}
        self._abandoned = threading.Event()
        # Blocks on their way between the device and the disk pass through here.
        self._staging = torch.empty((1, *kv_cache.block_shape), dtype=kv_cache.dtype)
        self._threads = [
            threading.Thread(target=self._run, args=(queue,), name=f"headwise-kv-{tier.value}", daemon=True)
            for tier, queue in self._queues.items()
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: TransferJob) -> None:
        """Queue a job; returns at once. After :meth:`close` it is forgotten."""
        self._queues[job.tier].put(job)

    def close(self, timeout_s: float = 1.0) -> bool:
        """End the threads: jobs that are not through in time are abandoned, and nobody hears of them. Idempotent.

        Returns:
            Whether the threads have ended. One that is stuck in the disk may not; it ends once it gets out of there.
        """
        deadline = time.monotonic() + timeout_s
        for queue in self._queues.values():
            queue.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._abandoned.set()
        for thread in self._threads:
            thread.join(timeout_s)
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self, queue: SimpleQueue[TransferJob | None]) -> None:
        try:
            while (job := queue.get()) is not None:
                started = time.perf_counter()
                failed = self._move_all(job)
                if self._abandoned.is_set():
                    return
                with self._done_lock:
                    self._done(TransferResult(job.id, failed, time.perf_counter() - started))
        except BaseException as error:
            self._failed(error)

    def _move_all(self, job: TransferJob) -> list[bytes]:
        """The digests that were not moved; where a job was to put them they are then not."""
        failed: list[bytes] = []
        try:
            moves_device = job.op in (Op.SAVE, Op.LOAD)
            blocks = job.blocks if moves_device else [-1] * len(job.keys)
            for key, block in zip(job.keys, blocks, strict=True):
                if self._abandoned.is_set():
                    break
                try:
                    moved = self._move(job.op, job.tier, key, block)
                except OSError:
                    moved = False
                if not moved:
                    failed.append(key.digest)
        except Exception as error:
            _logger.error(
                "KV transfer job %d (%s, %s) failed: %s: %s", job.id, job.op.name, job.tier, type(error).__name__, error
            )
            failed = [key.digest for key in job.keys]
        if job.op in (Op.SAVE, Op.DEMOTE):
            for digest in failed:
                self._drop(job.tier, digest)
        return failed

    def _move(self, op: Op, tier: Tier, key: BlockKey, block: int) -> bool:
        """
        Raises:
            OSError: the disk cannot be written.
        """
        if op == Op.DROP:
            self._drop(tier, key.digest)
            return True
        if failpoints.ENABLED:
            failpoints.hit(Point.KV_COPY)
        if op == Op.DEMOTE:
            return self._demote(key)
        if tier == Tier.HOST:
            return self._save_to_host(key, block) if op == Op.SAVE else self._load_from_host(key, block)
        return self._save_to_disk(key, block) if op == Op.SAVE else self._load_from_disk(key, block)

    def _save_to_host(self, key: BlockKey, block: int) -> bool:
        if self._host is None:
            return False

        def fill(slot: Tensor) -> None:
            self._kv_cache.read_blocks([block], slot.unsqueeze(0))

        self._host.put(key.digest, fill)
        return True

    def _load_from_host(self, key: BlockKey, block: int) -> bool:
        held = self._held(key)
        if held is None:
            return False
        self._kv_cache.write_blocks([block], held.unsqueeze(0))
        return True

    def _save_to_disk(self, key: BlockKey, block: int) -> bool:
        if self._disk is None:
            return False
        self._kv_cache.read_blocks([block], self._staging)
        self._disk.put(key, self._staging)
        return True

    def _load_from_disk(self, key: BlockKey, block: int) -> bool:
        if self._disk is None or not self._disk.get(key, self._staging):
            return False
        self._kv_cache.write_blocks([block], self._staging)
        return True

    def _demote(self, key: BlockKey) -> bool:
        held = self._held(key)
        if self._disk is None or held is None:
            return False
        self._disk.put(key, held)
        # Had the slot been given away meanwhile, which the engine promises not to do, this would be a mixture.
        return self._held(key) is held

    def _held(self, key: BlockKey) -> Tensor | None:
        return self._host.get(key.digest) if self._host is not None else None

    def _drop(self, tier: Tier, digest: bytes) -> None:
        store = self._host if tier == Tier.HOST else self._disk
        if store is not None:
            store.drop(digest)
