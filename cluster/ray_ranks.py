"""RayRanks: the actors of one group, from their creation to their end."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgpack
import psutil
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from headwise.cluster import ray_session
from headwise.cluster.actor import ShardActor
from headwise.cluster.channel import ChannelError, EngineChannel, Kind
from headwise.cluster.engine_watch import EngineProcess
from headwise.cluster.group import GroupStartError, Progress, ShardGroupDied
from headwise.cluster.mailbox import CLOSED
from headwise.cluster.rank import death_of
from headwise.cluster.ray_watcher import first_lines
from headwise.cluster.zmq_channel import ZmqEngineChannel
from headwise.workers.collectives import Rendezvous
from headwise.workers.errors import PeerDiedError
from headwise.workers.leftovers import sweep
from headwise.workers.processes import ProcessId
from headwise.workers.spec import ShardSpec

_logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0
"""How long ranks get to end once they are asked to before they are killed, and killed ones to be gone."""
_TASK_TIMEOUT_S = 10.0
"""How long Ray gets to start a process on another node."""
SILENCE_TIMEOUT_S = 600.0
"""How long ranks may take to start without one of them being done, or another layer loaded."""
STOPPED_TIMEOUT_S = 8.0
"""The same where a rank's process is stopped, as by SIGSTOP."""


