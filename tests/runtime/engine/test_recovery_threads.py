"""The engine's thread and the one that finds it other shards, on groups without a model."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from headwise.cluster.group import Progress, ShardGroup, ShardGroupDied
from headwise.runtime.engine import engine as engine_module
from headwise.runtime.engine import recovery as recovery_module
from headwise.runtime.engine import spare as spare_module
from headwise.runtime.engine.engine import Engine
from headwise.runtime.engine.generation import Generation, ReadyGroup
from headwise.runtime.engine.loop import EngineLoop, EngineStoppedError
from headwise.runtime.engine.recovery import Recovery
from headwise.runtime.output import FinishReason
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.transfer import BlockKey, Op, Tier
from headwise.workers.plan import StepOutput
from tests.plain_group import BLOCK, Bench, PlainGroup, alone, make_request

DEADLINE_S = 20.0


class Group(PlainGroup):
    """One that is loaded, may fail at it, and may hang in a step until it is given up."""

    def __init__(self, before: Callable[[Group], None] = lambda group: None) -> None:
        super().__init__()
        self.before, self.loaded, self.hangs = before, False, threading.Event()

    def load(self, progress: Progress | None = None) -> None:
        self.before(self)
        self.loaded = True

    def collect(self) -> StepOutput:
        deadline = time.monotonic() + DEADLINE_S
        while self.hangs.is_set() and self.dead is None:
            assert time.monotonic() < deadline
            threading.Event().wait(0.005)
        return super().collect()

    def query(self, method: str) -> list[Any]:
        self._live()
        return [{"weight_bytes": 7}]

    def transferred(self, timeout_s: float) -> None:
        self._live()


class Generations:
    """Makes groups without a model for a bench; keeps what it made.

    Attributes:
        before: what each further group does when it is loaded.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench, self.made = bench, list[Group]()
        self.before: Callable[[Group], None] = lambda group: None

    def new_group(self) -> ShardGroup:
        self.made.append(Group(lambda group: self.before(group)))
        return self.made[-1]

    def prepare(self, group: ShardGroup, in_haste: bool = False) -> ReadyGroup:
        assert isinstance(group, Group) and group.loaded and not group.ended
        group._live()
        return ReadyGroup(group, 64, ([], []), [])

    def open(self, ready: ReadyGroup) -> Generation:
        assert isinstance(ready.group, Group)
        return self.bench.generation(ready.group, ready.num_blocks)


