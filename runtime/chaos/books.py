"""What must hold of an engine once its requests are done, and of the machine once it is closed."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from headwise.runtime.engine.engine import Engine
from headwise.runtime.llm import LLM
from headwise.workers.errors import HeadwiseError
from headwise.workers.failpoints import VARIABLE
from headwise.workers.processes import ProcessId

_LOOK_S = 0.05
_PREFIX = "headwise-"
"""Of shared memory and of folders for sockets."""


def check_engine(llm: LLM, deadline_s: float) -> list[str]:
    """What is wrong with the books of an engine with nothing to do; looked at again until the deadline, for blocks are
    given back a little after the last token."""
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            problems = llm._loop.submit(_problems).result(deadline_s)
        except (HeadwiseError, TimeoutError) as error:
            return [f"the engine does not answer: {type(error).__name__}: {error}"]
        if not problems or time.monotonic() > deadline:
            return problems
        time.sleep(_LOOK_S)


def check_processes(llm: LLM, processes: Iterable[ProcessId], spares: int, deadline_s: float) -> list[str]:
    """Ranks of earlier groups that are still there.

    Args:
        processes: of all ranks that there were.
        spares: ranks that wait to take over.
    """
    if llm.config.executor == "local":
        return []
    now = {ProcessId(**shard["process"]) for shard in llm.stats()["shards"]}
    problems = _alive(set(processes) - now, deadline_s)
    expected = llm.config.tensor_parallel_size + spares
    actors = [one for one in in_ray() if one.startswith("actor")]
    if len(actors) > expected:
        problems.append(f"{len(actors)} ranks where {expected} were due: {', '.join(actors)}")
    return problems


def check_closed(folder: Path, before: set[str], deadline_s: float) -> list[str]:
    """What an engine that is closed has left behind.

    Args:
        folder: of the failpoints; every process that the engine has started has it in its environment.
        before: what :func:`leftovers` gave before it was started.
    """
    deadline = time.monotonic() + deadline_s
    while (left := (leftovers() - before) | set(in_ray()) | _with(folder)) and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
    return [f"{one} is left" for one in sorted(left)]


def in_ray() -> list[str]:
    """The actors and placement groups of this program; none without Ray."""
    if "ray" not in sys.modules:  # which may not be installed
        return []
    from headwise.cluster import ray_session

    return ray_session.living()


def leftovers() -> set[str]:
    """Shared memory and folders of sockets, also of other engines on this machine."""
    found = set()
    for folder in {"/dev/shm", "/tmp", tempfile.gettempdir()}:
        if os.path.isdir(folder):
            found |= {f"{folder}/{name}" for name in os.listdir(folder) if name.startswith(_PREFIX)}
    return found


def _problems(engine: Engine) -> list[str]:
    if engine.rebuilding:  # it has no books
        return ["the shards are dead, and others are started"]
    engine.generation.pins.expire()
    stats, problems = engine.stats(), []
    pinned = stats["prefix_cache"]["pinned_blocks"]
    for name in ("num_running", "num_waiting"):
        if stats[name]:
            problems.append(f"{name} is {stats[name]} where nothing runs")
    if stats["num_free_blocks"] + pinned != stats["num_blocks"]:
        problems.append(f"{stats['num_free_blocks']} of {stats['num_blocks']} blocks are free, and {pinned} are pinned")
    if engine.generation.ledger.busy:
        problems.append("jobs of the tiers are not done")
    if not problems:
        engine.check_integrity()
    return problems


def _alive(processes: Iterable[ProcessId], deadline_s: float) -> list[str]:
    deadline = time.monotonic() + deadline_s
    while (alive := [one.pid for one in processes if one.is_alive()]) and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
    return [f"process {pid} of a rank is still there" for pid in alive]


def _with(folder: Path) -> set[str]:
    """The processes that were started with these failpoints."""
    mark, found = f"{VARIABLE}={folder}\0".encode(), set()
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if mark in Path(f"/proc/{process.pid}/environ").read_bytes():
                found.add(f"process {process.pid} ({process.name()})")
    return found
