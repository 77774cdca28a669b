"""What must hold of an engine once its requests are done, and of the machine once it is closed."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterable
from typing import Any

import psutil

from headwise.runtime.engine.engine import Engine
from headwise.runtime.llm import LLM
from headwise.workers.errors import HeadwiseError

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


def check_processes(llm: LLM, pids: Iterable[tuple[int, float]], spares: int, deadline_s: float) -> list[str]:
    """Ranks of earlier groups that are still there.

    Args:
        pids: of all ranks that there were, with the times of their creation.
        spares: ranks that wait to take over.
    """
    if llm.config.executor == "local":
        return []
    now = set(llm.stats()["shard_pids"])
    old = [(pid, born) for pid, born in pids if pid not in now]
    problems = _alive(old, deadline_s)
    expected = llm.config.tensor_parallel_size + spares
    actors = [one for one in in_ray() if one.startswith("actor")]
    if len(actors) > expected:
        problems.append(f"{len(actors)} ranks where {expected} were due: {', '.join(actors)}")
    return problems


def check_closed(pids: Iterable[tuple[int, float]], before: set[str], deadline_s: float) -> list[str]:
    """What an engine that is closed has left behind.

    Args:
        before: what :func:`leftovers` gave before it was started.
    """
    problems = _alive(pids, deadline_s)
    deadline = time.monotonic() + deadline_s
    while (left := (leftovers() - before) | set(in_ray())) and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
    return problems + [f"{one} is left" for one in sorted(left)]


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


def _alive(pids: Iterable[tuple[int, float]], deadline_s: float) -> list[str]:
    found: list[Any] = []
    for pid, born in pids:
        try:
            process = psutil.Process(pid)
            if process.create_time() == born:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(found, timeout=deadline_s)
    return [f"process {process.pid} of a rank is still there" for process in alive]
