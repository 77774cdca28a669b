"""Ranks of a node that goes down are started again on another; without Ray itself, an engine ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from headwise.runtime import LLM, SamplingParams
from tests.runtime.test_parity import prompts

pytestmark = pytest.mark.slow

DEADLINE_S = 120.0
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Where a driver is, and two nodes with CPUs; all on this machine."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 << 20})
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def nodes_of(llm: LLM) -> set[str]:
    group: Any = llm._loop.engine.generation.group
    return {place["node_id"] for place in group._ranks._places}


def test_ranks_are_started_on_another_node(checkpoint: Callable[..., Path], cluster: Cluster) -> None:
    nodes = {
        node.node_id: node for node in (cluster.add_node(num_cpus=1, object_store_memory=100 << 20) for _ in range(2))
    }
    with LLM(
        checkpoint("uneven"),
        tensor_parallel_size=2,
        cpus_per_rank=0.5,
        kv_memory="64MiB",
        address=cluster.address,
        quiet=True,
    ) as llm:
        [undisturbed] = llm.generate([prompts()[0]], LONG)
        before = [psutil.Process(pid) for pid in llm.stats()["shard_pids"]]
        [lost] = nodes_of(llm)
        stream = llm.stream(prompts()[0], LONG)
        tokens = list(next(stream).token_ids)
        cluster.remove_node(nodes[lost], allow_graceful=False)
        for process in before:
            process.kill()  # as those of a machine that is off; Ray leaves them seconds
        tokens += [token for delta in stream for token in delta.token_ids]
        assert tokens == undisturbed.outputs[0].token_ids
        stats = llm.stats()
        assert stats["recoveries"]["count"] >= 1
        assert nodes_of(llm) == nodes.keys() - {lost}
        deadline = time.monotonic() + DEADLINE_S
        while any(process.is_running() for process in before):
            assert time.monotonic() < deadline
            threading.Event().wait(0.05)


WITHOUT_RAY = """
import sys
import psutil
from headwise.runtime import LLM, SamplingParams
from headwise.cluster.group import ShardGroupDied

if __name__ == "__main__":
    with LLM(sys.argv[1], tensor_parallel_size=2, cpus_per_rank=0.5, kv_memory="64MiB", quiet=True) as llm:
        pids = llm.stats()["shard_pids"]
        for process in psutil.Process().children(recursive=True):
            if process.name() == "raylet" or process.pid in pids:
                process.kill()
        try:
            llm.generate([5, 6, 7], SamplingParams(max_tokens=400, ignore_eos=True))
        except ShardGroupDied as death:
            print("died:", " ".join(str(death).split()))
"""


def test_an_engine_whose_ray_is_gone_ends(checkpoint: Callable[..., Path]) -> None:
    """Nothing can be started without it. That is tried for about a minute."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", WITHOUT_RAY, str(checkpoint("uneven"))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=2 * DEADLINE_S)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("died:")]
    assert "in a row have not finished a step" in line
