"""Recovery: gives an engine another shard group when its own has died, and notices that it has."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol, TypeVar

from headwise.cluster.group import GroupStartError, ShardGroup, ShardGroupDied
from headwise.cluster.supervisor import GiveUp, Instruction, Supervisor
from headwise.runtime.engine.engine import Engine
from headwise.runtime.engine.generation import Generation, GenerationFactory, ReadyGroup
from headwise.runtime.engine.spare import Spare, join
from headwise.workers import failpoints
from headwise.workers.failpoints import Point

T = TypeVar("T")

LOOK_S = 0.25
"""How often it is looked whether shards that do nothing have died, or a step hangs."""
_END_S = 30.0

_logger = logging.getLogger(__name__)


class Loop(Protocol):
    """The engine's thread."""

    def submit(self, function: Callable[[Engine], T]) -> Future[T]: ...

    def post(self, function: Callable[[Engine], None]) -> None: ...


class Recovery:
    """Replaces the shard groups of one engine, one after another, on a thread of its own.

    Whoever runs the engine calls :meth:`start` once, and :meth:`lost` for each death.
    """

    def __init__(
        self, engine: Engine, generations: GenerationFactory, *, recovers: bool = True, warm_spare: bool = False
    ) -> None:
        """
        Args:
            recovers: whether dead shards are replaced; else the first death ends the engine.
            warm_spare: whether a group that has its weights waits to take the place of one that dies.
        """
        self._engine, self._generations, self._recovers = engine, generations, recovers
        self._supervisor = Supervisor(time.monotonic())
        self._spare = Spare(generations) if warm_spare and recovers else None
        self._changed = threading.Condition()
        self._closing, self._hurried = False, threading.Event()
        self._problem = ""
        self._lost: ShardGroupDied | None = None
        self._was_idle = False  # when it died
        self._steps_before = engine.num_steps  # when the group that runs now was started
        self._building: ShardGroup | None = None
        self._thread: threading.Thread | None = None
        engine.recoveries = self.stats

    def start(self, loop: Loop) -> None:
        """Begins to look after the engine."""
        self._loop = loop
        if self._spare is not None:
            self._spare.load()
        self._thread = threading.Thread(target=self._work, name="headwise-recovery", daemon=True)
        self._thread.start()

    def lost(self, death: ShardGroupDied) -> bool:
        """The engine's group is dead; called on the engine's thread.

        Returns:
            Whether another group will take its place. Until then the engine has none.
        """
        if not self._recovers or self._closing:
            return False
        was_idle = not self._engine.has_work
        self._engine.lose_group(death)
        with self._changed:
            self._lost, self._was_idle = death, was_idle
            self._changed.notify_all()
        return True

    def stats(self) -> dict[str, Any]:
        """As :meth:`Supervisor.stats <headwise.cluster.supervisor.Supervisor.stats>`; and the ``spare``: ``none``,
        ``loading`` or ``ready``, and the ``spare_bytes`` of its weights."""
        spare = self._spare
        found = {"spare": spare.state, "spare_bytes": spare.num_bytes} if spare is not None else {"spare": "none"}
        return self._supervisor.stats() | {"spare_bytes": 0} | found

    def hurry(self) -> None:
        """Has :meth:`close`, now or later, wait only a moment."""
        self._hurried.set()
        if (building := self._building) is not None:
            building.hurry()
        if self._spare is not None:
            self._spare.hurry()

    def close(self) -> None:
        """Ends what is being started. The group that runs is the engine's to close. Idempotent."""
        with self._changed:
            self._closing = True
            building = self._building
            self._changed.notify_all()
        if self._spare is not None:
            self._spare.close()
        if building is not None:
            building.close()
        if self._thread is not None and threading.current_thread() is not self._thread:
            join(self._thread, _END_S, self._hurried)

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closing or self._lost is not None, LOOK_S)
                    lost, self._lost = self._lost, None
                    if self._closing:
                        return
                if lost is not None and self._engine.rebuilding:
                    self._rebuild(lost)
                else:
                    self._try_to_look()
        except BaseException as error:  # without this thread, the next death would be a pause without an end
            _logger.exception("nobody looks after the shards any more")
            failure = RuntimeError("nobody looks after the shards any more")
            failure.__cause__ = error
            self._loop.post(partial(_give_up, failure))

    def _try_to_look(self) -> None:
        """Looks, and soon again if that fails, as where too many files are open."""
        try:
            self._look()
            self._problem = ""
        except Exception as error:
            if self._problem != (problem := f"{type(error).__name__}: {error}"):
                _logger.warning("the shards could not be looked after: %s", problem)
            self._problem = problem

    def _look(self) -> None:
        """Notices a group that has died while nobody waited for it, and one whose step hangs."""
        engine = self._engine
        group = engine.generation.group
        if self._recovers and (hang := engine.hang) is not None:
            group.give_up(hang)
        if group.death is not None and not engine.rebuilding and engine.busy_since is None:
            self._loop.post(_meet_death)
        if self._spare is not None:
            self._spare.look()

    def _rebuild(self, death: ShardGroupDied) -> None:
        engine, supervisor = self._engine, self._supervisor
        old, has_stepped = engine.generation, engine.num_steps > self._steps_before
        todo = supervisor.died(time.monotonic(), old.epoch, death, has_stepped, self._was_idle)
        _logger.warning("epoch %d: %s; the shards are started again", old.epoch, death)
        _ended(old, death.cause)
        while not self._closing:
            if isinstance(todo, GiveUp):
                error = ShardGroupDied(death.rank, death.node, f"{death.cause}; {todo.reason}")
                self._loop.post(partial(_give_up, error))
                return
            if (failed := self._try(todo.after_s)) is None:
                return
            todo = failed

    def _try(self, after_s: float) -> Instruction | None:
        """Starts a group after so many seconds; returns what is to be done if that fails."""
        with self._changed:
            if self._changed.wait_for(lambda: self._closing, after_s):
                return None
        group: ShardGroup | None = None
        try:
            if failpoints.ENABLED:
                failpoints.hit(Point.RECOVERY_START)
            group = self._spare.take() if self._spare is not None else None
            if group is None:
                group = self._generations.new_group()
                self._build(group)
                group.load()
            else:
                self._build(group)
            ready = self._generations.prepare(group, in_haste=True)
            if not ready.num_blocks:  # as while others have the memory: no request would fit
                raise GroupStartError("kv_memory (--kv-memory) does not pay for one KV block now")
            if failpoints.ENABLED:
                failpoints.hit(Point.RECOVERY_RESUME)
            self._go_on(ready)
        except Exception as error:
            if group is not None:
                _closed(group)
            if self._closing:
                return None
            _logger.warning("the shards could not be started: %s", error)
            return self._supervisor.failed(f"{type(error).__name__}: {error}")
        finally:
            self._building = None
        return None

    def _build(self, group: ShardGroup) -> None:
        """
        Raises:
            ShardGroupDied: nobody wants the group any more.
        """
        with self._changed:
            if self._closing:
                raise ShardGroupDied(None, None, "the engine is closed")
            self._building = group

    def _go_on(self, ready: ReadyGroup) -> None:
        opened: list[Generation] = []

        def resume(engine: Engine) -> Exception | None:
            engine.events.new_epoch(max(time.time_ns(), engine.events.epoch + 1))
            try:
                opened.append(self._generations.open(ready))
            except Exception as error:  # such as too many open files: nothing of the engine has changed
                return error
            engine.resume(opened[0])
            self._supervisor.rebuilt(time.monotonic())  # here, so that whoever gets a token sees it counted
            return None

        self._steps_before = self._engine.num_steps
        try:
            if (error := self._loop.submit(resume).result()) is not None:
                raise error
        except Exception:
            for generation in opened:
                _closed(generation)
            raise
        seconds = self._supervisor.last_seconds
        _logger.info("epoch %d: the shards are there again after %.2f s", self._engine.events.epoch, seconds)


def _meet_death(engine: Engine) -> None:
    """
    Raises:
        ShardGroupDied: the group has died.
    """
    if not engine.rebuilding and engine.generation.group.death is not None:
        raise engine.generation.group.death


def _give_up(error: Exception, engine: Engine) -> None:
    raise error


def _ended(old: Generation, cause: str) -> None:
    """Closes a generation without waiting for what its ranks are at."""
    try:
        old.group.give_up(cause)  # where the engine has found that it is of no more use, and the group has not
        old.group.hurry()
    except Exception:
        _logger.exception("a shard group that was dead could not be given up")
    _closed(old)


def _closed(what: Generation | ShardGroup) -> None:
    """Closes it, whatever comes in between: nothing of it is used any more."""
    try:
        what.close()
        if failpoints.ENABLED:
            failpoints.hit(Point.RECOVERY_CLOSE)
    except Exception:
        _logger.exception("a shard group that was dead could not be closed")
