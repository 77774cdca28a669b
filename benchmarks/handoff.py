"""What Python's lock costs where KV arrives: a loop like that of decode runs in the receiver's process and, for
comparison, in one of its own, while blocks arrive. What it loses more in the receiver's is the lock's.

    python benchmarks/handoff.py [--tokens 1024] [--layers 30] [--kv-heads 3] [--head-dim 64] [--repeats 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from headwise.runtime.bench.handoff_bytes import GRPC, SHARED_MEMORY, Sender, Shape, sender

LOOP_S = 2.0

Ask = Callable[[str], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    args = parser.parse_args()
    with sender(Shape(args.tokens, args.layers, args.kv_heads, args.head_dim), beside=answer) as pushing:
        steps = {way: interference(pushing, way, args.repeats) for way in (GRPC, SHARED_MEMORY)}
    if args.json:
        print(json.dumps({"benchmark": "handoff lock", **vars(args), "steps_left": steps}))
        return
    for way, (kept, beside) in steps.items():
        print(f"{way:<14} leaves a loop {kept:.2f} of its steps in the receiver's process, {beside:.2f} in its own")


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


looping: list[Loop] = []


def answer(what: str) -> float | None:
    """Starts a loop in this process, or ends it."""
    if what == "loop":
        looping.append(Loop())
        return None
    return looping.pop().end()


def interference(pushing: Sender, way: str, repeats: int) -> tuple[float, float]:
    """What a loop keeps of its steps while blocks arrive: in the receiver's process, and in one of its own."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=loop_alone, args=(there,), daemon=True)
    process.start()

    def elsewhere(what: str) -> Any:
        here.send(what)
        return here.recv()

    kept = []
    for ask in (pushing.ask, elsewhere):
        ratios = []
        for _ in range(repeats):
            quiet = rate_of(ask, lambda: time.sleep(0.1))
            ratios.append(rate_of(ask, lambda: pushing.push(way)) / quiet)
        kept.append(round(statistics.median(ratios), 3))
    here.close()
    process.join(5)
    return kept[0], kept[1]


def loop_alone(asked: Connection) -> None:
    try:
        while True:
            asked.send(answer(asked.recv()))
    except EOFError:
        pass


def rate_of(ask: Ask, meanwhile: Callable[[], object]) -> float:
    ask("loop")
    end = time.perf_counter() + LOOP_S
    while time.perf_counter() < end:
        meanwhile()
    rate: float = ask("end")
    return rate


if __name__ == "__main__":
    main()
