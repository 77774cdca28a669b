"""The factory of groups in Ray actors: this process's use of Ray, and the place that its groups take in the cluster."""

from __future__ import annotations

import math

import ray
from ray._private.state import available_resources_per_node  # there is no public way without a dashboard
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from headwise.cluster import ray_session
from headwise.cluster.group import GroupFactory, NoRoomError, ShardGroup
from headwise.cluster.ray_group import RayShardGroup
from headwise.workers.spec import ShardSpec


class RayGroupFactory(GroupFactory):
    """The first :meth:`make` joins Ray and makes a placement group of one bundle a rank, on one node if one has
    room for all; all groups take their turn in it."""

    def __init__(
        self,
        spec: ShardSpec,
        *,
        address: str | None = None,
        cpus_per_rank: float | None = None,
        start_timeout_s: float = 120.0,
    ) -> None:
        """
        Args:
            address: of the Ray to join; None joins RAY_ADDRESS, else one that this process started, else starts one.
            cpus_per_rank: what each rank asks Ray for; its whole part is the number of its threads. None is cores /
                ranks on CPU, and 1 beside a GPU.
            start_timeout_s: seconds until every rank must be placed, and again until they must have met.
        """
        self._spec, self._address, self._cpus, self._start_timeout_s = spec, address, cpus_per_rank, start_timeout_s
        self._joined = False
        self._placement: PlacementGroup | None = None

    def make(self) -> ShardGroup:
        if not self._joined:
            ray_session.join(self._address)
            self._joined = True
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if self._placement is None:
            bundles, strategy = self._bundles(nodes, list(available_resources_per_node().values()))
            self._placement = placement_group(bundles, strategy, **_of_actor(strategy))
        if not self._placement.wait(self._start_timeout_s):
            raise NoRoomError(self._no_room(self._placement, len(nodes)))
        return RayShardGroup(self._spec, self._placement, self._start_timeout_s)

    def close(self) -> None:
        placement, self._placement = self._placement, None
        try:
            if placement is not None and ray.is_initialized():
                remove_placement_group(placement)
        finally:
            if self._joined:
                self._joined = False
                ray_session.leave()

    def _bundles(
        self, nodes: list[dict[str, float]], free: list[dict[str, float]]
    ) -> tuple[list[dict[str, float]], str]:
        """What each rank wants, and the strategy to place them by.

        Args:
            nodes, free: what each node has, and what of it is free. Where no node has room for all ranks now, they are
                spread: a node that others use may never have it.
        """
        ranks, gpu = self._spec.tensor_parallel_size, self._spec.device == "cuda"
        cpus = self._cpus
        if cpus is None:
            cores = max(node.get("CPU", 1.0) for node in nodes)
            # Ray counts in ten-thousandths: three thirds of a core, rounded up, would not fit in it.
            cpus = 1.0 if gpu else math.floor(cores / ranks * 10_000) / 10_000
        bundle = {"CPU": cpus} | ({"GPU": 1.0} if gpu else {})
        fits = any(all(node.get(name, 0) >= amount * ranks for name, amount in bundle.items()) for node in free)
        return [bundle] * ranks, "STRICT_PACK" if fits else "PACK"

    def _no_room(self, placement: PlacementGroup, num_nodes: int) -> str:
        bundle = placement.bundle_specs[0]
        wanted = {name: amount * placement.bundle_count for name, amount in bundle.items()}
        has, free = ray.cluster_resources(), ray.available_resources()  # of which Ray leaves out what is all taken
        if bundle.get("GPU") and not has.get("GPU"):
            return (
                f"device=cuda (--device) wants {placement.bundle_count} GPUs, one a rank, and the cluster has none in "
                f"{num_nodes} nodes; start Ray where nvidia-smi shows them, or compute on CPUs (--device cpu)"
            )
        return (
            f"{placement.bundle_count} ranks want {_amounts(wanted)}; the cluster has "
            f"{_amounts(has)} in {num_nodes} nodes, of which {_amounts(dict.fromkeys(has, 0.0) | free)} "
            f"are free, and start_timeout={self._start_timeout_s:g} s have passed; lower cpus_per_rank="
            f"{bundle['CPU']:g} (--cpus-per-rank) or tensor_parallel_size (--tp), or add nodes"
        )


def placement_name(actor_id: str) -> str:
    """Of the placement group that an engine in an actor makes. Ray does not remove it with the actor, so that somebody
    else must find it."""
    return f"headwise-of-{actor_id}"


def _of_actor(strategy: str) -> dict[str, str]:
    """Further arguments for the placement group of an engine in an actor: its name, and the actor's node, where the
    ranks go if they have room there."""
    context = ray.get_runtime_context()
    if (actor := context.get_actor_id()) is None:
        return {}
    near = {"_soft_target_node_id": context.get_node_id()} if strategy == "STRICT_PACK" else {}
    return {"name": placement_name(actor)} | near


def _amounts(resources: dict[str, float]) -> str:
    return " and ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU") if name in resources)
