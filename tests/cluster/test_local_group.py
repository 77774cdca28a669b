"""Ranks on threads: how they fail and end."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from headwise.cluster import channel_group
from headwise.cluster.actor import ShardActor
from headwise.cluster.channel import ChannelError, Kind
from headwise.cluster.engine_watch import EngineProcess
from headwise.cluster.group import ShardGroupDied
from headwise.cluster.local_group import LocalGroupFactory
from headwise.cluster.rank import death_of
from headwise.workers.errors import InvalidValueError, PeerDiedError
from headwise.workers.kv.transfer import Op, Tier, TransferJob
from headwise.workers.machine import usable_cores
from headwise.workers.plan import RowAdmit, RowSampling, StepPlan
from headwise.workers.processes import ProcessId
from headwise.workers.runner import Launched
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

    monkeypatch.setattr(group.shards[1], "launch", fail)
    group.submit(PLAN)
    with pytest.raises(ShardGroupDied, match="rank 1 on node localhost died: ZeroDivisionError: for the test") as death:
        group.collect()
    assert isinstance(death.value.__cause__, ZeroDivisionError)
    with pytest.raises(ShardGroupDied):
        group.submit(PLAN)
    assert group.death is death.value
    for rank in group._ranks:
        assert rank.submit(lambda ended: ended.shard).result(DEADLINE_S) is None


def test_an_error_that_no_message_can_carry_is_told_all_the_same(
    group: ThreadShardGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(plan: StepPlan) -> None:
        raise ValueError("half of a pair: \udcff")

    monkeypatch.setattr(group.shards[0], "launch", fail)
    group.submit(PLAN)
    with pytest.raises(ShardGroupDied, match=r"rank 0 .*: ValueError: half of a pair: .*udcff"):
        group.collect()


def test_a_rank_that_cannot_tell_of_its_end_is_noticed(
    group: ThreadShardGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(plan: StepPlan) -> None:
        raise ZeroDivisionError("for the test")

    def send(kind: Kind, payload: bytes) -> None:
        raise OSError("no way to the engine")

    monkeypatch.setattr(group.shards[0], "launch", fail)
    monkeypatch.setattr(group._channel.rank(0), "send", send)
    group.submit(PLAN)
    with pytest.raises(ShardGroupDied, match="OSError: no way to the engine"):
        group.collect()


def test_a_rank_whose_transfer_has_no_result_ends(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    group = ThreadShardGroup(small_spec(checkpoint("gqa"), tensor_parallel_size=2, host_kv_blocks=2))
    group.start(num_blocks=8)
    channel = group._channel.rank(1)
    send = channel.send

    def refuse(kind: Kind, payload: bytes) -> None:
        if kind == Kind.TRANSFERRED:
            raise ChannelError("the engine has not read for 3 s")
        send(kind, payload)

    monkeypatch.setattr(channel, "send", refuse)
    group.transfer(TransferJob(0, Op.DROP, Tier.HOST, []))
    with pytest.raises(ShardGroupDied, match=r"rank 1 .*: ChannelError: the engine has not read for 3 s"):
        while group.transferred(DEADLINE_S) is not None:
            pass
    group.close()


def test_the_end_of_a_rank_that_cannot_tell_is_text_that_a_message_can_carry(
    group: ThreadShardGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*ignored: object) -> None:
        raise ValueError("half of a pair: \udcff")

    monkeypatch.setattr(group.shards[0], "launch", fail)
    monkeypatch.setattr(group._channel.rank(0), "send", fail)
    group.submit(PLAN)
    with pytest.raises(ShardGroupDied, match=r"rank 0 .*: ValueError: half of a pair: .udcff"):
        group.collect()


def test_a_rank_that_ends_over_a_peer_blames_the_peer() -> None:
    assert death_of(1, PeerDiedError(0, "lost \udcff")) == (0, "lost \\udcff")
    assert death_of(1, OSError("lost \udcff")) == (1, "OSError: lost \\udcff")


def test_a_transfer_waits_for_no_step(group: ThreadShardGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job comes while a rank is at a step, with another step before it."""
    at_work, moved = threading.Event(), threading.Event()

    def launched(plan: StepPlan) -> Launched:
        return Launched(plan.step, 0.0, [], None, {}, (), None)

    def launch(plan: StepPlan) -> Launched:
        at_work.set()
        assert moved.wait(DEADLINE_S)
        return launched(plan)

    monkeypatch.setattr(group.shards[0], "launch", launch)
    monkeypatch.setattr(group.shards[0], "transfer", lambda job: moved.set())
    monkeypatch.setattr(group.shards[1], "launch", launched)
    monkeypatch.setattr(group.shards[1], "transfer", lambda job: None)
    group.submit(StepPlan(0))
    assert at_work.wait(DEADLINE_S)
    group.submit(StepPlan(1))
    group.transfer(TransferJob(0, Op.DROP, Tier.HOST, []))
    assert [group.collect().step for _ in range(2)] == [0, 1]


def test_a_failed_step_keeps_no_memory(group: ThreadShardGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = group.shards[0]._runner
    assert runner is not None
    kept = weakref.ref(runner)
    monkeypatch.setattr(type(runner), "finish", lambda self, launched: 1 / 0)
    group.submit(PLAN)
    with pytest.raises(ShardGroupDied) as death:
        group.collect()
    del runner
    group.close()
    gc.collect()
    assert kept() is None and isinstance(death.value.__cause__, ZeroDivisionError)


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
    for use in (lambda: group.submit(PLAN), group.collect):
        with pytest.raises(ShardGroupDied, match=r"^the shard group has ended: the group is closed"):
            use()


def test_only_one_rank_without_ray(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InvalidValueError, match='tensor_parallel_size=2: executor="local" has one rank'):
        LocalGroupFactory(small_spec(checkpoint("gqa"), tensor_parallel_size=2))


def test_threads_are_as_many_as_the_cores_that_may_be_used(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    spec = small_spec(checkpoint("gqa"))
    assert LocalGroupFactory(spec)._num_threads == usable_cores()
    assert LocalGroupFactory(spec, cpus=3.5)._num_threads == 3


def test_an_actor_has_no_more_threads_than_cores_whatever_ray_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    for name in pools:
        monkeypatch.setenv(name, "1")
    engine = EngineProcess(ProcessId(1, 1, "another host"), "/tmp")  # whose end this process would follow
    ShardActor(0, small_spec(Path("nowhere")), 64, engine)
    assert {os.environ[name] for name in pools} == {str(usable_cores())}


def test_a_program_ends_that_has_closed_nothing_and_has_imported_what_it_needs(checkpoint: Callable[..., Path]) -> None:
    code = """
import sys
from headwise.runtime import LLM
llm = LLM(sys.argv[1], executor="local", cpus_per_rank=1, kv_memory="16MiB", quiet=True)
llm.generate([[5, 6, 7]], use_tqdm=False)
print({"ray", "triton", "zmq"} & sys.modules.keys())
"""
    command = [sys.executable, "-c", code, str(checkpoint("gqa"))]
    run = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    assert (run.stdout, run.stderr) == ("set()\n", "")