class RayRanks:
    """One actor a rank, and the channel that they serve. Call :meth:`create`, :meth:`load` and :meth:`run` in this
    order; :meth:`end` at any time.

    What a rank raises while it starts is raised here; a rank that dies meanwhile is ShardGroupDied.
    """

    def __init__(self, spec: ShardSpec, placement: PlacementGroup, start_timeout_s: float) -> None:
        """Args: ``start_timeout_s``: seconds until the ranks must have met."""
        self._spec, self._placement, self._start_timeout_s = spec, placement, start_timeout_s
        self._actors: list[Any] = []
        self._places: list[dict[str, Any]] = []
        self._channel: ZmqEngineChannel | None = None
        self._rendezvous: dict[str, Any] | None = None
        self._refs: list[Any] = []
        self._runs: list[Any] = []
        self._over = False
        self._lock = threading.Lock()  # held while something is made that end() has to end

    @property
    def processes(self) -> list[ProcessId]:
        """Of each rank, once the actors are created."""
        return [place["process"] for place in self._places]

    @property
    def nodes(self) -> list[str]:
        """The address of each rank's node, once the actors are created."""
        return [place["address"] for place in self._places]

    @property
    def places(self) -> list[tuple[str, int]]:
        """The address of each rank's node and the id of its process, once the actors are created."""
        return [(place["address"], place["pid"]) for place in self._places]

    def create(self) -> EngineChannel:
        """Makes the actors in the placement group's bundles; returns the channel that they will serve."""
        for rank, bundle in enumerate(self._placement.bundle_specs):
            place = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=rank)
            # The bundle keeps the CPUs for them. An actor that took them would wait until Ray has noticed that those
            # of a group before it are free.
            actor = ray.remote(ShardActor).options(
                num_cpus=0,
                num_gpus=int(bundle.get("GPU", 0)),
                max_restarts=0,
                scheduling_strategy=place,
                runtime_env=ray_session.rank_environment(),
            )
            # Plain data: a tensor among it would be unpickled before the rank has chosen its GPU, and so would have the
            # process take memory of the first one, all ranks of the same (ray#63810).
            with self._making():
                self._actors.append(actor.remote(rank, self._spec, max(1, int(bundle["CPU"])), EngineProcess.own()))
        self._places = self._all("place")
        transport = "ipc" if self._node_ids() == {self._here()} else "tcp"
        with self._making():
            self._channel = ZmqEngineChannel(len(self._actors), transport, ray.util.get_node_ip_address())
        return self._channel

    def load(self, progress: Progress | None) -> None:
        """As :meth:`ShardGroup.load <headwise.cluster.group.ShardGroup.load>`, of ranks that are created."""
        assert self._channel is not None, "create() comes first"
        opened = self._actors[0].open_rendezvous.remote(self._collectives(), self.nodes[0])
        self._rendezvous = self._wait([opened])[0]
        loads = [
            actor.load.remote(
                self._channel.endpoint(rank), self._rendezvous, self._start_timeout_s, sharing, self.processes
            )
            for rank, (actor, sharing) in enumerate(zip(self._actors, self._ranks_on_host(), strict=True))
        ]
        self._wait(loads, progress or (lambda done, total: None))

    def run(self) -> list[Any]:
        """Has every rank serve the channel; returns Ray's references of the calls, which last until :meth:`end`."""
        with self._making():
            self._runs = [actor.run.remote() for actor in self._actors]
        return self._runs

    def stopped(self) -> int | None:
        """The first rank whose process is stopped, as by SIGSTOP, of those on this host; None if there is none, or it
        cannot be told, as where too many files are open."""
        for rank, place in enumerate(self._places):
            with contextlib.suppress(Exception):
                if place["node_id"] == self._here() and psutil.Process(place["pid"]).status() == psutil.STATUS_STOPPED:
                    return rank
        return None

    def end(self, ask: bool) -> None:
        """Waits until the ranks' processes are gone, on every node, and closes the channel.

        Args:
            ask: tell the ranks that run to close, and give them CLOSE_TIMEOUT_S for it, before all actors are killed.
        """
        with self._lock:
            self._over = True
        try:
            if ray.is_initialized():
                self._end_actors(ask)
        finally:
            if self._channel is not None:
                self._channel.close()

    @contextlib.contextmanager
    def _making(self) -> Iterator[None]:
        """
        Raises:
            ShardGroupDied: :meth:`end` was called meanwhile, and would not end what is made now.
        """
        with self._lock:
            if self._over:
                raise ShardGroupDied(None, None, CLOSED)
            yield

    def _collectives(self) -> str:
        if len(self._actors) == 1:
            return "solo"
        if self._spec.device == "cuda":
            return "nccl"
        return "shared_memory" if len(self._node_ids()) == 1 else "gloo"

    def _ranks_on_host(self) -> list[list[int]]:
        """By rank, which ranks are on its host. A host is an address: all of Ray's nodes there share its memory."""
        return [[peer for peer, there in enumerate(self.nodes) if there == node] for node in self.nodes]

    def _node_ids(self) -> set[str]:
        return {place["node_id"] for place in self._places}

    def _here(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    def _all(self, method: str, *args: Any) -> list[Any]:
        return self._wait([getattr(actor, method).remote(*args) for actor in self._actors])

    def _wait(self, refs: list[Any], progress: Progress | None = None) -> list[Any]:
        """The results in order; the first error, whichever rank it comes from, ends the wait.

        Raises:
            GroupStartError: nothing was heard of any rank for SILENCE_TIMEOUT_S.
            ShardGroupDied: nor for STOPPED_TIMEOUT_S, and a rank's process is stopped.
        """
        self._refs += refs
        waiting, heard = list(refs), time.monotonic()
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=0.05)
            for ref in ready:
                self._get(ref, refs.index(ref))
                heard = time.monotonic()
            while progress is not None and self._channel is not None and (got := self._channel.receive(0)):
                if got[0] == Kind.PROGRESS:
                    progress(*msgpack.unpackb(got[2]))
                    heard = time.monotonic()
            silent_s = time.monotonic() - heard
            if waiting and silent_s > STOPPED_TIMEOUT_S and (stopped := self.stopped()) is not None:
                raise self._death(stopped, f"its process is stopped, and no rank was heard of for {silent_s:.0f} s")
            if waiting and silent_s > SILENCE_TIMEOUT_S:
                silent = [rank for rank, ref in enumerate(refs) if ref in waiting]
                raise GroupStartError(
                    f"ranks {silent} of {self._spec.tensor_parallel_size} have not started, and nothing was heard of "
                    f"them for {SILENCE_TIMEOUT_S:g} s; look at their logs, and whether {self._spec.model_dir} can be "
                    "read on their nodes"
                )
        return [ray.get(ref) for ref in refs]

    def _get(self, ref: Any, rank: int) -> Any:
        """
        Raises:
            ShardGroupDied: the rank's process is gone, or a peer's; else what the rank itself raised.
        """
        try:
            return ray.get(ref)
        except RayTaskError as error:
            if isinstance(error.cause, PeerDiedError):
                raise self._death(*death_of(rank, error.cause)) from None
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except RayActorError as error:
            raise self._death(rank, first_lines(error)) from None

    def _death(self, rank: int, cause: str) -> ShardGroupDied:
        return ShardGroupDied(rank, self.nodes[rank] if self._places else "unknown", cause)

    def _end_actors(self, ask: bool) -> None:
        if ask and self._runs and self._channel is not None:
            with contextlib.suppress(ChannelError, RayError):
                self._channel.send_all(Kind.CLOSE, b"")
                ray.wait(self._runs, num_returns=len(self._runs), timeout=CLOSE_TIMEOUT_S)
        for actor in self._actors:
            with contextlib.suppress(RayError):
                ray.kill(actor, no_restart=True)
        for ref in (*self._refs, *self._runs):  # Ray logs an error that nobody asked for
            with contextlib.suppress(Exception):
                ray.get(ref, timeout=CLOSE_TIMEOUT_S)
        rendezvous, self._rendezvous = self._rendezvous, None  # which another thread may be ending, too
        if rendezvous is not None:
            Rendezvous(**rendezvous).close()  # ranks killed before all had met leave a file, if it is here
        self._actors, self._runs, self._refs = [], [], []
        places, self._places = self._places, []
        await_on_nodes(places)


