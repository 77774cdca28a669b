"""Ranks on threads: how they fail and end."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from headwise.cluster import channel_group
from headwise.cluster.group import ShardGroupDied
from headwise.cluster.local_group import LocalGroupFactory
from headwise.workers.errors import InvalidValueError
from headwise.workers.plan import RowAdmit, RowSampling, StepPlan
from tests.checkpoints import small_spec
from tests.thread_group import ThreadShardGroup

DEADLINE_S = 60.0
PLAN = StepPlan(0, admits=[RowAdmit(0, [5, 6, 7], 3, 0, [0], RowSampling())], computes=[(0, 3)])


@pytest.fixture
def group(checkpoint: Callable[..., Path]) -> Iterator[ThreadShardGroup]:
    made = ThreadShardGroup(small_spec(checkpoint("gqa"), tensor_parallel_size=2))
    made.start(num_blocks=8)
    yield made
    made.close()


def test_a_rank_that_raises_ends_the_others_and_is_named(
    group: ThreadShardGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(plan: StepPlan) -> None:
        raise ZeroDivisionError("for the test")

    monkeypatch.setattr(group.shards[1], "step", fail)
    group.submit(PLAN)
    with pytest.raises(ShardGroupDied, match="rank 1 on node localhost died: ZeroDivisionError: for the test") as death:
        group.collect()
    assert isinstance(death.value.__cause__, ZeroDivisionError)
    with pytest.raises(ShardGroupDied):
        group.submit(PLAN)
    assert group.death is death.value
    for rank in group._ranks:
        assert rank.submit(lambda ended: ended.shard).result(DEADLINE_S) is None


def test_a_rank_that_does_not_answer_is_named(group: ThreadShardGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(group.shards[1], "stats", lambda: go_on.wait(DEADLINE_S))
    monkeypatch.setattr(channel_group, "QUERY_TIMEOUT_S", 0.1)
    with pytest.raises(ShardGroupDied, match=r"rank 1 .* no answer to 'stats' within 0\.1 s"):
        group.query("stats")
    go_on.set()


def test_only_what_a_rank_knows_can_be_asked(group: ThreadShardGroup) -> None:
    with pytest.raises(ShardGroupDied, match=r"ValueError: rank \d got a message of kind .*QUERY.* it does not know"):
        group.query("close")


def test_a_closed_group_computes_nothing(group: ThreadShardGroup) -> None:
    for _ in range(2):
        group.close()
    with pytest.raises(ShardGroupDied, match="the group is closed"):
        group.submit(PLAN)


def test_only_one_rank_without_ray(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InvalidValueError, match='tensor_parallel_size=2: executor="local" has one rank'):
        LocalGroupFactory(small_spec(checkpoint("gqa"), tensor_parallel_size=2))


def test_a_program_ends_that_has_closed_nothing(checkpoint: Callable[..., Path]) -> None:
    code = """
import sys
from headwise.runtime import LLM
llm = LLM(sys.argv[1], executor="local", cpus_per_rank=1, kv_memory="16MiB", quiet=True)
print("zmq" in sys.modules, "ray" in sys.modules)
"""
    command = [sys.executable, "-c", code, str(checkpoint("gqa"))]
    run = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    assert (run.stdout, run.stderr) == ("False False\n", "")
