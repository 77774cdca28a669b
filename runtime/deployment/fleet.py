"""Fleet: the replicas of a deployment, from their start to their end. No I/O, no clock of its own, one thread.

A deployment has *places*, as many as replicas are wanted. Each holds one replica; when that one dies, another takes its
place: at once if the dead one had computed something, else later and later, and after MAX_FAILURES in a row not at all.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from headwise.cluster.supervisor import BACKOFF_S, MAX_BACKOFF_S, MAX_FAILURES, SOUND_S
from headwise.runtime.deployment.control import Role, State
from headwise.runtime.deployment.instructions import (
    AskForNodes,
    CancelStart,
    EndReplica,
    GiveUp,
    Instruction,
    StartReplica,
)
from headwise.runtime.deployment.messages import Report
from headwise.workers.errors import InvalidValueError

SILENCE_S = 10.0
"""Without a report for so long a replica counts as dead."""

_logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Member:
    """A replica of the deployment.

    Attributes:
        place: number of its place.
        since: when it came into its state.
        about: what it said of itself when it had started; empty before.
        problem: what it died of, or why it could not be started.
        heard: when it last reported.
        drain_until: when its requests are moved to others, if it drains.
        proven: whether it has computed something.
        report: the last.
        stats: the last that came with a report.
    """

    name: str
    place: int
    state: State
    since: float
    node: str = ""
    pid: int = 0
    about: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    heard: float = 0.0
    drain_until: float = 0.0
    proven: bool = False
    report: Report | None = None
    stats: dict[str, Any] | None = None

    @property
    def most_tokens(self) -> int:
        """Of a request that it can compute, once it has said something of itself. A later group of its shards may have
        less memory."""
        if self.about.get("endless"):  # keys and values of any text fit
            return int(self.about["max_model_len"])
        num_blocks = self.report.num_blocks if self.report is not None else self.about["num_blocks"]
        return min(int(self.about["max_model_len"]), int(num_blocks * self.about["block_size"]))


@dataclass(slots=True, eq=False)
class Place:
    """
    Attributes:
        member: the replica that is there, or was the last.
        failures: replicas in a row that could not be started, or died before they had computed anything.
        due: when the next is started; None: there is one, or none is tried any more.
        after: the replica whose process must be gone before, as it may have the room for the next.
    """

    number: int
    member: Member | None = None
    failures: int = 0
    due: float | None = None
    after: str | None = None


class Routes(Protocol):
    """Who sends requests to replicas, and is told which take some."""

    def joined(self, name: str, most_tokens: int) -> None:
        """It takes requests. Args: ``most_tokens``: of the prompt and the output of each."""

    def draining(self, name: str) -> None:
        """It gets no new ones, and ends those it has."""

    def rebuilding(self, name: str) -> None:
        """It computes nothing for now."""

    def left(self, name: str, died: bool) -> None:
        """It computes nothing any more. Args: ``died``: maybe by one of its requests."""

    def num_requests(self, name: str) -> int:
        """How many it has."""


@dataclass(slots=True)
class _Restart:
    """A rolling restart: ``todo`` names replicas that are to be replaced; ``next`` starts in the place of ``old``."""

    todo: list[str]
    old: Member | None = None
    next: Member | None = None


class Fleet:
    """Decides which replicas of a role are started and ended. The instructions go to ``out``.

    Attributes:
        members: by name, from the start to the end.
        places: what is wanted.
        role: of each of them.
    """

    def __init__(
        self,
        routes: Routes,
        out: list[Instruction],
        drain_timeout_s: float,
        role: Role = "both",
        names: Iterator[int] | None = None,
    ) -> None:
        """Args: ``names``: numbers for names that no other fleet gives; None: there is no other."""
        self.role: Role = role
        self.members: dict[str, Member] = {}
        self.places: list[Place] = []
        self._routes, self._out, self._drain_timeout_s = routes, out, drain_timeout_s
        self._names = names or itertools.count(1)
        self._restart: _Restart | None = None
        self._looked: float | None = None
        self._gave_up = False

    @property
    def wanted(self) -> int:
        """How many replicas are wanted."""
        return len(self.places)

    @property
    def num_given_up(self) -> int:
        """Places where no replica is tried any more."""
        return sum(map(self._given_up, self.places))

    @property
    def restarting(self) -> bool:
        """Whether a rolling restart is under way."""
        return self._restart is not None

    @property
    def settled(self) -> bool:
        """Whether each place has its replica, or nobody starts one there just now."""
        return all(member.state != "starting" for member in self.members.values())

    def serving(self) -> list[Member]:
        """The replicas that take requests."""
        return [member for member in self.members.values() if member.state == "serving"]

    def shown(self) -> Iterator[Member]:
        """Every replica, and the last one of each place that has none now."""
        yield from self.members.values()
        for place in self.places:
            if place.member is not None and place.member.name not in self.members:
                yield place.member

    def scale(self, wanted: int, now: float) -> None:
        """So many replicas are wanted from now on. Places where no replica could be started are tried again."""
        # Ray has nodes added for the ranks of prefill replicas when these have no place yet.
        if wanted != len(self.places) and self.role != "prefill":
            self._out.append(AskForNodes(wanted))
        while len(self.places) < wanted:
            self.places.append(Place(self._free_number(), due=now))
        while len(self.places) > wanted:
            self._remove(min(self.places, key=self._worth), now)
        self._try_again(now)
        self.settle(now)

    def restart(self, now: float) -> None:
        """Begins to replace each replica by another, one after another. It is over before its time if one cannot be
        started.

        Raises:
            InvalidValueError: that is under way already.
        """
        if self._restart is not None:
            limit = "a rolling restart is under way, and has to end first"
            raise InvalidValueError("restart", f"{len(self._restart.todo)} replicas to go", limit)
        self._restart = _Restart([place.member.name for place in self.places if place.member is not None])
        self._try_again(now)
        self.settle(now)

    def started(self, name: str, node: str, pid: int, about: dict[str, Any], now: float) -> bool:
        """A replica can compute. Returns False if it has died since."""
        member = self.members.get(name)
        if member is None or member.state == "ended":
            return False
        member.node, member.pid, member.about, member.heard = node, pid, about, now
        if member.state == "draining":  # nobody wants it any more
            self._end(member, True, now)
        else:
            _logger.info("%s serves, with process %d on %s", name, pid, node)
            self._to(member, "serving", now)
            self._routes.joined(name, member.most_tokens)
            self._succeed(member, now)
        self.settle(now)
        return True

    def start_failed(self, name: str, problem: str, no_room: bool, now: float) -> None:
        """A replica could not be started. Args: ``no_room``: the cluster has no room for it, beside the others."""
        member = self.members.pop(name, None)
        if member is None or member.state == "ended":
            return
        wanted = member.state != "draining"
        self._to(member, "ended", now)
        member.problem = problem
        if (restart := self._restart) is not None and restart.next is member:
            self._restart_failed(restart, problem, no_room, now)
        elif wanted:
            _logger.warning("%s could not be started: %s", name, problem)
            self._failed(member, now)
        self.settle(now)

    def died(self, name: str, cause: str, now: float) -> None:
        """A replica's process is gone, or of no use any more."""
        member = self.members.get(name)
        if member is None or member.state == "ended":
            return
        _logger.warning("%s has died: %s", name, cause)
        state, restart = member.state, self._restart
        proven = member.proven or (state == "serving" and now - member.since >= SOUND_S)
        member.problem = cause
        self._end(member, False, now)
        self._routes.left(name, True)
        if restart is not None and restart.next is member:
            self._restart_failed(restart, cause, False, now)
        elif state != "draining":
            self._replace(member, proven, now)
        self.settle(now)

    def closed(self, name: str, now: float) -> None:
        """A replica's process is gone, and what it had is free."""
        self.members.pop(name, None)
        for place in self.places:
            if place.after == name:
                place.after = None
        self.settle(now)

    def report(self, name: str, report: Report, now: float) -> Member | None:
        """A replica says how it is. Returns it; None if it is gone."""
        member = self.members.get(name)
        if member is None or member.state == "ended":
            return None
        member.heard, member.report, member.stats = now, report, report.stats or member.stats
        if report.rebuilding and member.state == "serving":
            self._to(member, "rebuilding", now)
            self._routes.rebuilding(name)
        elif not report.rebuilding and member.state == "rebuilding":
            self._to(member, "serving", now)
            self._routes.joined(name, member.most_tokens)
        elif report.rebuilding and member.state == "draining":  # others compute what it has before it could
            member.drain_until = now
        return member

    def settle(self, now: float) -> None:
        """Does what is due. Call it a few times a second."""
        self._forgive(now)
        for member in [*self.members.values()]:
            if member.state == "draining" and member.about:
                self._look_at_drain(member, now)
            elif member.state in ("serving", "rebuilding") and now - member.heard > SILENCE_S:
                self.died(member.name, f"it has said nothing for {SILENCE_S:g} s", now)
        self._go_on_restarting(now)
        for place in self.places:
            if place.due is not None and place.due <= now and place.after is None:
                place.due, place.member = None, self._start(place, now)
        if self.role == "prefill":
            return  # without any, decode computes prompts itself
        if not self._gave_up and not self.members and all(map(self._given_up, self.places)):
            self._gave_up = True
            problems = "; ".join(f"{m.name}: {m.problem}" for p in self.places if (m := p.member) is not None)
            self._out.append(GiveUp(f"no replica is left, and none could be started {MAX_FAILURES} times: {problems}"))

    def _start(self, place: Place, now: float, extra: bool = False) -> Member:
        member = Member(f"replica-{next(self._names)}", place.number, "starting", now)
        self.members[member.name] = member
        self._out.append(StartReplica(member.name, place.number, extra, self.role))
        return member

    def _to(self, member: Member, state: State, now: float) -> None:
        member.state, member.since = state, now

    def _end(self, member: Member, ask: bool, now: float) -> None:
        self._to(member, "ended", now)
        self._out.append(EndReplica(member.name, ask))

    def _drain(self, member: Member, now: float) -> None:
        was, member.drain_until = member.state, now + self._drain_timeout_s
        self._to(member, "draining", now)
        if was == "starting":  # maybe for minutes, where there is no room for it
            self._out.append(CancelStart(member.name))
        elif was in ("serving", "rebuilding"):
            self._routes.draining(member.name)

    def _look_at_drain(self, member: Member, now: float) -> None:
        if self._routes.num_requests(member.name) and now < member.drain_until and now - member.heard <= SILENCE_S:
            return
        _logger.info("%s has drained, and ends", member.name)
        self._end(member, True, now)
        self._routes.left(member.name, False)

    def _replace(self, member: Member, proven: bool, now: float) -> None:
        """Has another take the place of a dead one."""
        restart = self._restart
        if restart is not None and restart.old is member:  # the next starts already
            self._place_of(member).member = restart.next
            restart.old = restart.next = None
            return
        place = self._place_of(member)
        place.after = member.name
        if proven:
            place.failures, place.due = 0, now
        else:
            self._failed(member, now)

    def _failed(self, member: Member, now: float) -> None:
        place = self._place_of(member)
        place.failures += 1
        if place.failures < MAX_FAILURES:
            place.due = now + min(MAX_BACKOFF_S, BACKOFF_S * 2 ** (place.failures - 1))
        else:
            _logger.error("%s was the last of %d in its place: none is started there", member.name, MAX_FAILURES)

    def _given_up(self, place: Place) -> bool:
        return place.failures >= MAX_FAILURES and place.due is None

    def _try_again(self, now: float) -> None:
        """Where no replica is tried any more, others are."""
        for place in self.places:
            if self._given_up(place):
                place.failures, place.due = 0, now
        self._gave_up = False

    def _place_of(self, member: Member) -> Place:
        return next(place for place in self.places if place.number == member.place)

    def _free_number(self) -> int:
        taken = {place.number for place in self.places} | {member.place for member in self.members.values()}
        return next(number for number in itertools.count(1) if number not in taken)

    def _worth(self, place: Place) -> tuple[int, int]:
        """Which place is given up first: one without a replica, one whose replica starts, then who has least to do."""
        member = place.member
        if member is None or member.name not in self.members or member.state == "ended":
            return 0, 0
        if member.state != "serving":
            return (1 if member.state == "starting" else 2), self._routes.num_requests(member.name)
        return 3, self._routes.num_requests(member.name)

    def _remove(self, place: Place, now: float) -> None:
        self.places.remove(place)
        restart = self._restart
        if restart is not None and restart.next is not None and restart.next.place == place.number:
            self._drain(restart.next, now)
            restart.old = restart.next = None
        member = place.member
        if member is not None and member.name in self.members and member.state != "ended":
            self._drain(member, now)

    def _go_on_restarting(self, now: float) -> None:
        if (restart := self._restart) is None or restart.next is not None:
            return
        if any(map(self._given_up, self.places)):
            _logger.error("the rolling restart was ended, as a replica could not be started")
            self._restart = None
            return
        if any(place.member is None or place.member.state != "serving" for place in self.places):
            return  # at most one is missing
        if any(member.state in ("draining", "ended") for member in self.members.values()):
            return  # and at most one is there beside those that are wanted
        due = {place.member.name: place for place in self.places if place.member is not None}
        while restart.todo:
            if (place_due := due.get(restart.todo.pop(0))) is not None:
                restart.old, restart.next = place_due.member, self._start(place_due, now, extra=True)
                return
        _logger.info("the rolling restart is over")
        self._restart = None

    def _succeed(self, member: Member, now: float) -> None:
        """A replica that serves takes the place of the one that it was started for."""
        restart = self._restart
        if restart is None or restart.next is not member:
            return
        assert restart.old is not None
        self._place_of(member).member = member
        self._drain(restart.old, now)
        restart.old = restart.next = None

    def _restart_failed(self, restart: _Restart, problem: str, no_room: bool, now: float) -> None:
        """Without room for one more, the old one goes first; else all stay as they are."""
        old = restart.old
        assert old is not None
        restart.old = restart.next = None
        if no_room:
            _logger.info("%s ends before another takes its place: %s", old.name, problem)
            place = self._place_of(old)
            place.after, place.due = old.name, now
            self._drain(old, now)
            return
        old.problem = f"the rolling restart was ended, as no other could be started in its place: {problem}"
        _logger.error("%s: %s", old.name, old.problem)
        self._restart = None

    def _forgive(self, now: float) -> None:
        """If this process itself was stopped for a while, no replica is to blame for having said nothing."""
        pause, self._looked = now - (now if self._looked is None else self._looked), now
        if pause > SILENCE_S / 4:
            for member in self.members.values():
                member.heard += pause
