"""An engine whose Ray is gone: nothing can be started without it, and the engine ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

DEADLINE_S = 240.0

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
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("died:")]
    assert "in a row have not finished a step" in line
