"""What the nodes of a Ray cluster say of themselves, for whoever looks for what is wrong with them."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from headwise.cluster import ray_session
from headwise.cluster.ray_watcher import first_lines
from headwise.workers.leftovers import shared_memory_folder

VISIT_TIMEOUT_S = 60.0
"""For every node to start a process and answer."""

PACKAGES = ("headwise", "torch", "numba", "numpy", "msgpack", "pyzmq")
"""That ranks on all nodes and their engine have to have in one version: Ray itself sees to its own and to Python's."""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """
    Attributes:
        address: by which other nodes know it.
        cpus, gpus: that Ray gives out there.
        problem: why the node does not answer; empty if it does. What follows is known of a node that answers.
        versions: of PACKAGES that it has.
        clock_ahead_s, clock_sure_to_s: how far its clock is ahead of this process's, and by how much that may be wrong.
        shared_memory_bytes: that are free there.
        open_files: how many each of its processes may have; -1 is no limit.
    """

    address: str
    cpus: float
    gpus: float
    problem: str = ""
    versions: dict[str, str] | None = None
    clock_ahead_s: float = 0.0
    clock_sure_to_s: float = 0.0
    shared_memory_bytes: int = 0
    open_files: int = 0


def visit_nodes(address: str | None, timeout_s: float = VISIT_TIMEOUT_S) -> list[NodeFacts]:
    """Joins the cluster, as :func:`~headwise.cluster.ray_session.join`, and asks each node that is alive.

    Raises:
        GroupStartError: no Ray answers there, or it does not let this process in.
    """
    ray_session.join(address)
    try:
        deadline = time.monotonic() + timeout_s
        nodes = [node for node in ray.nodes() if node["Alive"]]
        # The first answer takes as long as a process takes to start, all at the same time; what tells how the clocks
        # differ is the time of the second.
        started = [(node, _ask(node["NodeID"])) for node in nodes]
        return [_visit(node, first, deadline) for node, first in started]
    finally:
        ray_session.leave()


def facts() -> dict[str, Any]:
    """Of the node where it is called."""
    state = os.statvfs(shared_memory_folder())
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return {
        "now": time.time(),
        "versions": installed(),
        "shared_memory_bytes": state.f_bavail * state.f_frsize,
        "open_files": -1 if limit == resource.RLIM_INFINITY else limit,
    }


def installed() -> dict[str, str]:
    """The versions of PACKAGES here; those that are not here are left out."""
    there = {}
    for package in PACKAGES:
        try:
            there[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return there


def _ask(node_id: str) -> Any:
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(facts).options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote()


def _visit(node: dict[str, Any], first: Any, deadline: float) -> NodeFacts:
    has = node["Resources"]
    place = (str(node["NodeManagerAddress"]), float(has.get("CPU", 0)), float(has.get("GPU", 0)))
    try:
        ray.get(first, timeout=max(0.0, deadline - time.monotonic()))
        before = time.time()
        said = ray.get(_ask(node["NodeID"]), timeout=max(1.0, deadline - time.monotonic()))
        after = time.time()
    except RayError as error:  # a node without Headwise cannot even read the question
        return NodeFacts(*place, problem=first_lines(error))
    ahead = said.pop("now") - (before + after) / 2
    return NodeFacts(*place, **said, clock_ahead_s=ahead, clock_sure_to_s=(after - before) / 2)
