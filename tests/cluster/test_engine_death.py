"""An engine's process that is killed: within seconds its ranks, its places in Ray, its sockets and its shared memory
are gone, whatever it was doing."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from headwise.cluster.engine_watch import EngineProcess, EngineWatch
from headwise.runtime import LLM
from headwise.workers.processes import ProcessId

START_S = 120.0
GONE_S = 10.0
"""The promise."""

DRIVER = """
import os, signal, sys, time
from headwise.cluster.ray_ranks import RayRanks
from headwise.runtime import LLM, SamplingParams

def tell(pids):
    print("ranks", *pids, flush=True)
    time.sleep(600)

def pids_of(ranks):
    return [place["pid"] for place in ranks._places]

def stop_after_creation(ranks, progress):
    tell(pids_of(ranks))

def stop_while_ranks_meet(ranks, progress):
    [first, _] = ranks._actors
    meeting = ranks._wait([first.open_rendezvous.remote(ranks._collectives(), ranks.nodes[0])])[0]
    first.load.remote(ranks._channel.endpoint(0), meeting, 600.0, [0, 1], [place["process"] for place in ranks._places])
    tell(pids_of(ranks))

if __name__ == "__main__":
    moment, model = sys.argv[1:]
    if moment == "created":
        RayRanks.load = stop_after_creation
    if moment == "meeting":
        RayRanks.load = stop_while_ranks_meet
    settings = {"prefill": {"tensor_parallel_size": 1, "cpus_per_rank": 0.5}} if moment == "handoff" else {}
    settings |= {"warm_spare": True} if moment == "spare" else {}
    llm = LLM(model, tensor_parallel_size=2, kv_memory="64MiB", cpus_per_rank=0.5, quiet=True, **settings)
    pids = llm.stats()["shard_pids"]
    if moment == "recovering":
        RayRanks.load = stop_while_ranks_meet
        os.kill(pids[1], signal.SIGKILL)
        time.sleep(600)
    if moment == "spare":
        while llm.stats()["recoveries"]["spare"] != "ready":
            time.sleep(0.1)
        pids += pids_of(llm._loop._recovery._spare.group._ranks)
    if moment == "step":
        params = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)
        next(llm.stream([5, 6, 7], params))
        print("ranks", *pids, flush=True)
        while True:
            llm.generate([5, 6, 7], params)
    tell(pids)
"""


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@dataclasses.dataclass
class Driver:
    """A process with an engine, and those of its ranks."""

    process: subprocess.Popen[str]
    ranks: list[psutil.Process]
    left_before: set[str]

    def kill(self) -> None:
        """Kills the engine's process, and checks the promise."""
        left = left_over() - self.left_before
        assert left
        self.process.kill()
        self.process.wait(GONE_S)
        deadline = time.monotonic() + GONE_S
        while alive(self.ranks) or left & left_over():
            assert time.monotonic() < deadline, (alive(self.ranks), left & left_over())
            threading.Event().wait(0.02)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def left_over() -> set[str]:
    return {f"{folder}/{name}" for folder in ("/dev/shm", "/tmp") for name in os.listdir(folder) if "headwise" in name}


@contextmanager
def driver(moment: str, model: Path, address: str | None) -> Iterator[Driver]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "TMPDIR")}
    environment |= {"RAY_ADDRESS": address} if address is not None else {}
    before = left_over()
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, moment, str(model)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            # Ray tells of ranks that die, too.
            [pids] = itertools.islice((line.split()[1:] for line in process.stdout if line.startswith("ranks")), 1)
            yield Driver(process, [psutil.Process(int(pid)) for pid in pids], before)
        finally:
            process.kill()


def test_a_process_that_cannot_be_seen_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("ended"))
    elsewhere = EngineProcess(dataclasses.replace(ProcessId.of(os.getpid()), pid=1 << 22, place="another host"), "/tmp")
    before = threading.active_count()
    EngineWatch(elsewhere, lambda: pytest.fail("left"))
    assert threading.active_count() == before


@pytest.mark.parametrize(
    "moment",
    # The ranks of a group that follows another meet as those of the first do.
    ["step", *map(slow, ("recovering", "created", "meeting", "idle", "handoff", "spare"))],
)
def test_of_a_driver_that_joined_a_ray(checkpoint: Callable[..., Path], one_ray: str, moment: str) -> None:
    with driver(moment, checkpoint("uneven"), one_ray) as it:
        it.kill()
    deadline = time.monotonic() + GONE_S
    while {group["state"] for group in ray.util.placement_group_table().values()} - {"REMOVED"}:
        assert time.monotonic() < deadline
        threading.Event().wait(0.05)


@pytest.mark.parametrize(
    "moment",
    # A rank that computes there is killed in a test below, too, beside one that hangs.
    [*map(slow, ("step", "created", "meeting", "idle", "handoff", "recovering", "spare"))],
)
def test_of_a_driver_with_a_ray_of_its_own(checkpoint: Callable[..., Path], moment: str) -> None:
    with driver(moment, checkpoint("uneven"), None) as it:
        it.kill()


@pytest.mark.parametrize(
    ("joined", "stopped"), [slow(False, [1]), slow(False, [0, 1]), slow(True, [1]), slow(True, [0, 1])]
)
def test_a_rank_that_hangs_does_not_outlive_its_engine(
    checkpoint: Callable[..., Path], request: pytest.FixtureRequest, joined: bool, stopped: list[int]
) -> None:
    address = request.getfixturevalue("one_ray") if joined else None
    with driver("step", checkpoint("uneven"), address) as it:
        for rank in stopped:
            it.ranks[rank].send_signal(signal.SIGSTOP)
        it.kill()


def test_what_is_left_over_goes_with_the_next_engine(checkpoint: Callable[..., Path]) -> None:
    """Of one that was killed with all of its ranks, a second before."""
    folder = Path(tempfile.mkdtemp(prefix="headwise-", dir="/tmp"))
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(folder / "plans-0"))
    with LLM(checkpoint("uneven"), executor="local", kv_memory="64MiB", quiet=True):
        assert not folder.exists()
