"""The data plane of a handoff on loopback: a prompt's KV from one process to another, each way against a bare stream.

    python benchmarks/handoff.py [--tokens 1024] [--layers 30] [--kv-heads 3] [--head-dim 64] [--repeats 5] [--json]

"bare" is a client stream of grpcio with as many bytes in messages of the same size, and nothing done with them; "grpc"
and "shared memory" gather from paged blocks, add and verify checksums, and scatter to paged blocks. The ways take
turns; each number is a median. Then a loop like that of decode runs in the receiver's process and, for comparison, in
one of its own, while blocks arrive: what it loses more in the receiver's is what Python's lock costs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import queue
import secrets
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import grpc
import numpy as np
import torch

from headwise.workers.kv.cache import KVCache
from headwise.workers.kv.chunk import OVERHEAD_BYTES, PAYLOAD_BYTES
from headwise.workers.kv.handoff import Fence, HandoffJob, HandoffOp, HandoffSpec, KvEndpoint
from headwise.workers.kv.handoff_rank import HandoffRank
from headwise.workers.kv.transfer import TransferResult

BLOCK_SIZE = 16
TIMEOUT_S = 60.0
LOOP_S = 2.0

Answer = tuple[str, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    receiver = spawn.Process(target=receive, args=(there, args), daemon=True)
    receiver.start()
    try:
        result = measure(Sender(args, here), args)
    finally:
        here.close()
        receiver.join(5)
        receiver.kill()
    if args.json:
        print(json.dumps({"benchmark": "handoff", **vars(args), "grpcio": grpc.__version__, **result}))


class Sender:
    """The rank of prefill, and the one that tells the rank of decode what to do."""

    def __init__(self, args: argparse.Namespace, receiver: Connection) -> None:
        self._receiver = receiver
        address, bare, host_id = receiver.recv()
        self._results: queue.SimpleQueue[TransferResult] = queue.SimpleQueue()
        self._cache = make_cache(args)
        self._blocks = np.random.default_rng(1).permutation(self._cache.num_blocks).tolist()
        self.num_bytes = self._cache.nbytes
        heads = (0, args.kv_heads)
        self._ends = {"shared memory": KvEndpoint(heads, address, host_id), "grpc": KvEndpoint(heads, address)}
        self._rank = HandoffRank(self._cache, [heads], 0, HandoffSpec(), self._results.put, raise_)
        self._channel = grpc.insecure_channel(bare, [("grpc.max_send_message_length", -1)])
        self._bare: Any = self._channel.stream_unary("/bare/Push", request_serializer=None, response_deserializer=None)
        starts = range(0, self.num_bytes, PAYLOAD_BYTES)
        self._messages = [secrets.token_bytes(min(PAYLOAD_BYTES, self.num_bytes - start)) for start in starts]
        self._numbers = itertools.count()

    def push(self, way: str) -> float:
        """Seconds until the other end has everything."""
        if way == "bare":
            start = time.perf_counter()
            self._bare(iter(self._messages))
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
        if result.error or result.num_bytes != self.num_bytes or self.ask("fill", fence):
            raise RuntimeError(result.error or "not everything has arrived")
        return seconds

    def ask(self, what: str, argument: object = None) -> Any:
        self._receiver.send((what, argument))
        return self._receiver.recv()


def receive(sender: Connection, args: argparse.Namespace) -> None:
    """The process of the rank of decode."""
    results: queue.SimpleQueue[TransferResult] = queue.SimpleQueue()
    cache = make_cache(args)
    blocks = np.random.default_rng(2).permutation(cache.num_blocks).tolist()
    rank = HandoffRank(cache, [(0, args.kv_heads)], 0, HandoffSpec(receives=True), results.put, raise_)
    server, bare = bare_server()
    endpoint = rank.endpoint()
    assert endpoint is not None
    sender.send((endpoint[2], bare, endpoint[3]))
    jobs = {"open": (HandoffOp.OPEN, blocks, [(0, args.kv_heads)]), "fill": (HandoffOp.FILL, [], [])}
    looping: list[Loop] = []
    try:
        while True:
            what, fence = sender.recv()
            if what in jobs:
                op, places, sources = jobs[what]
                rank.submit(HandoffJob(0, op, fence, places, sources=sources))
                sender.send(results.get(timeout=TIMEOUT_S).error)
            elif what == "loop":
                looping.append(Loop())
                sender.send(None)
            else:
                sender.send(looping.pop().end())
    except EOFError:
        rank.close()
        server.stop(None)


class Loop(threading.Thread):
    """Like decode's: some Python, and one call that computes without Python's lock; counts what it gets done."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._ended, self._steps, self._begun = threading.Event(), 0, time.perf_counter()
        self.start()

    def run(self) -> None:
        weights, vector = np.ones((4096, 576), np.float32), np.ones((576, 8), np.float32)
        while not self._ended.is_set():
            for _ in range(8):
                weights @ vector
            sum(number & 3 for number in range(10_000))
            self._steps += 1

    def end(self) -> float:
        """Steps in a second."""
        self._ended.set()
        self.join()
        return self._steps / (time.perf_counter() - self._begun)


