"""Which GPU a rank takes, and what its actor is made of. Without Ray, and without a GPU."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from headwise.cluster import actor as module
from headwise.cluster import ray_ranks
from headwise.cluster.actor import ShardActor, index_of_gpu
from headwise.cluster.engine_watch import EngineProcess
from headwise.cluster.rank import Rank
from headwise.cluster.ray_factory import RayGroupFactory
from headwise.cluster.ray_ranks import RayRanks
from headwise.workers import collectives
from headwise.workers.errors import InvalidValueError
from headwise.workers.processes import ProcessId
from tests.checkpoints import small_spec


@pytest.mark.parametrize(
    ("ids", "visible", "index"),
    [
        (["0"], "0", 0),
        (["3"], "3", 0),  # Ray has left the process only its own to see
        (["3"], None, 3),  # as with RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1
        (["6"], "4,6", 1),  # the same, and Ray gives of those that it was shown itself
        (["GPU-5f"], "GPU-ab,GPU-5f", 1),
    ],
)
def test_which_gpu_is_the_rank_s(ids: list[str], visible: str | None, index: int) -> None:
    assert index_of_gpu(ids, visible) == index


@pytest.mark.parametrize(("ids", "visible"), [(["3"], "0,1"), (["3"], ""), ([], None), (["0", "1"], "0,1")])
def test_a_gpu_that_the_process_does_not_see_is_refused(ids: list[str], visible: str | None) -> None:
    with pytest.raises(InvalidValueError, match="CUDA_VISIBLE_DEVICES"):
        index_of_gpu(ids, visible)


class Context:
    def get_accelerator_ids(self) -> dict[str, list[str]]:
        return {"GPU": ["2"]}


def test_a_rank_computes_on_the_gpu_that_ray_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EngineWatch", lambda *arguments: None)
    monkeypatch.setattr(ray, "get_runtime_context", Context)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    specs = [small_spec(Path("here"), device=device) for device in ("cuda", "cpu")]
    actors = [ShardActor(0, spec, 1, EngineProcess.own()) for spec in specs]
    assert [actor._placed_spec().device for actor in actors] == ["cuda:2", "cpu"]


def test_every_thread_of_a_rank_chooses_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What loads, and what serves: a thread that chooses none is on the first."""
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)

    class Found(Exception):
        pass

    def connect(*arguments: Any) -> None:
        assert arguments[-1] == "cuda:2"
        raise Found

    monkeypatch.setattr(collectives, "connect", connect)
    rank = Rank(small_spec(Path("here"), device="cuda:2"), 0, 1)
    with pytest.raises(Found):
        rank.load(None, {}, 1.0, None, [0])  # type: ignore[arg-type]
    assert chosen == [2]
    rank._use_gpu()
    assert chosen == [2, 2]


class Calls:
    """Stands for Ray's actors: what they are made of, and what they are asked."""

    def __init__(self) -> None:
        self.arguments: list[Any] = []
        self.num_gpus: list[Any] = []

    def options(self, **options: Any) -> Calls:
        self.num_gpus.append(options["num_gpus"])
        return self

    def remote(self, *arguments: Any) -> Calls:
        self.arguments += arguments
        return self

    def __getattr__(self, name: str) -> Calls:
        return self


class Placement:
    bundle_specs = ({"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0})
    id = None


def test_an_actor_has_one_gpu_and_is_made_of_plain_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor would take memory of the first GPU when it is unpickled, in every rank's process (ray#63810)."""
    calls, process = Calls(), ProcessId.of(1)
    places = [{"node_id": "here", "address": "127.0.0.1", "process": process, "pid": 1, "born": 0.0}] * 2
    monkeypatch.setattr(ray, "remote", lambda cls: calls)
    monkeypatch.setattr(ray_ranks, "PlacementGroupSchedulingStrategy", lambda *args, **kwargs: None)
    monkeypatch.setattr(RayRanks, "_all", lambda self, method: places)
    monkeypatch.setattr(RayRanks, "_here", lambda self: "here")
    monkeypatch.setattr(RayRanks, "_wait", lambda self, refs, progress=None: [{"kind": "nccl"}])
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    ranks = RayRanks(small_spec(Path("here"), device="cuda", tensor_parallel_size=2), Placement(), 1.0)  # type: ignore[arg-type]
    try:
        ranks.create()
        ranks.load(None)
        assert ranks._collectives() == "nccl"
    finally:
        ranks._actors, ranks._rendezvous = [], None
        ranks.end(ask=False)
    assert calls.num_gpus == [1, 1] and len(calls.arguments) > 8
    for argument in calls.arguments:
        assert_plain(argument)


def assert_plain(value: Any) -> None:
    if is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        for one in value:
            assert_plain(one)
    else:
        assert value is None or isinstance(value, str | bytes | int | float), type(value)


def test_a_cluster_without_gpus_is_told_from_one_that_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Placement:
        bundle_count = 2
        bundle_specs = ({"CPU": 1.0, "GPU": 1.0},)

    factory = RayGroupFactory.__new__(RayGroupFactory)
    factory._start_timeout_s = 1.0
    resources: dict[str, float] = {"CPU": 8.0}
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    monkeypatch.setattr(ray, "available_resources", lambda: resources)
    placement: Any = Placement()
    assert factory._no_room(placement, 1).startswith("device=cuda (--device) wants 2 GPUs, one a rank, and the cluster")
    resources["GPU"] = 1.0
    assert "lower cpus_per_rank" in factory._no_room(placement, 1)
