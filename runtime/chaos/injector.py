"""The injector: a thread that does to an engine what the schedule of faults says, and tells the history."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from headwise.runtime.chaos.checker import Finding
from headwise.runtime.chaos.faults import Injection, Kind
from headwise.runtime.chaos.history import Event, History
from headwise.runtime.llm import LLM
from headwise.workers import failpoints
from headwise.workers.errors import HeadwiseError
from headwise.workers.failpoints import Action
from headwise.workers.processes import ProcessId

LOOK_S = 0.005
FIRE_S = 10.0
"""A failpoint that nobody has come to after so long is disarmed."""


class Injector:
    """
    Attributes:
        processes: of every rank that there was.
        findings: what must not be: an engine that does not come back, or faults that cannot be made to happen.
    """

    def __init__(
        self,
        llm: LLM,
        folder: Path,
        schedule: Iterator[Injection],
        history: History,
        deadline_s: float,
        told: Callable[[Event], None],
    ) -> None:
        """
        Args:
            folder: of the failpoints.
            deadline_s: for requests to go on after a fault.
            told: gets each fault, for people.
        """
        self._llm, self._folder, self._schedule = llm, folder, schedule
        self._history, self._deadline_s, self._told = history, deadline_s, told
        self._over, self._closed = threading.Event(), threading.Event()
        self._fired = 0
        self.processes: set[ProcessId] = set()
        self.findings: list[Finding] = []
        self._threads = [
            threading.Thread(target=self._tell_of_errors, args=(work,), name="chaos-injector", daemon=True)
            for work in (self._run, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def runs(self) -> bool:
        """Whether there will be more faults."""
        return self._threads[0].is_alive()

    def stop(self) -> None:
        """No fault comes after it, and none is left behind: what is armed is disarmed, who is stopped goes on. The
        history is still told when requests go on, until :meth:`close`."""
        self._over.set()
        self._threads[0].join()
        failpoints.disarm(self._folder)
        self._note_fired()

    def close(self) -> None:
        """Tells the history of nothing more; call it after :meth:`stop`."""
        self._closed.set()
        self._threads[1].join()

    def await_progress(self) -> bool:
        """Whether, before the deadline, each request whose group has died has got a token of the next. Who never gets
        one is taken for the reason of the deaths."""
        return self._await_progress(lambda: False)

    def _await_progress(self, over: Callable[[], bool]) -> bool:
        engine, deadline = self._llm._loop.engine, time.monotonic() + self._deadline_s
        while time.monotonic() < deadline and self._llm._loop.ended is None and not over():
            if not engine.rebuilding and not engine.num_suspects:
                return True
            time.sleep(LOOK_S)
        return False

    def _tell_of_errors(self, work: Callable[[], None]) -> None:
        """Without faults nothing would be found."""
        try:
            work()
        except Exception as error:
            self.findings.append(Finding("faults", f"no more could be made: {type(error).__name__}: {error}"))

    def _run(self) -> None:
        for injection in self._schedule:
            if not injection.hasty and not self._await_progress(self._over.is_set):
                if self._llm._loop.ended is None and not self._over.is_set():
                    text = f"requests did not go on within {self._deadline_s:g} s of a fault"
                    self.findings.append(Finding("hung", text))
                return
            if self._over.wait(injection.wait_s):
                return
            self._inject(injection)
            if self._llm._loop.ended is not None:
                return

    def _inject(self, injection: Injection) -> None:
        ranks = self._ranks()
        if injection.kind is Kind.POINT:
            self._arm(injection, ranks)
            return
        chosen = [ranks[rank] for rank in injection.ranks if rank < len(ranks)]
        if not chosen:
            return  # the group is being rebuilt
        kills = len(chosen) if injection.kind is Kind.KILL else 0
        self._note(injection.name, kills, injection.ranks)
        for process in chosen:
            process.send(signal.SIGKILL if kills else signal.SIGSTOP)
        if not kills:
            self._over.wait(injection.stopped_s)
            for process in chosen:
                process.send(signal.SIGCONT)

    def _arm(self, injection: Injection, ranks: list[ProcessId]) -> None:
        assert injection.point is not None and injection.fault is not None
        rank = injection.ranks[0] if injection.ranks else None
        failpoints.arm(self._folder, injection.point, injection.fault, rank)
        if injection.kills and ranks:
            self._note("kill", 1, (0,))
            ranks[0].kill()
        deadline = time.monotonic() + FIRE_S
        while failpoints.armed(self._folder) and time.monotonic() < deadline and not self._over.wait(LOOK_S):
            pass
        failpoints.disarm(self._folder)
        self._note_fired()

    def _note_fired(self) -> None:
        fired = failpoints.fired(self._folder)
        for one in fired[self._fired :]:
            kills = int(one.action in (Action.KILL, Action.EXIT))
            name = f"{one.point} {one.action}"
            self._told(self._history.add("fired", at=one.at, fault=name, kills=kills))
        self._fired = len(fired)

    def _note(self, name: str, kills: int, ranks: tuple[int, ...]) -> None:
        self._told(self._history.add("fault", fault=name, kills=kills, ranks=list(ranks)))

    def _ranks(self) -> list[ProcessId]:
        """The processes of the present group by rank; none while there is no group."""
        try:
            found = processes(self._llm, self._deadline_s)
        except (HeadwiseError, TimeoutError):
            return []
        self.processes.update(found)
        return found

    def _watch(self) -> None:
        """Tells the history when a group is gone, and when requests go on."""
        engine, down = self._llm._loop.engine, False
        while not self._closed.wait(LOOK_S):
            if engine.rebuilding != down:
                down = not down
                self._history.add("down" if down else "up", epoch=engine.generation.epoch)


def processes(llm: LLM, timeout_s: float) -> list[ProcessId]:
    """Those of an engine's ranks, in rank order; none while its shards are being replaced.

    Raises:
        HeadwiseError: the engine has ended, or its shards have died meanwhile.
        TimeoutError: it did not answer in time.
    """
    shards = llm._loop.submit(lambda engine: engine.query_shards("stats")).result(timeout_s)
    return [ProcessId(**shard["process"]) for shard in shards]