def bare_server() -> tuple[grpc.Server, str]:
    from concurrent.futures import ThreadPoolExecutor

    def count(messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        return b"%d" % sum(map(len, messages))

    handler: Any = grpc.stream_unary_rpc_method_handler(count)
    options = [("grpc.max_receive_message_length", PAYLOAD_BYTES + OVERHEAD_BYTES)]
    server = grpc.server(ThreadPoolExecutor(2), options=options)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", {"Push": handler}),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    return server, address


def make_cache(args: argparse.Namespace) -> KVCache:
    """As the CPU backend has it, keys transposed."""
    blocks = -(-args.tokens // BLOCK_SIZE)
    cache = KVCache(args.layers, blocks, args.kv_heads, BLOCK_SIZE, args.head_dim, torch.float32, "cpu", True)
    cache.keys.normal_()
    cache.values.normal_()
    return cache


def measure(sender: Sender, args: argparse.Namespace) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"bare": [], "grpc": [], "shared memory": []}
    for repeat in range(args.repeats + 1):
        for way, measured in seconds.items():
            took = sender.push(way)
            if repeat:
                measured.append(took)
    rates = {way: sender.num_bytes / statistics.median(measured) / 1e9 for way, measured in seconds.items()}
    say(f"{sender.num_bytes / 1e6:.0f} MB, medians of {args.repeats}")
    for way, rate in rates.items():
        say(f"{way:<14} {rate:6.2f} GB/s, {rate / rates['bare']:.2f} of bare")
    steps = {way: interference(sender, way, args.repeats) for way in ("grpc", "shared memory")}
    for way, (kept, beside) in steps.items():
        say(f"{way:<14} leaves a loop {kept:.2f} of its steps in the receiver's process, {beside:.2f} in its own")
    gb_per_s = {way: round(rate, 3) for way, rate in rates.items()}
    return {"bytes": sender.num_bytes, "gb_per_s": gb_per_s, "steps_left": steps}


def interference(sender: Sender, way: str, repeats: int) -> tuple[float, float]:
    """What a loop keeps of its steps while blocks arrive: in the receiver's process, and in one of its own."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=loop_alone, args=(there,), daemon=True)
    process.start()

    def elsewhere(what: str) -> Any:
        here.send(what)
        return here.recv()

    kept = []
    for ask in (sender.ask, elsewhere):
        ratios = []
        for _ in range(repeats):
            quiet = rate_of(ask, lambda: time.sleep(0.1))
            ratios.append(rate_of(ask, lambda: sender.push(way)) / quiet)
        kept.append(round(statistics.median(ratios), 3))
    here.close()
    process.join(5)
    return kept[0], kept[1]


def loop_alone(asked: Connection) -> None:
    looping: list[Loop] = []
    try:
        while True:
            if asked.recv() == "loop":
                looping.append(Loop())
                asked.send(None)
            else:
                asked.send(looping.pop().end())
    except EOFError:
        pass


def rate_of(ask: Callable[[str], Any], meanwhile: Callable[[], object]) -> float:
    ask("loop")
    end = time.perf_counter() + LOOP_S
    while time.perf_counter() < end:
        meanwhile()
    rate: float = ask("end")
    return rate


def raise_(error: BaseException) -> None:
    raise error


def say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
