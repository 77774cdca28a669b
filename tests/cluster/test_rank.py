"""In which order a rank launches and finishes steps, where its device computes while the host goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headwise.cluster.channel import Kind
from headwise.cluster.queue_channel import QueueEngineChannel
from headwise.cluster.rank import Rank
from headwise.workers.plan import StepOutput, StepPlan, decode_output, encode_plan
from tests.checkpoints import small_spec

DEADLINE_S = 10.0


class Step:
    """Stands for a step that a GPU has been given."""

    def __init__(self, shard: FakeShard, number: int) -> None:
        self._shard, self.number = shard, number

    @property
    def computed(self) -> bool:
        return self._shard.computes.is_set()

    def precedes(self, plan: StepPlan) -> bool:
        return plan.step in self._shard.waiting


class FakeShard:
    """
    Attributes:
        waiting: steps that must not be launched before the one before them is finished.
        computes: set once the device does what it was given.
    """

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.waiting: set[int] = set()
        self.computes = threading.Event()
        self.launched = threading.Semaphore(0)

    def launch(self, plan: StepPlan) -> Step:
        self.log.append(("launch", plan.step))
        self.launched.release()
        return Step(self, plan.step)

    def finish(self, step: Step) -> StepOutput:
        self.log.append(("finish", step.number))
        return StepOutput(step.number)

    def close(self) -> None:
        self.log.append(("close", -1))


class Served:
    """A rank that serves on a thread of its own."""

    def __init__(self) -> None:
        self.engine, self.shard = QueueEngineChannel(1), FakeShard()
        rank = Rank(small_spec(Path("nowhere")), 0, 1)
        self._rank: Any = rank
        self._rank._channel, self._rank.shard = self.engine.rank(0), self.shard
        self._thread = threading.Thread(target=rank.serve)

    def send(self, *steps: int) -> None:
        for step in steps:
            self.engine.send(0, Kind.STEP, encode_plan(StepPlan(step, computes=[(0, 1)])))

    def start(self) -> None:
        self._thread.start()

    def outputs(self, count: int) -> list[int]:
        got = [self.engine.receive(DEADLINE_S) for _ in range(count)]
        return [decode_output(message[2]).step for message in got if message is not None]

    def close(self) -> None:
        self.engine.send(0, Kind.CLOSE, b"")
        if self._thread.ident is not None:
            self._thread.join(DEADLINE_S)


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.close()


def test_a_step_is_launched_before_the_one_before_it_is_finished(served: Served) -> None:
    served.send(0, 1, 2)
    served.start()
    for _ in range(3):
        assert served.shard.launched.acquire(timeout=DEADLINE_S)
    assert served.outputs(2) == [0, 1], "of two steps in flight, the older is waited for"
    served.shard.computes.set()
    assert served.outputs(1) == [2], "nobody has to send a message for that"
    order = [("launch", 0), ("launch", 1), ("finish", 0), ("launch", 2), ("finish", 1), ("finish", 2)]
    assert served.shard.log == order


def test_a_step_that_needs_the_tokens_of_another_waits_for_them(served: Served) -> None:
    served.shard.waiting = {1}
    served.send(0, 1)
    served.start()
    assert served.outputs(1) == [0]
    served.shard.computes.set()
    assert served.outputs(1) == [1]
    assert served.shard.log == [("launch", 0), ("finish", 0), ("launch", 1), ("finish", 1)]


def test_what_a_device_has_computed_already_is_finished_at_once(served: Served) -> None:
    """So it is on a CPU."""
    served.shard.computes.set()
    served.send(0, 1)
    served.start()
    assert served.outputs(2) == [0, 1]
    assert served.shard.log == [("launch", 0), ("finish", 0), ("launch", 1), ("finish", 1)]


def test_a_rank_whose_device_hangs_can_be_closed(served: Served) -> None:
    served.send(0)
    served.start()
    assert served.shard.launched.acquire(timeout=DEADLINE_S)
    served.close()
    assert served.shard.log == [("launch", 0), ("close", -1)]
