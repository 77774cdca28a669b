"""Moves KV blocks between the device and the tiers below it, on threads beside the steps."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import torch
from torch import Tensor

from headwise.workers import failpoints
from headwise.workers.failpoints import Point
from headwise.workers.kv.cache import KVCache
from headwise.workers.kv.store import DiskStore, HostStore
from headwise.workers.kv.transfer import BlockKey, Op, Tier, TransferJob, TransferResult

Move = tuple[BlockKey, int]
"""What is moved, and the device block; that is -1 where the device has no part in it."""

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
            moves = list(zip(job.keys, job.blocks if moves_device else [-1] * len(job.keys), strict=True))
            # A disk is what is waited for there, so its blocks go one by one.
            size = self._kv_cache.blocks_at_once if moves_device and job.tier == Tier.HOST else 1
            for start in range(0, len(moves), size):
                if self._abandoned.is_set():
                    break
                part = moves[start : start + size]
                try:
                    failed += self._move(job.op, job.tier, part)
                except OSError:
                    failed += [key.digest for key, _ in part]
        except Exception as error:
            _logger.error(
                "KV transfer job %d (%s, %s) failed: %s: %s", job.id, job.op.name, job.tier, type(error).__name__, error
            )
            failed = [key.digest for key in job.keys]
        if job.op in (Op.SAVE, Op.DEMOTE):
            for digest in failed:
                self._drop(job.tier, digest)
        return failed

    def _move(self, op: Op, tier: Tier, moves: Sequence[Move]) -> list[bytes]:
        """The digests that were not moved.

        Raises:
            OSError: the disk cannot be written.
        """
        if op == Op.DROP:
            for key, _ in moves:
                self._drop(tier, key.digest)
            return []
        if failpoints.ENABLED:
            for _ in moves:
                failpoints.hit(Point.KV_COPY)
        if op == Op.DEMOTE:
            return [key.digest for key, _ in moves if not self._demote(key)]
        if tier == Tier.HOST:
            return self._save_to_host(moves) if op == Op.SAVE else self._load_from_host(moves)
        move = self._save_to_disk if op == Op.SAVE else self._load_from_disk
        return [key.digest for key, block in moves if not move(key, block)]

    def _save_to_host(self, moves: Sequence[Move]) -> list[bytes]:
        digests, blocks = [key.digest for key, _ in moves], [block for _, block in moves]
        if self._host is None:
            return digests
        self._host.put(digests, lambda slots: self._kv_cache.read_blocks(blocks, slots))
        return []

    def _load_from_host(self, moves: Sequence[Move]) -> list[bytes]:
        found = [(block, held) for key, block in moves if (held := self._held(key)) is not None]
        self._kv_cache.write_blocks([block for block, _ in found], [held for _, held in found])
        return [key.digest for key, _ in moves if self._held(key) is None]

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
