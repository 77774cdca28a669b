"""Shards in Ray actors: real processes, their heads, their deaths, and nothing left behind."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import psutil
import pytest
import ray
from ray.exceptions import RayTaskError

from headwise.cluster import ray_ranks
from headwise.cluster.channel import Kind
from headwise.cluster.group import GroupStartError, ShardGroupDied
from headwise.cluster.ray_factory import RayGroupFactory
from headwise.cluster.ray_ranks import RayRanks
from headwise.cluster.ray_watcher import RunWatcher
from headwise.runtime import LLM, SamplingParams
from headwise.runtime.engine.loop import EngineStoppedError
from headwise.workers.errors import InvalidValueError, PeerDiedError
from headwise.workers.plan import RowAdmit, RowSampling, StepPlan
from tests.checkpoints import small_spec
from tests.runtime.test_parity import expected, prompts

PARAMS = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


pytestmark = pytest.mark.usefixtures("one_ray")


def llm(directory: Path, **settings: Any) -> LLM:
    return LLM(directory, **{"quiet": True, "kv_memory": "64MiB", "cpus_per_rank": 0.5, **settings})


def nothing_left(pids: list[int]) -> None:
    """Every actor's process and placement group is gone."""
    alive = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    assert alive == []
    states = {group["state"] for group in ray.util.placement_group_table().values()}
    assert states <= {"REMOVED"}


