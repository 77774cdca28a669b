"""Deployment: several replicas as one engine. Events come in, instructions and deltas go out; no I/O, one thread.

It has the methods by which an :class:`~headwise.runtime.async_model.AsyncModel` uses an engine. The fleet decides which
replicas there are, the router which of them computes a request, and the dispatcher keeps the books of the requests.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

from headwise.runtime.deployment.autoscale import Autoscaler, Look
from headwise.runtime.deployment.control import ReplicaStatus, ShardPlace, Status
from headwise.runtime.deployment.dispatcher import Dispatcher
from headwise.runtime.deployment.fleet import Fleet, Member
from headwise.runtime.deployment.instructions import Instruction, Send
from headwise.runtime.deployment.messages import Output, Report, ResetPrefixCache
from headwise.runtime.deployment.options import ReplicaOptions
from headwise.runtime.deployment.prefill_pool import PrefillPool
from headwise.runtime.deployment.stats import done, merged
from headwise.runtime.engine.engine import Sink
from headwise.runtime.engine.request import Request
from headwise.runtime.engine.text import Delta, TextStream
from headwise.runtime.kv.events import KvMessage, KvSnapshot
from headwise.runtime.routing.load import LoadReport
from headwise.runtime.routing.router import Router
from headwise.workers.errors import InvalidValueError

LOOK_S = 1.0
"""How often it is looked how many replicas there are to be."""
DEMAND_S = 30.0
"""Over which the tokens that come and go a second are averaged."""

Heard = Output | Report | KvMessage | KvSnapshot
"""What a replica says."""


class Deployment:
    """Attributes: ``out``: instructions that are still to be carried out, in order."""

    def __init__(
        self,
        options: ReplicaOptions,
        block_size: int,
        max_num_seqs: int,
        clock: Callable[[], float] = time.monotonic,
        router: Router | None = None,
    ) -> None:
        """
        Args:
            max_num_seqs: requests that a replica computes at a time.
            router: that knows nothing yet, and routes in a way of its own.
        """
        self.out: list[Instruction] = []
        self._options, self._rows, self._clock = options, max_num_seqs, clock
        self._router = router or Router(block_size)
        self._dispatcher = Dispatcher(self._router, self.out)
        names, drain_s = itertools.count(1), options.drain_timeout_s
        self._fleet = Fleet(self._dispatcher, self.out, drain_s, "decode" if options.prefill else "both", names)
        self._prefill = PrefillPool(self.out, drain_s, names)
        self._fleets = self._fleet, self._prefill.fleet
        self._autoscaler = Autoscaler(options.least, options.most) if options.autoscale else None
        self._looked, self._tokens, self._demand = clock(), 0, 0.0
        self._done = merged([])  # by replicas that are gone
        self._prefill.fleet.scale(options.prefill, self._now())
        self._fleet.scale(options.replicas, self._now())

    @property
    def num_waiting(self) -> int:
        """Requests that no replica has computed a token for, since they came or lost their replica."""
        return self._dispatcher.num_waiting

    def num_waiting_of(self, tenant: str) -> int:
        """Those of them that a tenant asked for."""
        return self._dispatcher.num_waiting_of(tenant)

    @property
    def settled(self) -> bool:
        """Whether no replica is being started just now."""
        return all(fleet.settled for fleet in self._fleets)

    @property
    def abouts(self) -> list[dict[str, Any]]:
        """What the replicas said of themselves that take requests. May be read by other threads."""
        return [member.about for member in [*self._fleet.members.values()] if member.state == "serving"]

    def add(self, request: Request, text: TextStream | None, sink: Sink) -> None:
        """Computes a request, whose key no other may have. Its deltas go to ``sink``."""
        self._now()
        self._tokens += len(request.prompt_token_ids)
        self._dispatcher.add(request, text, sink)

    def abort(self, request_id: str) -> None:
        """Ends every sample of a request that still runs; each gets its last delta. Unknown ids are ignored."""
        self._now()
        self._dispatcher.abort(request_id)

    def pause(self, request_id: str, paused: bool) -> None:
        """Has nothing computed for a request until it is called with False. Unknown ids are ignored."""
        self._dispatcher.pause(request_id, paused)

    def reset_prefix_cache(self) -> None:
        """Forgets every cached block of every replica."""
        for member in self._members():
            if member.about and member.state != "ended":
                self.out.append(Send(member.name, ResetPrefixCache()))

    def started(self, name: str, node: str, pid: int, about: dict[str, Any]) -> bool:
        """A replica can compute. Returns False if it has died since."""
        now = self._now()
        lives = any(fleet.started(name, node, pid, about, now) for fleet in self._fleets)
        self._tell_peers()
        return lives

    def start_failed(self, name: str, problem: str, no_room: bool = False) -> None:
        """A replica could not be started. Args: ``no_room``: the cluster has no room for it, beside the others."""
        now = self._now()
        for fleet in self._fleets:
            fleet.start_failed(name, problem, no_room, now)
        self._tell_peers()

    def died(self, name: str, cause: str) -> None:
        """A replica's process is gone, or of no use any more."""
        now = self._now()
        for fleet in self._fleets:
            fleet.died(name, cause, now)
        self._tell_peers()

    def closed(self, name: str) -> None:
        """A replica's process is gone, and what it had is free."""
        member = self._fleet.members.get(name)
        if member is not None and member.stats is not None:
            self._done = merged([self._done, done(member.stats)])
        now = self._now()
        for fleet in self._fleets:
            fleet.closed(name, now)

    def unsendable(self, number: int, reason: str) -> None:
        """A request cannot be sent to any replica."""
        self._now()
        self._dispatcher.fail(number, reason)

    def heard(self, name: str, message: Heard) -> None:
        """A replica has sent this."""
        now = self._now()
        match message:
            case Output(deltas):
                self._tokens += sum(len(delta.token_ids) for delta in deltas)
                if self._dispatcher.output(name, deltas) and not (member := self._fleet.members[name]).proven:
                    member.proven = True
            case Report():
                if self._fleet.report(name, message, now) is not None:
                    load = message.received, message.queued_tokens, message.running, message.token_s, message.row_s
                    self._router.load(name, LoadReport(*load))
                else:
                    self._prefill.report(name, message, now)
            case KvMessage():
                self._dispatcher.follow(self._router.kv_message(name, message))
            case KvSnapshot():
                self._dispatcher.follow(self._router.kv_snapshot(name, message))

    def tick(self) -> None:
        """Does what is due. Call it some ten times a second."""
        now = self._now()
        for fleet in self._fleets:
            fleet.settle(now)
        self._tell_peers()
        self._dispatcher.place_held()
        if now - self._looked >= LOOK_S:
            self._look(now)

    def take_deltas(self) -> dict[Sink, list[Delta]]:
        """What is new of the requests since the last call."""
        return self._dispatcher.take_deltas()

    def scale(self, replicas: int) -> None:
        """So many replicas are wanted from now on.

        Raises:
            InvalidValueError: there may not be so many, or so few.
        """
        least, most = self._options.least, self._options.most
        if not least <= replicas <= most:
            fix = "start the server with other --min-replicas and --max-replicas" if self._autoscaler else None
            raise InvalidValueError("replicas", replicas, f"must be from {least} to {most}", *([fix] if fix else []))
        self._fleet.scale(replicas, self._now())

    def restart(self) -> None:
        """Begins to replace each replica by another, one after another.

        Raises:
            InvalidValueError: that is under way already.
        """
        now = self._now()
        for fleet in sorted(self._fleets, key=lambda fleet: not fleet.restarting):  # who refuses it, first
            fleet.restart(now)

    def status(self) -> Status:
        """How it is now."""
        now, options = self._now(), self._options
        return Status(
            wanted=self._fleet.wanted,
            min_replicas=options.least if options.autoscale else None,
            max_replicas=options.most if options.autoscale else None,
            waiting=self._dispatcher.num_held,
            restarting=any(fleet.restarting for fleet in self._fleets),
            routing=self._router.stats(),
            replicas=[self._status(member, fleet, now) for fleet in self._fleets for member in fleet.shown()],
        )

    def stats(self) -> dict[str, Any]:
        """As ``Engine.stats``, of all replicas together, those that are gone among them. Besides, ``replicas`` has the
        status of each, and ``routing`` what the router counts. ``prefill`` has the counts of prefill replicas that
        are there. What replicas have done is up to a second old."""
        reports = [member.report for member in self._fleet.members.values() if member.report is not None]
        status = self.status()
        total = merged([self._done, *(m.stats for m in self._fleet.members.values() if m.stats is not None)])
        rebuilding = {"rebuilding": not self._fleet.serving()}
        prefill = merged(m.stats for m in self._prefill.fleet.members.values() if m.stats is not None)
        return (
            total
            | ({"prefill": prefill} if self._options.prefill else {})
            | {
                "num_running": self._dispatcher.num_running,
                "num_waiting": self._dispatcher.num_waiting,
                "num_blocks": sum(report.num_blocks for report in reports),
                "num_free_blocks": sum(report.num_free_blocks for report in reports),
                "recoveries": total["recoveries"] | rebuilding,
                "replicas": status["replicas"],
                "routing": status["routing"],
            }
        )

    def check(self) -> None:
        """
        Raises:
            AssertionError: the books of the requests do not add up.
        """
        self._dispatcher.check()

    def _now(self) -> float:
        self._dispatcher.now = now = self._clock()
        return now

    def _members(self) -> list[Member]:
        return [member for fleet in self._fleets for member in fleet.members.values()]

    def _tell_peers(self) -> None:
        """Has decode replicas told of prefill replicas that have come or gone."""
        if self._options.prefill:
            self._prefill.tell([*self._fleet.members.values()])

    def _status(self, member: Member, fleet: Fleet, now: float) -> ReplicaStatus:
        report, stats = member.report, member.stats or merged([])
        cache, begun = stats["prefix_cache"], self._dispatcher.num_begun(member.name)
        waiting = self._dispatcher.num_requests(member.name) - begun
        if fleet.role == "prefill" and report is not None:
            begun, waiting = report.running, report.waiting
        shards = stats.get("shards", member.about.get("shards", []))
        return ReplicaStatus(
            name=member.name,
            role=fleet.role,
            state=member.state,
            node=member.node,
            pid=member.pid,
            since_s=now - member.since,
            tensor_parallel_size=member.about.get("tensor_parallel_size", 0),
            epoch=report.epoch if report is not None else member.about.get("epoch", 0),
            running=begun,
            waiting=waiting,
            queued_tokens=report.queued_tokens if report is not None else 0,
            kv_blocks=report.num_blocks if report is not None else member.about.get("num_blocks", 0),
            kv_free_blocks=report.num_free_blocks if report is not None else member.about.get("num_blocks", 0),
            queried_tokens=cache["queried_tokens"],
            hit_tokens=cache["hit_tokens"],
            generated_tokens=stats["num_generated_tokens"],
            recoveries=stats["recoveries"].get("count", 0),
            problem=member.problem,
            shards=[ShardPlace(rank=shard["rank"], node=shard["node"], pid=shard["pid"]) for shard in shards],
        )

    def _look(self, now: float) -> None:
        """Has as many replicas as the load needs."""
        seconds, self._looked = now - self._looked, now
        self._demand += (self._tokens / seconds - self._demand) * min(1.0, seconds / DEMAND_S)
        self._tokens = 0
        if self._autoscaler is None or self._fleet.restarting:
            return
        dispatcher = self._dispatcher
        can_be = max(self._options.least, self._fleet.wanted - self._fleet.num_given_up)
        if can_be < self._fleet.wanted:  # nothing is tried there any more, and no nodes need to be kept for it
            self._fleet.scale(can_be, now)
        serving, wanted = self._fleet.serving(), self._fleet.wanted
        reports = [member.report for member in serving if member.report is not None]
        token_s = {m.name: m.report.token_s for m in serving if m.report is not None and m.report.token_s is not None}
        blocks, free = sum(one.num_blocks for one in reports), sum(one.num_free_blocks for one in reports)
        look = Look(
            now=now,
            wanted=wanted,
            serving=len(serving),
            wait_s=dispatcher.longest_wait_s(token_s),
            kv_use=1 - free / blocks if blocks else 0.0,
            requests=dispatcher.num_running + dispatcher.num_waiting,
            rows=self._rows,
            demand=self._demand,
        )
        if (then := self._autoscaler.wanted(look)) != wanted:
            self._fleet.scale(then, now)
