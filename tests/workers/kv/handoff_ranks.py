"""Two groups of ranks that hand over KV, without engines: every rank is a HandoffRank on a cache of random content."""

from __future__ import annotations

import hashlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from headwise.workers.kv.cache import KVCache
from headwise.workers.kv.handoff import Fence, HandoffJob, HandoffOp, HandoffSpec, KvEndpoint, Range
from headwise.workers.kv.handoff_rank import HandoffRank
from headwise.workers.kv.kv_transport import GrpcTransport, SharedMemoryTransport
from headwise.workers.kv.transfer import TransferResult, decode_job, encode_job
from headwise.workers.model.partition import partition_heads

DEADLINE_S = 20.0
LAYERS, BLOCK, DIM = 3, 4, 8


def fence_of(number: int = 1, **changes: Any) -> Fence:
    name = hashlib.sha256(b"%d" % number).digest()
    return replace(Fence(name[:16], 1, 7, number, hashlib.sha256(name).digest()), **changes)


class Rank:
    """A rank, its cache, and the results of its jobs by the number of the job."""

    def __init__(
        self,
        heads: Sequence[Range],
        rank: int,
        spec: HandoffSpec,
        num_blocks: int,
        **form: Any,
    ) -> None:
        sizes: dict[str, Any] = {
            "num_layers": LAYERS,
            "block_size": BLOCK,
            "head_dim": DIM,
            "dtype": torch.float32,
        } | form
        self.heads = heads[rank]
        self.cache = KVCache(num_blocks=num_blocks, num_kv_heads=self.heads[1] - self.heads[0], **sizes)
        self.failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        self._results: dict[int, queue.SimpleQueue[TransferResult]] = {}
        self._numbers = itertools.count()
        self.handoff = HandoffRank(self.cache, heads, rank, spec, self._tell, self.failures.put)

    @property
    def endpoint(self) -> KvEndpoint:
        fields = self.handoff.endpoint()
        assert fields is not None
        return KvEndpoint(fields[:2], *fields[2:])

    def begin(self, op: HandoffOp, fence: Fence, **fields: Any) -> Callable[[], TransferResult]:
        """Submits a job, as it comes out of a message; what is returned waits for its result."""
        number = next(self._numbers)
        results = self._results[number] = queue.SimpleQueue()
        job = decode_job(encode_job(HandoffJob(number, op, fence, **fields)))
        assert isinstance(job, HandoffJob)
        self.handoff.submit(job)
        return lambda: results.get(timeout=DEADLINE_S)

    def run(self, op: HandoffOp, fence: Fence, **fields: Any) -> TransferResult:
        return self.begin(op, fence, **fields)()

    def content(self) -> Tensor:
        """[blocks, layers, 2, heads, block, dim], or [blocks, layers, bytes] of records"""
        content = torch.empty(self.cache.num_blocks, *self.cache.block_shape, dtype=self.cache.dtype)
        self.cache.read_blocks(range(self.cache.num_blocks), content)
        return content

    def numbers(self) -> Tensor:
        """The same as attention reads it."""
        cache, blocks = self.cache, torch.arange(self.cache.num_blocks)
        layers = [torch.stack(cache.gather(i, blocks, len(blocks) * BLOCK)) for i in range(cache.num_layers)]
        kv_L2KCD = torch.stack(layers)
        return kv_L2KCD.view(*kv_L2KCD.shape[:3], -1, BLOCK, cache.head_dim).permute(3, 0, 1, 2, 4, 5)

    def fill(self, kv_NL2KSD: Tensor) -> None:
        """Puts numbers into all blocks."""
        for layer in range(self.cache.num_layers):
            k_TKD, v_TKD = kv_NL2KSD[:, layer].permute(1, 0, 3, 2, 4).flatten(1, 2)
            self.cache.write(layer, k_TKD, v_TKD, torch.arange(len(k_TKD)))

    def _tell(self, result: TransferResult) -> None:
        self._results[result.id].put(result)


class Group:
    """The ranks of a model with so many query and KV heads; the KV of a head is the same wherever it is held."""

    def __init__(
        self,
        heads: tuple[int, int],
        tp: int,
        spec: HandoffSpec,
        num_blocks: int = 12,
        seed: int = 0,
        **form: Any,
    ) -> None:
        self.heads = [(shard.kv_start, shard.kv_stop) for shard in partition_heads(*heads, tp)]
        self.ranks = [Rank(self.heads, rank, spec, num_blocks, **form) for rank in range(tp)]
        cache = self.ranks[0].cache
        shape = (num_blocks, cache.num_layers, 2, heads[1], cache.block_size, cache.head_dim)
        self.content = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        if not cache.format.quantised:
            self.content = self.content.to(cache.dtype)
        for rank in self.ranks:
            rank.fill(self.content[:, :, :, slice(*rank.heads)])

    @property
    def endpoints(self) -> list[KvEndpoint]:
        return [rank.endpoint for rank in self.ranks]

    def begin(self, op: HandoffOp, fence: Fence, **fields: Any) -> Callable[[], list[TransferResult]]:
        waits = [rank.begin(op, fence, **fields) for rank in self.ranks]
        return lambda: [wait() for wait in waits]

    def run(self, op: HandoffOp, fence: Fence, **fields: Any) -> list[TransferResult]:
        return self.begin(op, fence, **fields)()

    def close(self) -> None:
        for rank in self.ranks:
            assert rank.handoff.close() and rank.failures.empty()


@contextmanager
def groups(
    heads: tuple[int, int] = (9, 3),
    tp: tuple[int, int] = (1, 1),
    shared_memory: bool = False,
    transposed: tuple[bool, bool] = (False, False),
    **form: Any,
) -> Iterator[tuple[Group, Group]]:
    """A group that sends and one that receives; nothing of them is left afterwards.

    Args:
        transposed: how either keeps its keys.
        form: of the caches of both.
    """
    before = set(threading.enumerate())
    made: list[Group] = []
    try:
        specs = HandoffSpec(shared_memory=shared_memory), HandoffSpec(True, shared_memory=shared_memory)
        for side, spec in enumerate(specs):
            made.append(Group(heads, tp[side], spec, seed=side, transposed_keys=transposed[side], **form))
        yield made[0], made[1]
    finally:
        for group in made:
            group.close()
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("headwise"):
            thread.join(DEADLINE_S)
            assert not thread.is_alive(), thread.name


def cut_chunks(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """To so many bytes, or to a layer of a block: a few blocks are then several messages."""
    for transport in (GrpcTransport, SharedMemoryTransport):
        monkeypatch.setattr(transport, "chunk_bytes", most)


def ok(results: list[TransferResult]) -> bool:
    return [result.error for result in results] == [""] * len(results)
