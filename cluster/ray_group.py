"""A group of shards in Ray actors, one a rank: placed, connected, loaded, watched and ended together."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from typing import Any

import msgpack
import psutil
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from headwise.cluster import ray_session
from headwise.cluster.actor import ShardActor
from headwise.cluster.channel import ChannelError, EngineChannel, Kind
from headwise.cluster.group import GroupStartError, Progress, ShardGroup, ShardGroupDied, TransferResults
from headwise.workers.collectives import Rendezvous
from headwise.workers.errors import PeerDiedError
from headwise.workers.kv.transfer import TransferJob, TransferResult, decode_result, encode_job
from headwise.workers.plan import StepOutput, StepPlan, decode_output, encode_plan
from headwise.workers.spec import ShardSpec

CLOSE_TIMEOUT_S = 5.0
"""How long ranks get to end by themselves before they are killed, and killed ones to be gone."""

QUERY_TIMEOUT_S = 30.0


class RayShardGroup(ShardGroup):
    """One actor a rank in one placement group, on one node where that fits."""

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
        self._tp = spec.tensor_parallel_size
        self._session: ray_session.RaySession | None = None
        self._placement: PlacementGroup | None = None
        self._actors: list[Any] = []
        self._places: list[dict[str, Any]] = []
        self._rendezvous: dict[str, Any] | None = None
        self._runs: list[Any] = []
        self._refs: list[Any] = []
        self._channel: EngineChannel | None = None
        self._death: ShardGroupDied | None = None
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None
        self._received: dict[Kind, deque[tuple[int, bytes]]] = {Kind.OUTPUT: deque(), Kind.REPLY: deque()}
        self._transferred = TransferResults(self._tp)

    def start(self, progress: Progress | None = None, num_blocks: int | None = None) -> int:
        self._session = ray_session.join(self._address)
        self._place()
        self._places = self._all("place")
        transport = "ipc" if self._nodes() == {ray.get_runtime_context().get_node_id()} else "tcp"
        self._channel = EngineChannel(self._tp, transport, ray.util.get_node_ip_address())
        kind, host = self._collectives(), self._places[0]["address"]
        self._rendezvous = self._wait([self._actors[0].open_rendezvous.remote(kind, host)])[0]
        loads = [
            actor.load.remote(self._channel.endpoint(rank), self._rendezvous, self._start_timeout_s)
            for rank, actor in enumerate(self._actors)
        ]
        affordable = min(self._wait(loads, progress))
        blocks = min(affordable, num_blocks or affordable)
        self._all("allocate", blocks)
        self._runs = [actor.run.remote() for actor in self._actors]
        self._watcher = threading.Thread(target=self._watch, name="headwise-watch", daemon=True)
        self._watcher.start()
        return int(blocks)

    def submit(self, plan: StepPlan) -> None:
        self._send_all(Kind.STEP, encode_plan(plan))

    def collect(self) -> StepOutput:
        return decode_output(self._receive(Kind.OUTPUT, None)[1])

    def query(self, method: str) -> list[Any]:
        self._send_all(Kind.QUERY, method.encode())
        replies = dict(self._receive(Kind.REPLY, QUERY_TIMEOUT_S) for _ in range(self._tp))
        return [msgpack.unpackb(replies[rank]) for rank in range(self._tp)]

    def transfer(self, job: TransferJob) -> None:
        self._send_all(Kind.TRANSFER, encode_job(job))

    def transferred(self, timeout_s: float) -> TransferResult | None:
        deadline = time.monotonic() + timeout_s
        while (result := self._transferred.take()) is None:
            left = max(0.0, deadline - time.monotonic())
            if not self._sort_one(left) and time.monotonic() >= deadline:
                return None
        return result

    @property
    def death(self) -> ShardGroupDied | None:
        return self._death

    def close(self) -> None:
        self._closing.set()
        # Whatever fails or interrupts one of these, the others are done; the last pushed is the first.
        with contextlib.ExitStack() as stack:
            stack.callback(self._leave_ray)
            stack.callback(self._remove_placement)
            stack.callback(self._close_channel)
            stack.callback(self._end_actors)

    def _leave_ray(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.leave()

    def _remove_placement(self) -> None:
        placement, self._placement = self._placement, None
        if placement is not None and ray.is_initialized():
            remove_placement_group(placement)

    def _close_channel(self) -> None:
        if self._watcher is not None:
            self._watcher.join(CLOSE_TIMEOUT_S)
        channel, self._channel, self._watcher = self._channel, None, None
        if channel is not None:
            channel.close()

    def _place(self) -> None:
        gpu = self._spec.device == "cuda"
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if self._cpus is None:
            cores = max(node.get("CPU", 1.0) for node in nodes)
            # Ray counts in ten-thousandths: three thirds of a core, rounded up, would not fit in it.
            self._cpus = 1.0 if gpu else math.floor(cores / self._tp * 10_000) / 10_000
        bundle = {"CPU": self._cpus} | ({"GPU": 1.0} if gpu else {})
        wanted = {name: amount * self._tp for name, amount in bundle.items()}
        fits = any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in nodes)
        self._placement = placement_group([bundle] * self._tp, strategy="STRICT_PACK" if fits else "PACK")
        if not self._placement.wait(self._start_timeout_s):
            raise GroupStartError(
                f"{self._tp} ranks want {_amounts(wanted)}; the cluster has {_amounts(ray.cluster_resources())} in "
                f"{len(nodes)} nodes, of which {_amounts(ray.available_resources())} are free, and start_timeout="
                f"{self._start_timeout_s:g} s have passed; lower cpus_per_rank={self._cpus:g} (--cpus-per-rank) or "
                "tensor_parallel_size (--tp), or add nodes"
            )
        for rank in range(self._tp):
            place = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=rank)
            actor = ray.remote(ShardActor).options(
                num_cpus=self._cpus, num_gpus=int(gpu), max_restarts=0, scheduling_strategy=place
            )
            self._actors.append(actor.remote(rank, self._spec, max(1, int(self._cpus))))

    def _collectives(self) -> str:
        if self._tp == 1:
            return "solo"
        if self._spec.device == "cuda":
            return "nccl"
        return "shared_memory" if len(self._nodes()) == 1 else "gloo"

    def _nodes(self) -> set[str]:
        return {place["node_id"] for place in self._places}

    def _all(self, method: str, *args: Any) -> list[Any]:
        return self._wait([getattr(actor, method).remote(*args) for actor in self._actors])

    def _wait(self, refs: list[Any], progress: Progress | None = None) -> list[Any]:
        """The results in order; the first error, whichever rank it comes from, ends the wait."""
        self._refs += refs
        waiting = list(refs)
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=0.05)
            for ref in ready:
                self._get(ref, refs.index(ref))
            while progress is not None and self._channel is not None and (got := self._channel.receive(0)):
                if got[0] == Kind.PROGRESS:
                    progress(*msgpack.unpackb(got[2]))
        return [ray.get(ref) for ref in refs]

    def _get(self, ref: Any, rank: int) -> Any:
        """
        Raises:
            ShardGroupDied: the rank's process is gone; else what the rank itself raised.
        """
        try:
            return ray.get(ref)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except RayActorError as error:
            raise self._died(rank, _first_line(error)) from None

    def _send_all(self, kind: Kind, payload: bytes) -> None:
        """
        Raises:
            ShardGroupDied: a rank died, or does not read what it is sent.
        """
        assert self._channel is not None, "start() comes first"
        if self._death is None:
            try:
                self._channel.send_all(kind, payload)
                return
            except ChannelError as error:
                self._death = self._death or self._died(0, str(error))
        raise self._death

    def _receive(self, kind: Kind, timeout_s: float | None) -> tuple[int, bytes]:
        """The next message of a kind, with its rank.

        Raises:
            ShardGroupDied: a rank died or reported an error instead, or did not answer in time.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._received[kind]:
            if not self._sort_one(1.0) and deadline is not None and time.monotonic() > deadline:
                raise self._died(0, f"no {kind.name} within {timeout_s:g} s")
        return self._received[kind].popleft()

    def _sort_one(self, timeout_s: float) -> bool:
        """Puts the next message where its kind belongs; False if none came in time.

        Raises:
            ShardGroupDied: a rank died or reported an error.
        """
        assert self._channel is not None, "start() comes first"
        got = self._channel.receive(timeout_s)
        if got is not None and got[0] == Kind.ERROR:
            rank, cause = msgpack.unpackb(got[2])
            self._death = self._death or self._died(rank, cause)
        if self._death is not None and not (got is not None and got[0] in self._received):
            raise self._death
        if got is None:
            return False
        if got[0] == Kind.TRANSFERRED:
            self._transferred.add(decode_result(got[2]))
        elif got[0] in self._received:
            self._received[got[0]].append((got[1], got[2]))
        return True

    def _watch(self) -> None:
        """Notices, on a thread of its own, a rank whose run() ends before the group closes."""
        rank, cause = 0, ""
        while not cause and not self._closing.is_set():
            try:
                ready, _ = ray.wait(self._runs, timeout=0.25)
                if ready:
                    rank = self._runs.index(ready[0])
                    ray.get(ready[0])
                    cause = "its run() returned"
            except RayTaskError as error:
                root = error.cause
                rank, cause = (root.rank, root.cause) if isinstance(root, PeerDiedError) else (rank, _first_line(error))
            except Exception as error:  # Ray itself may be gone
                cause = _first_line(error)
        if cause and not self._closing.is_set():
            self._death = self._death or self._died(rank, cause)
            if self._channel is not None:
                self._channel.wake()

    def _died(self, rank: int, cause: str) -> ShardGroupDied:
        node = self._places[rank]["address"] if self._places else "unknown"
        return ShardGroupDied(rank, node, cause)

    def _end_actors(self) -> None:
        """Asks every rank to end, kills those that do not, and waits until the processes on this host are gone."""
        if not ray.is_initialized():
            return
        if self._runs and self._channel is not None and self._death is None:
            with contextlib.suppress(ChannelError, RayError):
                self._channel.send_all(Kind.CLOSE, b"")
                ray.wait(self._runs, num_returns=len(self._runs), timeout=CLOSE_TIMEOUT_S)
        for actor in self._actors:
            with contextlib.suppress(RayError):
                ray.kill(actor, no_restart=True)
        for ref in (*self._refs, *self._runs):  # Ray logs an error that nobody asked for
            with contextlib.suppress(Exception):
                ray.get(ref, timeout=CLOSE_TIMEOUT_S)
        if self._rendezvous is not None:
            Rendezvous(**self._rendezvous).close()  # ranks killed before all had met leave a file, if it is here
        self._actors, self._runs, self._refs, self._rendezvous = [], [], [], None
        here, processes = ray.get_runtime_context().get_node_id(), []
        for place in self._places:
            with contextlib.suppress(psutil.NoSuchProcess):
                if place["node_id"] == here:
                    processes.append(psutil.Process(place["pid"]))
        psutil.wait_procs(processes, timeout=CLOSE_TIMEOUT_S)


def _amounts(resources: dict[str, float]) -> str:
    return " and ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU") if name in resources)


def _first_line(error: Exception) -> str:
    """Ray's errors are pages; their first lines say what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines[:4]) or type(error).__name__
