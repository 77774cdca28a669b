"""Time of one all-reduce between two processes of this machine, over shared memory and, for comparison, over Gloo.

    python benchmarks/all_reduce.py [--world-size 2] [--seconds 1.0] [--kinds shared_memory,gloo]

The shapes are rows of SmolLM2-135M's hidden size, 576 float32. Prints a table and, as its last line, the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from headwise.workers.collectives import Collectives, connect, open_rendezvous
from headwise.workers.machine import usable_cores

HIDDEN = 576
ROWS = (1, 8, 32, 128, 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each shape")
    parser.add_argument("--kinds", default="shared_memory,gloo")
    arguments = parser.parse_args()
    results = [
        result for kind in arguments.kinds.split(",") for result in run(kind, arguments.world_size, arguments.seconds)
    ]
    console = Console()
    table = Table(
        "transport", "tensor", "p50", "p90", "p99", "per rank", title=f"all-reduce, {arguments.world_size} ranks"
    )
    for r in results:
        times = [f"{r[key]:.1f} µs" for key in ("p50_us", "p90_us", "p99_us")]
        table.add_row(r["kind"], f"{r['rows']}x{HIDDEN} float32", *times, f"{r['gb_per_s']:.2f} GB/s")
    console.print(table)
    machine = {"cores": usable_cores(), "torch": torch.__version__}
    print(json.dumps({"benchmark": "all_reduce", "world_size": arguments.world_size, "results": results, **machine}))


def run(kind: str, world_size: int, seconds: float) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe()
        process = context.Process(target=rank_main, args=(theirs, kind, rank, world_size, seconds), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    published = pipes[0].recv()
    for pipe in pipes[1:]:
        pipe.send(published)
    results: list[dict[str, Any]] = pipes[0].recv()
    for process in processes:
        process.join()
    return results


def rank_main(pipe: Connection, kind: str, rank: int, world_size: int, seconds: float) -> None:
    torch.set_num_threads(1)
    rendezvous = open_rendezvous(kind, world_size) if rank == 0 else pipe.recv()
    if rank == 0:
        pipe.send(rendezvous.publish())
    group = connect(rendezvous, rank, world_size)
    results = [measure(group, kind, rows, seconds) for rows in ROWS]
    if rank == 0:
        pipe.send(results)
    group.barrier()
    group.close()


def measure(group: Collectives, kind: str, rows: int, seconds: float) -> dict[str, Any]:
    x = torch.zeros(rows, HIDDEN)
    times: list[float] = []
    go_on = torch.ones(1)
    while go_on[0]:
        for _ in range(100):
            start = time.perf_counter()
            group.all_reduce_(x)
            times.append(time.perf_counter() - start)
        go_on[0] = float(sum(times) < seconds)
        group.broadcast_(go_on)
    times = times[len(times) // 10 :]
    p50, p90, p99 = (statistics.quantiles(times, n=100)[p - 1] * 1e6 for p in (50, 90, 99))
    rate = x.nbytes / p50 / 1e3
    return {"kind": kind, "rows": rows, "p50_us": p50, "p90_us": p90, "p99_us": p99, "gb_per_s": rate}


if __name__ == "__main__":
    main()
