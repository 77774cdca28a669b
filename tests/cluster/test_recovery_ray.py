"""Ranks in Ray's processes are killed, and streams go on with their tokens; nothing of the dead is left."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from headwise.runtime import LLM, SamplingParams
from headwise.workers.errors import InvalidValueError
from tests.cluster.test_ray_group import nothing_left
from tests.runtime.test_parity import prompts

DEADLINE_S = 60.0
LONG = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.9, seed=7, max_tokens=300, ignore_eos=True)


def make(directory: Path, **settings: Any) -> LLM:
    return LLM(
        directory,
        **{"tensor_parallel_size": 2, "quiet": True, "kv_memory": "32MiB", "cpus_per_rank": 0.5, **settings},
    )


class Streams:
    """Requests that run at the same time, and what they get."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.asked = [(prompt, params) for prompt in prompts()[:3] for params in (LONG, SEEDED)]

    def alone(self) -> list[list[int]]:
        outputs = self.llm.generate([one for one, _ in self.asked], [params for _, params in self.asked])
        return [output.outputs[0].token_ids for output in outputs]

    def across(self, fault: Callable[[], object]) -> list[list[int]]:
        """The tokens of each, with a fault once every one of them has some."""
        got: list[list[int]] = [[] for _ in self.asked]
        begun = threading.Barrier(len(self.asked) + 1)

        def run(number: int) -> None:
            for delta in self.llm.stream(*self.asked[number]):
                if not got[number]:
                    begun.wait(DEADLINE_S)
                assert delta.error is None
                got[number] += delta.token_ids

        threads = [threading.Thread(target=run, args=(number,)) for number in range(len(self.asked))]
        for thread in threads:
            thread.start()
        begun.wait(DEADLINE_S)
        fault()
        for thread in threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
        return got


def recoveries(llm: LLM) -> dict[str, Any]:
    return dict(llm.stats()["recoveries"])


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)


@pytest.mark.usefixtures("one_ray")
def test_streams_go_on_when_any_rank_or_all_are_killed(checkpoint: Callable[..., Path]) -> None:
    with make(checkpoint("uneven")) as llm:
        streams = Streams(llm)
        right, dead = streams.alone(), list[int]()
        for count, ranks in enumerate([[0], [0, 1]], start=1):  # rank 1 alone is killed in the test of spares
            pids = llm.stats()["shard_pids"]

            def kill(pids: list[int] = pids, ranks: list[int] = ranks) -> None:
                for rank in ranks:
                    os.kill(pids[rank], signal.SIGKILL)

            assert streams.across(kill) == right
            found = recoveries(llm)
            assert (found["count"], found["num_deaths"], found["rebuilding"]) == (count, count, False)
            assert found["deaths"][-1]["rank"] in ranks
            dead += pids
        stats = llm.stats()
        assert stats["num_free_blocks"] == stats["num_blocks"] and not any(psutil.pid_exists(pid) for pid in dead)
    nothing_left([*dead, *stats["shard_pids"]])


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
def test_a_spare_takes_over_and_is_followed_by_another_even_if_it_dies(checkpoint: Callable[..., Path]) -> None:
    with make(checkpoint("uneven"), warm_spare=True) as llm:
        streams = Streams(llm)
        right = streams.alone()
        wait_until(lambda: recoveries(llm)["spare"] == "ready")
        spare = llm._loop._recovery._spare  # type: ignore[union-attr]
        assert spare is not None and spare.group is not None
        waiting = spare.group._ranks._places  # type: ignore[attr-defined]
        pids = llm.stats()["shard_pids"]
        assert streams.across(lambda: os.kill(pids[0], signal.SIGKILL)) == right
        assert llm.stats()["shard_pids"] == [place["pid"] for place in waiting]
        wait_until(lambda: recoveries(llm)["spare"] == "ready")
        os.kill(spare.group._ranks._places[0]["pid"], signal.SIGKILL)  # type: ignore[attr-defined]
        wait_until(lambda: recoveries(llm)["spare"] != "ready")
        # The last spare is dead: the next death is followed by a group that has to be started.
        pids += llm.stats()["shard_pids"]
        assert streams.across(lambda: os.kill(pids[-1], signal.SIGKILL)) == right
        found = recoveries(llm)
        assert (found["count"], found["num_deaths"]) == (2, 2)
        pids += llm.stats()["shard_pids"]
    nothing_left(pids)


def test_spare_shards_are_refused_where_they_are_of_no_use(checkpoint: Callable[..., Path]) -> None:
    for settings in ({"executor": "local", "tensor_parallel_size": 1}, {"on_shard_death": "fail"}):
        with pytest.raises(InvalidValueError, match=r"^warm_spare=True: "):
            make(checkpoint("uneven"), warm_spare=True, **settings)


@pytest.mark.slow
def test_ranks_of_a_node_that_is_gone_are_started_on_another(checkpoint: Callable[..., Path]) -> None:
    ray.shutdown()  # the one of other tests
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20})
    try:
        node = cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
        cluster.wait_for_nodes()
        with make(checkpoint("uneven"), address=cluster.address, cpus_per_rank=1) as llm:
            streams = Streams(llm)
            right, pids = streams.alone(), llm.stats()["shard_pids"]

            def lose_node() -> None:
                cluster.remove_node(node, allow_graceful=False)
                cluster.add_node(num_cpus=2, object_store_memory=100 << 20)

            assert streams.across(lose_node) == right
            wait_until(lambda: recoveries(llm)["count"] == 1)  # Ray's processes may outlive their node for a while
            assert streams.alone() == right
            assert not any(psutil.pid_exists(pid) for pid in pids)
    finally:
        ray.shutdown()
        cluster.shutdown()