# One rank computes in the test of a factory, too.
@pytest.mark.parametrize("tp", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_are_processes_with_their_own_heads(checkpoint: Callable[..., Path], tp: int) -> None:
    """And they sleep while there is nothing to do."""
    with llm(checkpoint("uneven"), tensor_parallel_size=tp) as model:
        outputs = model.generate(prompts(), PARAMS)
        stats = model.stats()
        check_sleep(stats["shard_pids"])
    assert [output.outputs[0].token_ids for output in outputs] == expected(checkpoint("uneven"))
    pids = stats["shard_pids"]
    assert len({os.getpid(), *pids}) == tp + 1
    num_kv_heads = [stop - start for start, stop in (shard["kv_heads"] for shard in stats["shards"])]
    assert num_kv_heads == {1: [3], 2: [2, 1], 4: [1, 1, 2, 1]}[tp]
    per_head = 2 * 2 * 16 * 16 * 4 * stats["num_blocks"]  # K and V, layers, block, head_dim, float32
    assert stats["kv_bytes_per_rank"] == [heads * per_head for heads in num_kv_heads]
    nothing_left(pids)


def test_where_nobody_wants_other_shards_a_death_is_reported_and_leaves_nothing(
    checkpoint: Callable[..., Path],
) -> None:
    with llm(checkpoint("uneven"), tensor_parallel_size=2, on_shard_death="fail") as model:
        pids = model.stats()["shard_pids"]
        stream = model.stream(prompts()[0], LONG)
        next(stream)
        killed = time.monotonic()
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(ShardGroupDied, match=r"rank 1 on node \d+\.\d+") as death:
            list(stream)
        assert time.monotonic() - killed < 5
        assert death.value.rank == 1 and death.value.cause
        with pytest.raises(ShardGroupDied):
            model.generate(prompts()[0], PARAMS)
    nothing_left(pids)


def test_a_death_that_a_peer_tells_of_while_it_loads_is_the_peers(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(ref: object) -> object:
        raise RayTaskError("load", "", PeerDiedError(1, "died (pid 7 is gone)"))

    ranks = RayRanks(small_spec(checkpoint("uneven"), tensor_parallel_size=2), None, 1.0)  # type: ignore[arg-type]
    ranks._places = [{"address": "here"}, {"address": "there"}]
    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(ShardGroupDied, match=r"rank 1 on node there died: died \(pid 7 is gone\)"):
        ranks._get("rank 0's load", 0)


def test_no_rank_is_blamed_where_ray_itself_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(*_: Any, **__: Any) -> object:
        raise ConnectionError("the head node is gone")

    reports: queue.SimpleQueue[tuple[int | None, str]] = queue.SimpleQueue()
    monkeypatch.setattr(ray, "wait", wait)
    watcher = RunWatcher([], lambda rank, cause: reports.put((rank, cause)))
    assert reports.get(timeout=10) == (None, "the head node is gone")
    watcher.join()


@pytest.mark.thorough
def test_where_nobody_wants_other_shards_a_death_at_rest_is_noticed(checkpoint: Callable[..., Path]) -> None:
    with llm(checkpoint("uneven"), tensor_parallel_size=1, on_shard_death="fail") as model:
        pids = model.stats()["shard_pids"]
        os.kill(pids[0], signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(ShardGroupDied, match="rank 0"):
            model.generate(prompts()[0], LONG)
        assert time.monotonic() - started < 5
    nothing_left(pids)


def check_sleep(pids: list[int]) -> None:
    """This process, in which an engine has nothing to do, and those of its ranks leave the machine to others."""
    processes, shares = [psutil.Process(pid) for pid in (os.getpid(), *pids)], list[float]()
    # Threads that computed may spin for a moment more, and something else in this process may run: not each time.
    while len(shares) < 8 and min(shares, default=1.0) >= 0.02:
        shares.append(max(_shares_of_a_core(processes, 1.0)))
    assert min(shares) < 0.02, shares


def _shares_of_a_core(processes: list[psutil.Process], seconds: float) -> list[float]:
    before, started = [process.cpu_times() for process in processes], time.monotonic()
    threading.Event().wait(seconds)
    after, elapsed = [process.cpu_times() for process in processes], time.monotonic() - started
    return [(b.user + b.system - a.user - a.system) / elapsed for a, b in zip(before, after, strict=True)]


@pytest.mark.slow
def test_two_models_at_once_do_not_collide(checkpoint: Callable[..., Path]) -> None:
    first_dir, second_dir = checkpoint("uneven"), checkpoint("gqa")
    with llm(first_dir, tensor_parallel_size=2) as first, llm(second_dir, tensor_parallel_size=2) as second:
        found: dict[Path, list[list[int]]] = {}

        def run(model: LLM, directory: Path) -> None:
            found[directory] = [output.outputs[0].token_ids for output in model.generate(prompts(), PARAMS)]

        threads = [threading.Thread(target=run, args=pair) for pair in ((first, first_dir), (second, second_dir))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        pids = first.stats()["shard_pids"] + second.stats()["shard_pids"]
    assert len(set(pids)) == 4
    assert found == {first_dir: expected(first_dir), second_dir: expected(second_dir)}
    nothing_left(pids)


def test_a_factory_makes_one_group_after_another_in_one_place(checkpoint: Callable[..., Path]) -> None:
    prompt, wanted = prompts()[2], expected(checkpoint("uneven"))[2][:4]
    admit = RowAdmit(0, prompt, len(prompt), 0, [0, 1], RowSampling())
    plans = [StepPlan(0, admits=[admit], computes=[(0, len(prompt))])]
    plans += [StepPlan(step, computes=[(0, 1)]) for step in (1, 2, 3)]
    factory = RayGroupFactory(small_spec(checkpoint("uneven")), cpus_per_rank=0.5)
    pids: list[int] = []
    places: set[str] = set()
    for _ in range(2):
        group = factory.make()
        group.start(num_blocks=4)
        for plan in plans:
            group.submit(plan)
        assert [group.collect().tokens for _ in plans] == [[(0, token)] for token in wanted]
        pids += [shard["pid"] for shard in group.query("stats")]
        assert group.places == [(ray.util.get_node_ip_address(), pids[-1])]
        group.close()
        assert not any(psutil.pid_exists(pid) for pid in pids)
        places |= {name for name, place in ray.util.placement_group_table().items() if place["state"] == "CREATED"}
    assert len(set(pids)) == 2 and len(places) == 1
    factory.close()
    factory.close()
    nothing_left(pids)


def test_a_placement_that_cannot_be_met_says_what_there_is(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(
        GroupStartError, match=r"want 6 CPU; the cluster has 4 CPU.*cpus_per_rank=3 \(--cpus-per-rank\)"
    ):
        llm(checkpoint("uneven"), tensor_parallel_size=2, cpus_per_rank=3, start_timeout=1.0)
    nothing_left([])


def test_an_error_while_loading_is_the_rank_s_own(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InvalidValueError, match=r"kv_memory='1KiB'.*max_model_len=512"):
        llm(checkpoint("uneven"), tensor_parallel_size=2, kv_memory="1KiB")
    nothing_left([])


@pytest.mark.thorough
def test_tcp_and_gloo_between_nodes(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The way ranks of several hosts talk, on one."""
    monkeypatch.setattr(RayRanks, "_node_ids", lambda self: {"one", "another"})
    with llm(checkpoint("uneven"), tensor_parallel_size=2) as model:
        outputs = model.generate(prompts(), PARAMS)
        pids = model.stats()["shard_pids"]
    assert [output.outputs[0].token_ids for output in outputs] == expected(checkpoint("uneven"))
    nothing_left(pids)


@pytest.mark.parametrize(("free", "strategy"), [([4, 1], "STRICT_PACK"), ([3, 3], "PACK"), ([0, 0], "PACK")])
def test_ranks_go_to_one_node_if_it_has_room_now(free: list[float], strategy: str) -> None:
    factory = RayGroupFactory(small_spec(Path("nowhere"), tensor_parallel_size=2), cpus_per_rank=2)
    nodes = [{"CPU": 4.0}, {"CPU": 4.0}]
    assert factory._bundles(nodes, [{"CPU": cpus} for cpus in free]) == ([{"CPU": 2}] * 2, strategy)


def test_ranks_of_which_nothing_is_heard_do_not_start_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    progress = [(Kind.PROGRESS, 0, msgpack.packb((layer, 12))) for layer in range(1, 13)]
    loaded: list[int] = []

    class Channel:
        def receive(self, timeout_s: float) -> Any:
            return progress.pop(0) if progress and now >= 400 * (13 - len(progress)) else None

    def wait(refs: list[str], timeout: float) -> tuple[list[str], list[str]]:
        nonlocal now
        now += 100.0
        return [], refs

    monkeypatch.setattr(ray_ranks.time, "monotonic", lambda: now)
    monkeypatch.setattr(ray, "wait", wait)
    ranks = RayRanks(small_spec(Path("/models/big"), tensor_parallel_size=2), None, 1.0)
    ranks._channel = Channel()
    with pytest.raises(GroupStartError, match=r"ranks \[0, 1\] of 2 have not started.* for 600 s.*/models/big"):
        ranks._wait(["rank 0", "rank 1"], lambda done, total: loaded.append(done))
    assert loaded == list(range(1, 13)) and now == 400 * 12 + 700


def test_a_rank_that_is_stopped_while_it_starts_is_as_good_as_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def wait(refs: list[str], timeout: float) -> tuple[list[str], list[str]]:
        nonlocal now
        now += 1.0
        return [], refs

    monkeypatch.setattr(ray_ranks.time, "monotonic", lambda: now)
    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(RayRanks, "stopped", lambda self: 1)
    ranks = RayRanks(small_spec(Path("/models/big"), tensor_parallel_size=2), None, 1.0)
    ranks._places = [{"address": "here"}, {"address": "there"}]
    with pytest.raises(ShardGroupDied, match=r"rank 1 on node there died: its process is stopped"):
        ranks._wait(["rank 0", "rank 1"])
    assert now == 9.0


def test_each_rank_knows_which_ranks_are_on_its_host() -> None:
    ranks = RayRanks(small_spec(Path("nowhere")), None, 1.0)
    ranks._places = [{"address": address} for address in ("10.0.0.1", "10.0.0.2", "10.0.0.1")]
    assert ranks._ranks_on_host() == [[0, 2], [1], [0, 2]]


def test_close_after_an_exception_and_twice(checkpoint: Callable[..., Path]) -> None:
    pids: list[int] = []
    with pytest.raises(ZeroDivisionError), llm(checkpoint("uneven"), tensor_parallel_size=2) as model:
        pids = model.stats()["shard_pids"]
        for _ in model.stream(prompts()[0], LONG):
            _ = 1 / 0
    model.close()
    nothing_left(pids)


def test_close_while_a_step_hangs(checkpoint: Callable[..., Path]) -> None:
    with llm(checkpoint("uneven"), tensor_parallel_size=1) as model:
        pids = model.stats()["shard_pids"]
        waiting = model._loop.submit(lambda engine: engine.generation.group.collect())  # of a step that nobody computes
        model._loop.hurry()
    with pytest.raises(EngineStoppedError, match="the engine is closed"):
        waiting.result(10)
    model._loop._thread.join(10)
    assert not model._loop._thread.is_alive()
    nothing_left(pids)


@pytest.mark.parametrize("node", [pytest.param("here", marks=pytest.mark.slow), "elsewhere"])
def test_a_rank_that_does_not_end_by_itself_is_ended(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, node: str
) -> None:
    """A process that is stopped does nothing that it is told, wherever it is."""
    monkeypatch.setattr(ray_ranks, "CLOSE_TIMEOUT_S", 1.0)
    if node == "elsewhere":
        monkeypatch.setattr(RayRanks, "_here", lambda self: "another node")
    with llm(checkpoint("uneven"), tensor_parallel_size=2) as model:
        pids = model.stats()["shard_pids"]
        os.kill(pids[1], signal.SIGSTOP)
    nothing_left(pids)


def test_an_actor_sets_its_threads_before_torch_is_imported() -> None:
    code = "import sys, headwise.cluster.actor, headwise.workers.spec; print({'torch', 'numba'} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "set()"


@pytest.mark.thorough
def test_an_unclosed_model_leaves_nothing_at_exit(checkpoint: Callable[..., Path]) -> None:
    code = """
import sys
from headwise.runtime import LLM
if __name__ == "__main__":
    llm = LLM(sys.argv[1], tensor_parallel_size=1, kv_memory="64MiB", quiet=True)
    print(*llm.stats()["shard_pids"])
"""
    command = [sys.executable, "-c", code, str(checkpoint("uneven"))]
    run = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    assert "Traceback" not in run.stderr
    pids = [int(pid) for pid in run.stdout.split()]
    assert len(pids) == 1 and not any(psutil.pid_exists(pid) for pid in pids)
