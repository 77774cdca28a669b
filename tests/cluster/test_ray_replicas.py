"""Replicas as Ray actors: real processes, their deaths, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from headwise.cluster import ray_session
from headwise.cluster.group import GroupStartError
from headwise.cluster.ray_replicas import RayReplica, RayReplicas
from headwise.runtime.deployment.host import ReplicaHost
from headwise.workers.errors import InvalidValueError
from headwise.workers.plan import RowSampling
from tests.replica_talk import Talk
from tests.runtime.test_parity import expected, prompts

DEADLINE_S = 60.0


class Deaths:
    """What died of what, and when."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str, float]] = []
        self.some = threading.Event()

    def __call__(self, name: str, cause: str) -> None:
        self.told.append((name, cause, time.monotonic()))
        self.some.set()


@pytest.fixture
def deaths() -> Deaths:
    return Deaths()


@pytest.fixture
def settings(checkpoint: Callable[..., Path]) -> dict[str, Any]:
    return {"model": str(checkpoint("uneven")), "tensor_parallel_size": 2, "kv_memory": "16MiB"}


@pytest.fixture
def replicas(one_ray: str) -> Iterator[RayReplicas]:
    made = RayReplicas(ReplicaHost, [2, 2])
    yield made
    made.close()
    wait_until(lambda: ray_session.living() == [])


def wait_until(condition: Callable[[], object], deadline_s: float = DEADLINE_S) -> None:
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)


def tokens(replica: RayReplica) -> list[list[int]]:
    talk = Talk(replica)
    numbers = [talk.add(prompt, 48) for prompt in prompts()]
    found: dict[int, list[int]] = {number: [] for number in numbers}
    ended: set[int] = set()

    def look(message: Any) -> bool | None:
        for delta in getattr(message, "deltas", ()):
            found[delta.number] += delta.token_ids
            ended.update([delta.number] if delta.finish_reason is not None else [])
        return True if len(ended) == len(numbers) else None

    talk.wait_for(look)
    return [found[number] for number in numbers]


def pids(replica: RayReplica) -> list[int]:
    return [replica.pid, *(shard["pid"] for shard in replica.about["shards"])]


def gone(numbers: list[int]) -> bool:
    return not any(psutil.pid_exists(n) and psutil.Process(n).status() != psutil.STATUS_ZOMBIE for n in numbers)