class Setup:
    def __init__(self) -> None:
        self.first = Group()
        self.bench = Bench(depth=2, group=self.first)
        self.generations = Generations(self.bench)
        self.failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        self.recovery: Recovery | None = None
        self.loop: EngineLoop | None = None

    def start(self, **settings: bool) -> EngineLoop:
        self.recovery = Recovery(self.bench.engine, self.generations, **settings)  # type: ignore[arg-type]
        self.loop = EngineLoop(self.bench.engine, self.failures.put, self.recovery)
        return self.loop

    def close(self) -> None:
        if self.loop is not None and self.recovery is not None:
            self.loop.close(DEADLINE_S)
            self.recovery.close()
            self.bench.group.close()
        assert all(group.ended for group in [self.first, *self.generations.made])
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("headwise")]

    def ask(self, name: str, max_tokens: int = 30) -> None:
        self.run(lambda engine: self.bench.add(make_request(name, [1, 2, 3], max_tokens, seed=len(name))))

    def run(self, function: Callable[[Engine], object]) -> None:
        assert self.loop is not None
        self.loop.run(function, DEADLINE_S)

    def wait(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline and self.failures.empty()
            threading.Event().wait(0.002)

    def check(self) -> None:
        """Waits until all requests have ended, each with its own tokens."""
        self.wait(lambda: len(self.bench.ended) == len(self.bench.requests))
        for request in self.bench.requests:
            assert (self.bench.got[request.key], self.bench.ended[request.key]) == alone(request)


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> Iterator[Setup]:
    monkeypatch.setattr(recovery_module, "LOOK_S", 0.01)
    monkeypatch.setattr(spare_module, "DELAY_S", 0.01)
    monkeypatch.setattr(spare_module, "RETRY_S", 0.05)
    setup = Setup()
    yield setup
    setup.close()


def kill(engine: Engine) -> None:
    assert isinstance(engine.generation.group, PlainGroup)
    engine.generation.group.give_up("killed")


def test_requests_go_on_and_calls_are_answered_meanwhile(setup: Setup) -> None:
    setup.start()
    go = threading.Event()
    setup.generations.before = lambda group: assert_(go.wait(DEADLINE_S))
    for name in ("a", "bb", "ccc"):
        setup.ask(name)
    setup.run(kill)
    setup.wait(lambda: setup.bench.engine.rebuilding)
    setup.ask("while there are no shards")
    setup.run(lambda engine: engine.abort("a"))
    assert setup.bench.ended.get("a#0", FinishReason.ABORT) in (FinishReason.ABORT, FinishReason.LENGTH)
    assert setup.bench.engine.stats()["recoveries"]["rebuilding"]
    setup.bench.requests = [request for request in setup.bench.requests if request.request_id != "a"]
    setup.bench.ended.pop("a#0", None)
    go.set()
    setup.check()
    recoveries = setup.bench.engine.stats()["recoveries"]
    assert (recoveries["count"], recoveries["num_deaths"], recoveries["rebuilding"]) == (1, 1, False)
    assert recoveries["deaths"] == [{"epoch": 1, "rank": None, "node": None, "cause": "killed"}]
    assert setup.bench.engine.stats()["epoch"] > 1 and setup.first.ended


def test_shards_that_die_while_nobody_asks_anything_are_replaced(setup: Setup) -> None:
    setup.start()
    setup.first.give_up("killed")
    setup.wait(lambda: setup.bench.engine.stats()["recoveries"]["count"] == 1)
    setup.ask("a")
    setup.check()


def test_a_step_that_hangs_is_as_good_as_dead(setup: Setup) -> None:
    setup.bench.engine.pace._step_timeout_s = 0.1
    setup.start()
    setup.first.hangs.set()
    setup.ask("a")
    setup.check()
    [death] = setup.bench.engine.stats()["recoveries"]["deaths"]
    assert death["cause"] == "a step with 3 tokens has made no progress in 0.1 s (--step-timeout)"


def test_a_group_that_cannot_be_started_is_followed_by_another(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwise.cluster.supervisor.BACKOFF_S", 0.001)
    failures = iter([InvalidValueError("kv_memory", "1GiB", "is not there"), OSError("no"), ShardGroupDied(0, "", "")])

    def fail(group: Group) -> None:
        for error in failures:
            raise error

    setup.start()
    setup.generations.before = fail
    setup.run(kill)
    setup.ask("a")
    setup.check()
    assert len(setup.generations.made) == 4


def test_a_group_that_dies_before_its_books_are_open_is_followed_by_another(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headwise.cluster.supervisor.BACKOFF_S", 0.001)
    opened = setup.generations.open
    deaths = [ShardGroupDied(0, "here", "for the test")] * 2

    def open_books(ready: ReadyGroup) -> Generation:
        if deaths:
            raise deaths.pop()
        return opened(ready)

    monkeypatch.setattr(setup.generations, "open", open_books)
    setup.start()
    setup.run(kill)
    setup.ask("a")
    setup.check()


def test_groups_that_never_finish_a_step_end_the_engine(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwise.cluster.supervisor.BACKOFF_S", 0.001)
    monkeypatch.setattr("headwise.cluster.supervisor.MAX_BACKOFF_S", 0.001)

    def fail(group: Group) -> None:
        raise InvalidValueError("kv_memory", "1GiB", "is not there")

    loop = setup.start()
    setup.generations.before = fail
    setup.run(kill)
    error = setup.failures.get(timeout=DEADLINE_S)
    assert isinstance(error, ShardGroupDied) and error.cause.startswith("killed; 10 shard groups in a row have not")
    assert "kv_memory='1GiB': is not there" in error.cause
    with pytest.raises(ShardGroupDied):
        loop.run(lambda engine: None, DEADLINE_S)


def test_whoever_does_not_want_that_is_told_of_the_death(setup: Setup) -> None:
    setup.start(recovers=False)
    setup.first.give_up("killed")
    assert setup.failures.get(timeout=DEADLINE_S) is setup.first.dead
    assert not setup.generations.made


def test_a_call_in_which_the_shards_die_is_made_again_without_them(setup: Setup) -> None:
    setup.start()
    go = threading.Event()
    setup.generations.before = lambda group: assert_(go.wait(DEADLINE_S))
    answers: list[object] = []

    def query(engine: Engine) -> None:
        if not engine.rebuilding:
            kill(engine)
        answers.append(engine.query_shards("stats"))

    setup.run(query)
    assert answers == [[]]
    go.set()


def test_an_engine_may_be_closed_while_its_shards_are_started(setup: Setup) -> None:
    loop = setup.start()
    loading, go = threading.Event(), threading.Event()

    def load(group: Group) -> None:
        loading.set()
        assert go.wait(DEADLINE_S)
        group._live()

    setup.generations.before = load
    setup.ask("a")
    setup.run(kill)
    assert loading.wait(DEADLINE_S)
    loop.close(DEADLINE_S)
    assert isinstance(setup.failures.get(timeout=DEADLINE_S), EngineStoppedError)
    setup.generations.made[0].give_up("closed")
    go.set()


def test_a_spare_takes_the_place_at_once_and_is_followed_by_another(setup: Setup) -> None:
    setup.start(warm_spare=True)
    for count in (1, 2):
        setup.wait(lambda: setup.bench.engine.stats()["recoveries"]["spare"] == "ready")
        spare = setup.generations.made[-1]
        setup.run(kill)
        setup.ask("a" * count)
        setup.check()
        assert setup.bench.engine.generation.group is spare
        recoveries = setup.bench.engine.stats()["recoveries"]
        assert (recoveries["count"], recoveries["spare_bytes"]) == (count, 7)


def test_a_spare_that_dies_while_it_waits_is_replaced(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    setup.start(warm_spare=True)
    setup.wait(lambda: setup.bench.engine.stats()["recoveries"]["spare"] == "ready")
    dead = setup.generations.made[0]
    dead.give_up("killed")
    setup.wait(lambda: len(setup.generations.made) == 2 and setup.generations.made[1].loaded)
    assert dead.ended and "the spare shards have died" in caplog.text
    setup.ask("a")
    setup.check()
    assert setup.bench.engine.stats()["recoveries"]["num_deaths"] == 0


def test_without_a_spare_that_lives_a_group_is_started(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spare_module, "RETRY_S", 1000.0)
    monkeypatch.setattr(spare_module, "DELAY_S", 1000.0)
    setup.start(warm_spare=True)
    setup.wait(lambda: setup.bench.engine.stats()["recoveries"]["spare"] == "ready")
    spare = setup.generations.made[0]
    spare.dead = ShardGroupDied(0, "here", "killed")
    setup.run(kill)
    setup.ask("a")
    setup.check()
    assert setup.bench.engine.generation.group is setup.generations.made[1] and spare.ended


def test_a_spare_that_cannot_be_loaded_is_tried_again(setup: Setup) -> None:
    failures = iter([InvalidValueError("kv_memory", "1GiB", "is not there")])

    def fail(group: Group) -> None:
        for error in failures:
            raise error

    setup.generations.before = fail
    setup.start(warm_spare=True)
    setup.wait(lambda: setup.bench.engine.stats()["recoveries"]["spare"] == "ready")
    assert len(setup.generations.made) == 2


def test_an_output_that_is_lost_during_a_call_costs_the_group_and_not_the_engine(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.start()
    collect = setup.first.collect

    def query(engine: Engine) -> None:
        if engine.generation.group is setup.first and not engine.rebuilding:
            setup.bench.add(make_request("a", [1, 2, 3], 8))
            assert engine._submit_next() and engine._submit_next()
            monkeypatch.setattr(setup.first, "collect", lambda: (collect(), collect())[1])
        engine.query_shards("stats")

    setup.run(query)
    setup.check()
    [death] = setup.bench.engine.stats()["recoveries"]["deaths"]
    assert death["cause"] == "the output of step 1 came where that of step 0 was due"


def test_whoever_looks_after_the_shards_looks_again_if_that_fails(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures = iter([OSError(24, "Too many open files")] * 3)
    give_up = setup.first.give_up

    def fail(cause: str) -> None:
        for error in failures:
            raise error
        give_up(cause)

    monkeypatch.setattr(setup.first, "give_up", fail)
    setup.bench.engine.pace._step_timeout_s = 0.1
    setup.start()
    setup.first.hangs.set()
    setup.ask("a")
    setup.check()
    assert caplog.text.count("Too many open files") == 1


def test_an_engine_whose_shards_nobody_looks_after_ends(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise MemoryError

    loop = setup.start()
    assert setup.recovery is not None
    monkeypatch.setattr(setup.recovery._supervisor, "died", fail)
    setup.run(kill)
    setup.ask("a")
    error = setup.failures.get(timeout=DEADLINE_S)
    assert isinstance(error, EngineStoppedError) and "RuntimeError" in str(error)
    with pytest.raises(EngineStoppedError):
        loop.run(lambda engine: None, DEADLINE_S)
    setup.first.close()


def test_books_that_cannot_be_opened_cost_a_group_and_not_the_engine(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headwise.cluster.supervisor.BACKOFF_S", 0.001)
    opened, failures = setup.generations.open, iter([OSError(24, "Too many open files")])

    def open_books(ready: ReadyGroup) -> Generation:
        for error in failures:
            raise error
        return opened(ready)

    monkeypatch.setattr(setup.generations, "open", open_books)
    setup.start()
    setup.run(kill)
    setup.ask("a")
    setup.check()
    assert [group.ended for group in setup.generations.made] == [True, False]


def test_a_generation_that_cannot_go_on_is_closed(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connections to prefill engines, too."""
    monkeypatch.setattr("headwise.cluster.supervisor.BACKOFF_S", 0.001)
    opened, made, closed = setup.generations.open, list[Generation](), list[Generation]()

    def open_books(ready: ReadyGroup) -> Generation:
        made.append(opened(ready))
        return made[-1]

    def tell(generation: Generation) -> None:
        if generation is made[0]:
            raise ShardGroupDied(0, "here", "for the test")

    monkeypatch.setattr(setup.generations, "open", open_books)
    monkeypatch.setattr(Generation, "close", lambda self: (closed.append(self), self.group.close()))
    setup.bench.engine.on_resume.append(tell)
    setup.start()
    setup.run(kill)
    setup.ask("a")
    setup.check()
    assert len(made) == 2 and made[0] in closed and made[1] not in closed


def test_a_spare_whose_thread_cannot_be_started_is_tried_again(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    start, failures = threading.Thread.start, iter([RuntimeError("can't start new thread")])

    def try_to_start(thread: threading.Thread) -> None:
        if thread.name == "headwise-spare":
            for error in failures:
                raise error
        start(thread)

    setup.start(warm_spare=True)
    setup.wait(lambda: setup.bench.engine.stats()["recoveries"]["spare"] == "ready")
    monkeypatch.setattr(threading.Thread, "start", try_to_start)
    setup.generations.made[0].give_up("killed")
    setup.wait(lambda: len(setup.generations.made) == 2)
    setup.run(kill)
    setup.ask("a")
    setup.check()


@pytest.mark.parametrize("spare", [False, True])
def test_who_is_in_a_hurry_waits_a_moment_for_shards_that_are_started(setup: Setup, spare: bool) -> None:
    loop = setup.start(warm_spare=spare)
    assert setup.recovery is not None
    loading, go = threading.Event(), threading.Event()

    def load(group: Group) -> None:
        loading.set()
        assert go.wait(DEADLINE_S)
        group._live()

    setup.wait(lambda: not spare or setup.bench.engine.stats()["recoveries"]["spare"] == "ready")
    setup.generations.before = load
    if spare:
        setup.generations.made[0].give_up("killed")
    else:
        setup.run(kill)
    assert loading.wait(DEADLINE_S)
    loop.close(DEADLINE_S)
    setup.recovery.hurry()
    started = time.monotonic()
    setup.recovery.close()
    assert time.monotonic() - started < 5.0
    setup.generations.made[-1].give_up("closed")
    go.set()


def test_a_group_without_memory_is_followed_by_another(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could compute nothing, and every request would fail."""
    monkeypatch.setattr("headwise.cluster.supervisor.BACKOFF_S", 0.001)
    prepare, empty = setup.generations.prepare, iter([0])

    def prepare_group(group: ShardGroup, in_haste: bool = False) -> ReadyGroup:
        for num_blocks in empty:
            return ReadyGroup(group, num_blocks, ([], []), [])
        return prepare(group)

    monkeypatch.setattr(setup.generations, "prepare", prepare_group)
    setup.start()
    setup.run(kill)
    setup.ask("a")
    setup.wait(lambda: setup.bench.engine.stats()["recoveries"]["count"] == 1)
    setup.check()
    assert [group.ended for group in setup.generations.made] == [True, False]


def test_ranks_that_hang_while_nothing_but_blocks_is_moved_are_noticed(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request waits for blocks from a tier, and no step is made that could hang."""
    monkeypatch.setattr(engine_module, "SILENCE_S", 0.01)
    asked: queue.SimpleQueue[str] = queue.SimpleQueue()

    def query(method: str) -> list[Any]:
        asked.put(method)
        return setup.first.die("no answer") if asked.qsize() > 2 else []

    monkeypatch.setattr(setup.first, "query", query)
    setup.start()
    key = BlockKey(b"0" * 32, b"", b"", [1] * BLOCK)
    setup.run(lambda engine: engine.generation.ledger.start(Op.LOAD, Tier.HOST, [key], [0]))
    setup.wait(lambda: setup.bench.engine.stats()["recoveries"]["count"] == 1)
    setup.ask("a")
    setup.check()
    assert asked.qsize() == 3


def assert_(condition: object) -> None:
    assert condition
