"""Replicas in Ray actors: each engine in a process of its own, its ranks in a placement group that goes with it."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray._private.state import actors as actor_table  # there is no public way without a dashboard
from ray._private.state import available_resources_per_node
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util import placement_group_table
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from headwise.cluster import ray_session
from headwise.cluster.channel import ChannelError, Kind
from headwise.cluster.cpu_shares import share_cpus
from headwise.cluster.engine_watch import EngineProcess
from headwise.cluster.group import GroupStartError
from headwise.cluster.process_watch import ProcessWatch
from headwise.cluster.ray_factory import placement_name
from headwise.cluster.ray_ranks import await_on_nodes
from headwise.cluster.ray_watcher import RunWatcher, first_lines
from headwise.cluster.replica import OnDeath, Replica, ReplicaFactory
from headwise.cluster.replica_actor import Host, ReplicaActor
from headwise.cluster.zmq_channel import ZmqEngineChannel
from headwise.workers.leftovers import sweep

CLOSE_TIMEOUT_S = 10.0
"""How long an engine gets to end once it is asked to before it is killed, and a killed one and its ranks to be gone."""
_LOOK_S = 0.1

_logger = logging.getLogger(__name__)


class RayReplica(Replica):
    """:class:`RayReplicas` makes it. Call :meth:`load` once, :meth:`close` at any time."""

    def __init__(self, name: str, node_id: str, on_death: OnDeath) -> None:
        """Makes the actor. Args: ``node_id``: of the node that it should be on."""
        self.name, self._on_death = name, on_death
        self.node, self.pid, self.about = "unknown", 0, {}
        self._lock, self._closing, self._ended, self._told = threading.Lock(), False, threading.Event(), False
        self._watchers: list[RunWatcher | ProcessWatch] = []
        self._refs: list[Any] = []
        self._run: Any = None
        self._places: list[dict[str, Any]] = []
        self._channel: ZmqEngineChannel | None = None
        there = NodeAffinitySchedulingStrategy(node_id, soft=True)
        # Without CPUs: the ranks compute, and have those of their placement group.
        self._actor: Any = (
            ray.remote(ReplicaActor)
            .options(num_cpus=0, max_restarts=0, scheduling_strategy=there, runtime_env=ray_session.rank_environment())
            .remote(EngineProcess.own())
        )

    def load(
        self, host: type[Host], settings: dict[str, Any], of_place: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> None:
        """Starts the engine, and begins to watch it.

        Args:
            of_place: gets where the actor is, and gives the settings that depend on it.

        Raises:
            GroupStartError: its process died meanwhile, or it was closed.
            HeadwiseError: what the engine could not be started for.
        """
        place = self._get(self._actor.place.remote())
        self._places = [place]
        self.node, self.pid = place["address"], place["pid"]
        self.about = self._get(self._actor.load.remote(host, settings | of_place(place)))
        here = ray.get_runtime_context().get_node_id() == place["node_id"]
        with self._lock:
            if self._closing:
                raise GroupStartError(f"replica {self.name} was closed while it started")
            address = ray.util.get_node_ip_address()
            self.channel = self._channel = ZmqEngineChannel(1, "ipc" if here else "tcp", address)
            self._run = self._actor.run.remote(self._channel.endpoint(0))
            self._watchers = [RunWatcher([self._run], self._report), ProcessWatch([place["process"]], self._report)]

    def close(self, ask: bool = True) -> None:
        with self._lock:
            first, self._closing = not self._closing, True
        if not first:
            self._ended.wait(4 * CLOSE_TIMEOUT_S)
            return
        for watcher in self._watchers:
            watcher.stop()
        try:
            if ray.is_initialized():
                self._end(ask)
        finally:
            if self._channel is not None:
                self._channel.close()
            for watcher in self._watchers:
                watcher.join()
            self._ended.set()

    def _end(self, ask: bool) -> None:
        if ask and self._run is not None and self._channel is not None:
            with contextlib.suppress(ChannelError, RayError):
                self._channel.send(0, Kind.CLOSE, b"")
                ray.wait([self._run], timeout=CLOSE_TIMEOUT_S)
        with contextlib.suppress(Exception):
            self._places += self._ranks()
        with contextlib.suppress(RayError):
            ray.kill(self._actor, no_restart=True)
        for ref in (*self._refs, *([self._run] if self._run is not None else [])):
            with contextlib.suppress(Exception):  # Ray logs an error that nobody asked for
                ray.get(ref, timeout=CLOSE_TIMEOUT_S)
        await_on_nodes(self._places)
        sweep()  # of what it leaves on this host, if it was killed; on another its ranks see to it
        self._remove_placement()

    def _ranks(self) -> list[dict[str, Any]]:
        """The places of its ranks that Ray knows of."""
        table = actor_table()
        own = table.get(self._actor._actor_id.hex(), {}).get("Address")
        ranks = [one for one in table.values() if one["OwnerAddress"] == own and one["State"] != "DEAD" and one["Pid"]]
        return [{"node_id": one["Address"]["NodeID"], "pid": one["Pid"], "born": None} for one in ranks]

    def _remove_placement(self) -> None:
        """Its engine may have had no time to."""
        name = placement_name(self._actor._actor_id.hex())
        for key, group in placement_group_table().items():
            if group["name"] == name and group["state"] != "REMOVED":
                remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(key)))

    def _get(self, ref: Any) -> Any:
        self._refs.append(ref)
        while not ray.wait([ref], timeout=_LOOK_S)[0]:
            if self._closing:
                raise GroupStartError(f"replica {self.name} was closed while it started")
        try:
            return ray.get(ref)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except RayActorError as error:
            raise GroupStartError(f"replica {self.name} died while it started: {first_lines(error)}") from None

    def _report(self, rank: int | None, cause: str) -> None:
        """On a watcher's thread."""
        with self._lock:
            if self._told or self._closing:
                return
            self._told = True
        self._on_death(self.name, cause)