def await_on_nodes(places: list[dict[str, Any]]) -> None:
    """Waits until processes are gone: what they hold, such as a GPU's memory or the disk tier's folder, others may want
    at once.

    Args:
        places: ``node_id``, ``pid`` and ``born`` of each, as :func:`await_processes` takes them.
    """
    nodes: dict[str, list[tuple[int, float | None]]] = {}
    for place in places:
        nodes.setdefault(place["node_id"], []).append((place["pid"], place["born"]))
    local, tasks = nodes.pop(str(ray.get_runtime_context().get_node_id()), []), dict[str, Any]()
    for node in nodes.keys() & {node["NodeID"] for node in ray.nodes() if node["Alive"]}:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        task = ray.remote(await_processes).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
        tasks[node] = task.remote(nodes[node])
    alive = await_processes(local)
    for node, ref in tasks.items():
        try:
            alive += ray.get(ref, timeout=_TASK_TIMEOUT_S + 2 * CLOSE_TIMEOUT_S)
        except RayError as error:
            _logger.warning("whether the ranks on node %s have ended is unknown: %s", node, first_lines(error))
    if alive:
        _logger.warning("processes %s of ranks that were killed are not gone", alive)


def await_processes(processes: list[tuple[int, float | None]]) -> list[int]:
    """Waits until processes of this host, given by id and time of creation, are gone; kills those that are not in time.
    Without that time, it is of a process that was there a moment ago. Then removes what they have left: Ray kills the
    wardens of the processes that it kills.

    Returns:
        The ids of those that are not gone even so.
    """
    running = []
    for pid, born in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if born is None or process.create_time() == born:  # and not another that has its id now
                running.append(process)
    _, alive = psutil.wait_procs(running, timeout=CLOSE_TIMEOUT_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(alive, timeout=CLOSE_TIMEOUT_S)
    if processes:
        sweep()
    return [process.pid for process in alive]
