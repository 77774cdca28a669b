"""Groups whose ranks are threads of the calling process. No Ray: for machines that have none, and for tests."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from queue import SimpleQueue
from typing import Any

from headwise.cluster.channel import Kind
from headwise.cluster.channel_group import ChannelGroup
from headwise.cluster.group import GroupFactory, Progress, ShardGroup, ShardGroupDied
from headwise.cluster.mailbox import CLOSED, Mailbox
from headwise.cluster.queue_channel import QueueEngineChannel
from headwise.cluster.rank import Rank, death_of
from headwise.workers.collectives import open_rendezvous
from headwise.workers.errors import InvalidValueError
from headwise.workers.machine import usable_cores
from headwise.workers.plan import StepOutput
from headwise.workers.spec import ShardSpec

HOST = "localhost"
"""The node of all of its ranks."""
MEET_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 60.0
"""How long loading or the steps under way may take until a rank's thread is left alone; a thread cannot be killed."""
HURRY_S = 1.0
"""How long, once somebody is in a hurry."""


class LocalGroupFactory(GroupFactory):
    """Makes groups of one rank."""

    def __init__(self, spec: ShardSpec, cpus: float | None = None) -> None:
        """Args: ``cpus``: threads to compute with; None is all usable cores.

        Raises:
            InvalidValueError: the spec asks for more than one rank.
        """
        if spec.tensor_parallel_size != 1:
            raise InvalidValueError(
                "tensor_parallel_size", spec.tensor_parallel_size, 'executor="local" has one rank', 'use executor="ray"'
            )
        self._spec, self._num_threads = spec, max(1, int(cpus or usable_cores()))

    def make(self) -> ShardGroup:
        return LocalShardGroup(self._spec, self._num_threads)

    def close(self) -> None:
        pass


class LocalShardGroup(ChannelGroup):
    """Each rank on a thread of its own from loading on.

    One thread for all of it, because OpenMP keeps a team of threads for each thread that computes: with a second
    team on the same cores, libgomp lets the waiting ones sleep instead of spin, and each of a step's hundreds of
    parallel regions would wait for them to wake (a third of the speed at batch 1).
    """

    def __init__(self, spec: ShardSpec, num_threads: int) -> None:
        """Args: ``num_threads``: that each rank computes with."""
        super().__init__(spec)
        self._num_threads = num_threads
        self._channel = QueueEngineChannel(self._tp)
        self._ranks: list[_RankThread] = []
        self._runs: list[Future[None]] = []

    def load(self, progress: Progress | None = None) -> None:
        self._mailbox = Mailbox(self._channel, [HOST] * self._tp)
        rendezvous = open_rendezvous("solo" if self._tp == 1 else "shared_memory", self._tp)
        self._ranks = [_RankThread(Rank(self._spec, rank, self._num_threads)) for rank in range(self._tp)]
        loads = [
            thread.submit(Rank.load, self._channel.rank(number), rendezvous, MEET_TIMEOUT_S, progress, range(self._tp))
            for number, thread in enumerate(self._ranks)
        ]
        for load in loads:
            load.result()
        self._runs = [thread.submit(Rank.serve) for thread in self._ranks]
        for number, run in enumerate(self._runs):
            run.add_done_callback(partial(self._ended, number))

    @property
    def places(self) -> list[tuple[str, int]]:
        return [(HOST, os.getpid())] * len(self._ranks)

    def collect(self) -> StepOutput:
        try:
            return super().collect()
        except ShardGroupDied as death:  # with the rank's own error, and so its traceback
            if death.rank is None:
                raise
            run = self._runs[death.rank]
            wait([run], timeout=1.0)  # a rank tells of its death, and then ends
            raise death from (run.exception() if run.done() else None)

    def hurry(self) -> None:
        for thread in self._ranks:
            thread.hurry()

    def close(self) -> None:
        if self._mailbox is not None:
            self._mailbox.declare_dead(None, CLOSED)  # for an engine that still waits for a step
        self._channel.send_all(Kind.CLOSE, b"")
        for thread in self._ranks:
            thread.end(CLOSE_TIMEOUT_S)
        self._ranks = []

    def _ended(self, rank: int, run: Future[None]) -> None:
        """A rank does not serve any more. As a rule it has told the engine why; if it could not, this does."""
        assert self._mailbox is not None, "load() comes first"
        error = run.exception()
        if error is None:
            self._mailbox.declare_dead(None, CLOSED)
            return
        dead, cause = death_of(rank, error)
        self._mailbox.declare_dead(dead, cause, own_error=dead == rank)


class _RankThread:
    """A rank and the thread that all of its methods run on. That is no ThreadPoolExecutor's: a program that ends would
    wait for such a thread before it closes the group."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="headwise-shard", daemon=True)
        self._thread.start()

    def submit(self, method: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._calls.put((partial(method, self.rank, *args), future))
        return future

    def end(self, timeout_s: float) -> None:
        """Waits until the rank has done what was submitted, and closes it."""
        self.submit(Rank.close)
        self._calls.put(None)
        if threading.current_thread() is not self._thread:  # on which a forgotten group may be collected
            self._over.wait(timeout_s)
            self._thread.join(HURRY_S)

    def hurry(self) -> None:
        """Has :meth:`end` wait for HURRY_S only."""
        self._over.set()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            method, future = call
            try:
                future.set_result(method())
            except BaseException as error:
                traceback.clear_frames(error.__traceback__)  # or the error would keep the model and its KV memory
                future.set_exception(error)
        self._over.set()