def start_two(replicas: RayReplicas, settings: dict[str, Any], deaths: Deaths) -> list[RayReplica]:
    """At the same time."""
    made: list[RayReplica] = []
    threads = [
        threading.Thread(target=lambda name=name: made.append(replicas.start(name, settings, deaths)))
        for name in ("replica-1", "replica-2")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    return sorted(made, key=lambda replica: replica.name)


def test_two_replicas_compute_the_same_and_one_that_is_killed_takes_its_ranks_along(
    replicas: RayReplicas, settings: dict[str, Any], deaths: Deaths, checkpoint: Callable[..., Path]
) -> None:
    one, other = start_two(replicas, settings, deaths)
    assert tokens(one) == tokens(other) == expected(checkpoint("uneven"))
    assert len({*pids(one), *pids(other)}) == 6
    killed = time.monotonic()
    os.kill(one.pid, signal.SIGKILL)
    assert deaths.some.wait(DEADLINE_S)
    [(name, cause, told)] = deaths.told
    assert name == "replica-1" and told - killed < 1.0
    assert cause == "its process is gone" or cause.startswith("The actor died unexpectedly")  # whoever is first
    wait_until(lambda: gone(pids(one)), 10.0)
    one.close(ask=False)
    assert tokens(other) == expected(checkpoint("uneven"))
    again = replicas.start("replica-3", settings, deaths)  # which finds the CPUs free
    assert tokens(again) == expected(checkpoint("uneven"))
    other.close()
    assert gone(pids(other)) and len(deaths.told) == 1
    again.close()


@pytest.mark.slow
def test_a_fraction_of_the_memory_is_shared_out_evenly(
    replicas: RayReplicas, settings: dict[str, Any], deaths: Deaths
) -> None:
    made = [replicas.start(f"replica-{n}", settings | {"kv_memory": 0.02}, deaths) for n in (1, 2)]
    one, other = (replica.about["num_blocks"] for replica in made)
    assert one == other > 1000


@pytest.mark.slow
def test_a_replica_that_is_stopped_is_silent_and_can_be_closed(
    replicas: RayReplicas, settings: dict[str, Any], deaths: Deaths
) -> None:
    replica = replicas.start("replica-1", settings, deaths)
    Talk(replica).report()
    os.kill(replica.pid, signal.SIGSTOP)
    while replica.channel.receive(1.0) is not None:
        pass
    assert replica.channel.receive(1.0) is None
    replica.close(ask=False)
    assert gone(pids(replica)) and deaths.told == []


def test_one_that_its_front_kills_leaves_no_sockets(
    replicas: RayReplicas, settings: dict[str, Any], deaths: Deaths
) -> None:
    before = set(Path(tempfile.gettempdir()).glob("headwise-*"))
    replica = replicas.start("replica-1", settings, deaths)
    assert set(Path(tempfile.gettempdir()).glob("headwise-*")) > before
    replica.close(ask=False)
    assert gone(pids(replica)) and set(Path(tempfile.gettempdir()).glob("headwise-*")) <= before


def test_what_an_engine_could_not_be_started_for_is_said_as_it_says_it(
    replicas: RayReplicas, settings: dict[str, Any], deaths: Deaths
) -> None:
    with pytest.raises(InvalidValueError, match="tensor_parallel_size"):
        replicas.start("replica-1", settings | {"tensor_parallel_size": 99, "cpus_per_rank": 0.01}, deaths)
    with pytest.raises(GroupStartError, match=r"2 ranks want 200 CPU; the cluster has 4 CPU"):
        replicas.start("replica-2", settings | {"cpus_per_rank": 100.0, "start_timeout": 0.5}, deaths)
    assert not replicas.has_room(settings | {"cpus_per_rank": 100.0}) and replicas.has_room(settings)
    assert deaths.told == [] and [one for one in ray_session.living() if "ReplicaActor" in one] == []


def test_an_engine_that_ends_is_a_death_with_its_cause(
    replicas: RayReplicas, settings: dict[str, Any], deaths: Deaths
) -> None:
    replica = replicas.start("replica-1", settings | {"on_shard_death": "fail"}, deaths)
    os.kill(replica.about["shards"][1]["pid"], signal.SIGKILL)
    assert deaths.some.wait(DEADLINE_S)
    [(name, cause, _)] = deaths.told
    assert name == "replica-1" and "rank 1" in cause
    replica.close()
    assert gone(pids(replica))


def test_one_that_finds_no_room_can_be_cancelled(
    replicas: RayReplicas, settings: dict[str, Any], deaths: Deaths
) -> None:
    failed: list[BaseException] = []

    def start() -> None:
        try:
            replicas.start("replica-1", settings | {"cpus_per_rank": 100.0}, deaths)
        except GroupStartError as error:
            failed.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    wait_until(lambda: any("ReplicaActor" in one for one in ray_session.living()))
    replicas.cancel("replica-1")
    thread.join(DEADLINE_S)
    assert not thread.is_alive() and len(failed) == 1 and deaths.told == []
    wait_until(lambda: ray_session.living() == [])
    replicas.cancel("replica-2")
    with pytest.raises(GroupStartError, match="replica-2 was cancelled"):
        replicas.start("replica-2", settings, deaths)


def test_the_factory_ends_what_is_starting(replicas: RayReplicas, settings: dict[str, Any], deaths: Deaths) -> None:
    failed: list[BaseException] = []

    def start() -> None:
        try:
            replicas.start("replica-1", settings, deaths)
        except GroupStartError as error:
            failed.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    wait_until(lambda: any("ReplicaActor" in one for one in ray_session.living()))
    replicas.close()
    thread.join(DEADLINE_S)
    assert not thread.is_alive() and len(failed) == 1


@pytest.mark.slow
def test_nodes_are_asked_for_and_given_back(
    monkeypatch: pytest.MonkeyPatch, replicas: RayReplicas, settings: dict[str, Any], deaths: Deaths
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("headwise.cluster.ray_replicas.request_resources", lambda bundles: asked.append(bundles))
    replicas.ask_for_nodes(3)
    assert asked == [], "it is not known yet what a replica needs"
    replicas.start("replica-1", settings | {"cpus_per_rank": 0.5}, deaths)
    replicas.ask_for_nodes(3)
    prefill = {"tensor_parallel_size": 1, "cpus_per_rank": 1.0, "handoff": {"role": "prefill"}}  # computes no request
    replicas.start("replica-2", settings | prefill, deaths)
    replicas.ask_for_nodes(2)
    replicas.close()
    replicas.ask_for_nodes(4)
    assert asked == [[{"CPU": 0.5}] * 6, [{"CPU": 0.5}] * 4, []]


FRONT = """
import sys, time
from headwise.cluster.ray_replicas import RayReplicas
from headwise.runtime.deployment.host import ReplicaHost
replicas = RayReplicas(ReplicaHost, [2])
settings = {"model": sys.argv[1], "tensor_parallel_size": 2, "kv_memory": "16MiB"}
replica = replicas.start("replica-1", settings, print)
print(replica.pid, *(shard["pid"] for shard in replica.about["shards"]), flush=True)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("joined", [True, False])
def test_a_front_that_is_killed_takes_all_along(checkpoint: Callable[..., Path], one_ray: str, joined: bool) -> None:
    environment = {**os.environ, "RAY_ADDRESS": one_ray} if joined else dict(os.environ)
    if not joined:
        environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-c", FRONT, str(checkpoint("uneven"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as front:
        try:
            assert front.stdout is not None
            numbers = list(map(int, front.stdout.readline().split()))
            assert len(numbers) == 3 and not gone(numbers)
            front.kill()
            wait_until(lambda: gone(numbers), 10.0)
        finally:
            front.kill()
    if joined:  # the cluster has its CPUs back
        wait_until(lambda: ray.available_resources().get("CPU") == 4, 10.0)


@pytest.mark.slow
def test_a_replica_on_another_node_is_reached_by_tcp(checkpoint: Callable[..., Path], deaths: Deaths) -> None:
    ray.shutdown()  # the one of other tests
    # Connected before there is another node: this process may belong to any that there is.
    head = {"num_cpus": 0, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, connect=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
        cluster.wait_for_nodes()
        replicas = RayReplicas(ReplicaHost, [2], cluster.address)
        try:
            wait_until(lambda: ray.available_resources().get("CPU") == 2)  # it takes a while until all nodes know
            settings = {"model": str(checkpoint("uneven")), "tensor_parallel_size": 2, "kv_memory": "16MiB"}
            replica = replicas.start("replica-1", settings, deaths)
            assert replica.channel._keys is not None  # type: ignore[attr-defined]
            assert replica._places[0]["node_id"] != ray.get_runtime_context().get_node_id()
            assert tokens(replica) == expected(checkpoint("uneven"))
            os.kill(replica.pid, signal.SIGKILL)
            assert deaths.some.wait(DEADLINE_S)
            replica.close()
            wait_until(lambda: gone(pids(replica)), 10.0)
            again = replicas.start("replica-2", settings, deaths)
            assert tokens(again) == expected(checkpoint("uneven"))
            again.close()
            assert gone(pids(again))
        finally:
            replicas.close()
    finally:
        with suppress(Exception):
            ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
def test_sampling_is_the_same_on_both_sides_of_the_channel(
    replicas: RayReplicas, settings: dict[str, Any], deaths: Deaths
) -> None:
    """A request that one replica has begun, another goes on with: the tokens are those of one alone."""
    one, other = start_two(replicas, settings, deaths)
    sampling = RowSampling(temperature=0.9, top_p=0.9, repetition_penalty=1.2, seed=5)
    whole = (talk := Talk(one)).tokens(talk.add(prompts()[0], 40, sampling))
    rest = (talk := Talk(other)).tokens(talk.add(prompts()[0], 40, sampling, generated=whole[:17]))
    assert whole[:17] + rest == whole


def test_no_nodes_are_asked_for_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("headwise.cluster.ray_replicas.request_resources", lambda bundles: asked.append(len(bundles)))
    monkeypatch.setattr(ray_session, "join", lambda address: None)
    monkeypatch.setattr(ray_session, "leave", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    replicas = RayReplicas(ReplicaHost, [1])
    replicas._wanted = {"device": "cpu", "tensor_parallel_size": 1}
    replicas.ask_for_nodes(3)
    replicas.close()
    replicas.ask_for_nodes(3)  # by a thread that comes late
    assert asked == [3, 0]
