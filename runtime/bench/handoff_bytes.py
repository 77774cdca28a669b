"""The bytes of a handoff on loopback: a prompt's KV from one process to another, against a bare stream of grpcio.

``bare`` is a client stream with as many bytes in messages of the same size, and nothing done with them. The other ways
gather from paged blocks, add and verify checksums, and scatter to paged blocks.
"""

from __future__ import annotations

import itertools
import multiprocessing
import queue
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import grpc
import numpy as np
import torch
from tqdm import tqdm

from headwise.workers.errors import HeadwiseError
from headwise.workers.kv.cache import KVCache
from headwise.workers.kv.chunk import OVERHEAD_BYTES, PAYLOAD_BYTES
from headwise.workers.kv.handoff import Fence, HandoffJob, HandoffOp, HandoffSpec, KvEndpoint
from headwise.workers.kv.handoff_rank import HandoffRank
from headwise.workers.kv.transfer import TransferResult

BARE, GRPC, SHARED_MEMORY = WAYS = ("bare", "grpc", "shared memory")
BLOCK_SIZE = 16
TIMEOUT_S = 60.0


class LostBytesError(HeadwiseError):
    """Not everything has arrived; the message says why."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the KV that travels: that of so many tokens of a model, in float32."""

    tokens: int
    layers: int
    kv_heads: int
    head_dim: int


def measure(shape: Shape, repeats: int, bar: tqdm[Any]) -> tuple[int, dict[str, list[float]]]:
    """The bytes, and by way the seconds until the other process has them; the ways take turns.

    Raises:
        LostBytesError: bytes were lost on the way.
    """
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with sender(shape) as pushing:
        for repeat in range(repeats + 1):
            for way in WAYS:
                took = pushing.push(way)
                if repeat:  # the first warms up
                    seconds[way].append(took)
                    bar.update()
        return pushing.num_bytes, seconds


def rates(num_bytes: int, seconds: dict[str, list[float]]) -> dict[str, float]:
    """GB/s by way: the median."""
    return {way: num_bytes / median(each) / 1e9 for way, each in seconds.items()}


@contextmanager
def sender(shape: Shape, beside: Callable[[str], Any] | None = None) -> Iterator[Sender]:
    """A rank of prefill here, and one of decode in a process of its own.

    Args:
        beside: what else that process can be asked for; its argument is what :meth:`Sender.ask` is given.
    """
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    receiver = spawn.Process(target=_receive, args=(there, shape, beside), daemon=True)
    receiver.start()
    there.close()
    try:
        made = Sender(shape, here)
        try:
            yield made
        finally:
            made.close()
    finally:
        here.close()
        receiver.join(5)
        receiver.kill()
        receiver.join()


class Sender:
    """The rank of prefill, and the one that tells the rank of decode what to do."""

    def __init__(self, shape: Shape, receiver: Connection) -> None:
        self._receiver = receiver
        address, bare, host_id = receiver.recv()
        self._results: queue.SimpleQueue[TransferResult] = queue.SimpleQueue()
        self._cache = _cache(shape)
        self._blocks = np.random.default_rng(1).permutation(self._cache.num_blocks).tolist()
        self.num_bytes = self._cache.nbytes
        heads = (0, shape.kv_heads)
        self._ends = {SHARED_MEMORY: KvEndpoint(heads, address, host_id), GRPC: KvEndpoint(heads, address)}
        self._rank = HandoffRank(self._cache, [heads], 0, HandoffSpec(), self._results.put, _raise)
        self._channel = grpc.insecure_channel(bare, [("grpc.max_send_message_length", -1)])
        self._bare: Any = self._channel.stream_unary("/bare/Push", request_serializer=None, response_deserializer=None)
        starts = range(0, self.num_bytes, PAYLOAD_BYTES)
        self._messages = [secrets.token_bytes(min(PAYLOAD_BYTES, self.num_bytes - start)) for start in starts]
        self._numbers = itertools.count()

    def push(self, way: str) -> float:
        """Seconds until the other process has everything.

        Raises:
            LostBytesError: it has not.
        """
        if way == BARE:
            start = time.perf_counter()
            self._bare(iter(self._messages), timeout=TIMEOUT_S)
            return time.perf_counter() - start
        number = next(self._numbers)
        fence = Fence(secrets.token_bytes(16), 1, 1, number, secrets.token_bytes(32))
        self.ask("open", fence)
        job = HandoffJob(
            number, HandoffOp.PUSH, fence, self._blocks, destinations=[self._ends[way]], timeout_s=TIMEOUT_S
        )
        start = time.perf_counter()
        self._rank.submit(job)
        result = self._results.get(timeout=TIMEOUT_S)
        seconds = time.perf_counter() - start
        error = result.error or self.ask("fill", fence)
        if error or result.num_bytes != self.num_bytes:
            raise LostBytesError(error or f"{result.num_bytes} of {self.num_bytes} bytes have arrived")
        return seconds

    def ask(self, what: str, argument: object = None) -> Any:
        """Has the other process do something; returns its answer."""
        self._receiver.send((what, argument))
        return self._receiver.recv()

    def close(self) -> None:
        self._rank.close()
        self._channel.close()


def _receive(sender: Connection, shape: Shape, beside: Callable[[str], Any] | None) -> None:
    """The process of the rank of decode."""
    results: queue.SimpleQueue[TransferResult] = queue.SimpleQueue()
    cache, heads = _cache(shape), (0, shape.kv_heads)
    blocks = np.random.default_rng(2).permutation(cache.num_blocks).tolist()
    jobs = {"open": (HandoffOp.OPEN, blocks, [heads]), "fill": (HandoffOp.FILL, [], [])}
    rank = HandoffRank(cache, [heads], 0, HandoffSpec(receives=True), results.put, _raise)
    server, bare = _bare_server()
    endpoint = rank.endpoint()
    assert endpoint is not None
    sender.send((endpoint[2], bare, endpoint[3]))
    try:
        while True:
            what, fence = sender.recv()
            if what in jobs:
                op, into, sources = jobs[what]
                rank.submit(HandoffJob(0, op, fence, into, sources=sources))
                sender.send(results.get(timeout=TIMEOUT_S).error)
            else:
                assert beside is not None, what
                sender.send(beside(what))
    except EOFError:
        rank.close()
        server.stop(None)


def _bare_server() -> tuple[grpc.Server, str]:
    def count(messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        return b"%d" % sum(map(len, messages))

    handler: Any = grpc.stream_unary_rpc_method_handler(count)
    options = [("grpc.max_receive_message_length", PAYLOAD_BYTES + OVERHEAD_BYTES)]
    server = grpc.server(ThreadPoolExecutor(2), options=options)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", {"Push": handler}),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    return server, address


def _cache(shape: Shape) -> KVCache:
    """As the CPU backend has it, keys transposed."""
    blocks = -(-shape.tokens // BLOCK_SIZE)
    cache = KVCache(shape.layers, blocks, shape.kv_heads, BLOCK_SIZE, shape.head_dim, torch.float32, "cpu", True)
    cache.keys.normal_()
    cache.values.normal_()
    return cache


def _raise(error: BaseException) -> None:
    raise error