class RayReplicas(ReplicaFactory):
    """Joins Ray, or starts one on this machine, as a single engine does."""

    def __init__(self, host: type[Host], ranks: Sequence[int], address: str | None = None) -> None:
        """
        Args:
            host: the class of the engine in the actor, which must be importable on every node.
            ranks: of each replica that there may be at a time, its tensor_parallel_size: so many share the CPUs where
                ``cpus_per_rank`` is None.
            address: of the Ray to join, as :class:`~headwise.cluster.ray_factory.RayGroupFactory` takes it.

        Raises:
            GroupStartError: no Ray answers there.
        """
        self._host, self._most_ranks = host, list(ranks)
        self._lock, self._closed = threading.Lock(), False
        self._replicas: list[RayReplica] = []
        self._cancelled: set[str] = set()  # names
        self._starting: Counter[str] = Counter()  # by node, the CPUs or GPUs of replicas that take none of them yet
        self._wanted: dict[str, Any] = {}  # settings of the latest replica that takes requests
        self._nodes_for = self._asked = 0  # so many replicas nodes are to be asked for, and were
        self._free_memory: dict[str, int] = {}  # by node, in bytes, before the first replica was there
        ray_session.join(address)

    def start(self, name: str, settings: dict[str, Any], on_death: OnDeath) -> RayReplica:
        if self._closed:
            raise GroupStartError(f"replica {name} was to start after the end")
        settings = self._resolved(settings)
        with self._placing(settings) as node_id:
            with self._lock:
                if self._closed:
                    raise GroupStartError(f"replica {name} was to start after the end")
                if name in self._cancelled:
                    raise GroupStartError(f"replica {name} was cancelled before it started")
                replica = RayReplica(name, node_id, on_death)
                self._replicas = [one for one in self._replicas if not one._ended.is_set()] + [replica]
                if _takes_requests(settings):
                    self._wanted = settings
            self._request()
            try:
                replica.load(self._host, settings, lambda place: self._of_place(place, settings))
            except BaseException:
                replica.close(ask=False)
                raise
        return replica

    def cancel(self, name: str) -> None:
        with self._lock:
            self._cancelled.add(name)
            found = [replica for replica in self._replicas if replica.name == name]
        for replica in found:
            replica.close(ask=False)

    def has_room(self, settings: dict[str, Any]) -> bool:
        kind, amount = _demand(self._resolved(settings))
        return amount <= sum(float(free.get(kind, 0.0)) for free in available_resources_per_node().values())

    def ask_for_nodes(self, num_replicas: int) -> None:
        with self._lock:
            if self._closed:  # Ray would keep the nodes for nobody
                return
            self._nodes_for = num_replicas
        self._request()

    def close(self) -> None:
        with self._lock:
            first, self._closed, self._nodes_for = not self._closed, True, 0
            replicas = list(self._replicas)
        if not first:
            return
        try:
            if ray.is_initialized():
                self._request()
            threads = [threading.Thread(target=replica.close, daemon=True) for replica in replicas]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            ray_session.leave()

    def _request(self) -> None:
        """Asks the autoscaler for nodes, once it is known what a replica needs."""
        with self._lock:
            if self._nodes_for == self._asked or not self._wanted:
                return
            self._asked = self._nodes_for
            ranks = self._wanted.get("tensor_parallel_size", 1) * self._asked
            gpu = self._wanted["device"] == "cuda"
            bundle = {"CPU": self._wanted.get("cpus_per_rank") or 1.0} | ({"GPU": 1} if gpu else {})
            with contextlib.suppress(RayError):
                request_resources(bundles=[bundle] * ranks)

    def _resolved(self, settings: dict[str, Any]) -> dict[str, Any]:
        """With the device and the CPUs that the engine cannot find out itself: Ray gives its process no GPU."""
        settings = dict(settings)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if settings.get("device", "auto") == "auto":
            settings["device"] = "cuda" if any(node.get("GPU") for node in nodes) else "cpu"
        if settings.get("cpus_per_rank") is None and settings["device"] == "cpu":
            settings["cpus_per_rank"] = share_cpus([node.get("CPU", 0.0) for node in nodes], self._most_ranks)
        return settings

    def _of_place(self, place: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
        """The address of its host; and what each rank may count on of the memory that was free there before the first
        replica was."""
        found = {"node_address": place["address"]}
        if settings["device"] != "cpu":
            return found
        cpus = sum(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["NodeID"] == place["node_id"])
        most = min(sum(self._most_ranks), math.floor(cpus / float(settings["cpus_per_rank"])))
        with self._lock:
            free = self._free_memory.setdefault(place["node_id"], place["free_memory"])
        return found | {"rank_memory": free // max(1, most)}

    @contextlib.contextmanager
    def _placing(self, settings: dict[str, Any]) -> Iterator[str]:
        """The id of the node with the most room, which is counted as taken until the ranks have taken it."""
        kind, amount = _demand(settings)
        with self._lock:
            free = {node: left.get(kind, 0.0) for node, left in available_resources_per_node().items()}
            # Of a node that has just come it is not known yet what is free.
            has = {node["NodeID"]: node["Resources"].get(kind, 0.0) for node in ray.nodes() if node["Alive"]}
            node_id = max(has, key=lambda node: (free.get(node, 0.0) - self._starting[node], has[node]))
            self._starting[node_id] += amount  # type: ignore[assignment]
        try:
            yield node_id
        finally:
            with self._lock:
                self._starting[node_id] -= amount  # type: ignore[assignment]


def _takes_requests(settings: dict[str, Any]) -> bool:
    """Whether it is no replica that only computes prompts for others."""
    return (settings.get("handoff") or {}).get("role") != "prefill"


def _demand(settings: dict[str, Any]) -> tuple[str, float]:
    """Which resource an engine's ranks need most, and how much of it."""
    ranks = settings.get("tensor_parallel_size", 1)
    if settings["device"] == "cuda":
        return "GPU", float(ranks)
    return "CPU", ranks * float(settings["cpus_per_rank"])
