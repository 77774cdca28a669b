"""The engine's thread: calls, failures, idleness and the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from headwise.cluster.group import ShardGroupDied
from headwise.runtime.engine.loop import EngineLoop, EngineStoppedError
from headwise.runtime.kv.blocks import IntegrityError
from headwise.workers.errors import InvalidValueError

DEADLINE_S = 10.0
DIED = ShardGroupDied(1, "here", "killed")


class Counter:
    """Stands for an engine: ``todo`` steps to do; the step that takes it to ``fail_at`` raises."""

    def __init__(self) -> None:
        self.todo = 0
        self.fail_at = -1
        self.thread: threading.Thread | None = None
        self.idle = threading.Event()

    @property
    def has_work(self) -> bool:
        return self.todo > 0

    def leave_peers(self) -> None:
        pass

    def step(self) -> None:
        self.thread = threading.current_thread()
        self.todo -= 1
        if self.todo == self.fail_at:
            raise DIED
        if not self.todo:
            self.idle.set()


class Setup:
    def __init__(self) -> None:
        self.engine = Counter()
        self.failures: list[BaseException] = []
        self.loop = EngineLoop(self.engine, self.failures.append)  # type: ignore[arg-type]

    def give(self, todo: int, fail_at: int = -1) -> Callable[[Counter], None]:
        def set_todo(engine: Counter) -> None:
            engine.todo, engine.fail_at = todo, fail_at

        return set_todo

    def join(self) -> None:
        self.loop._thread.join(DEADLINE_S)
        assert not self.loop._thread.is_alive()


def fail_with(error: BaseException) -> Callable[[Counter], None]:
    def fail(engine: Counter) -> None:
        raise error

    return fail


@pytest.fixture
def setup() -> Iterator[Setup]:
    setup = Setup()
    yield setup
    setup.loop.close(DEADLINE_S)
    setup.join()


def test_calls_run_on_the_loops_thread_and_answer(setup: Setup) -> None:
    thread = setup.loop.run(lambda _: threading.current_thread(), DEADLINE_S)
    assert thread is not threading.current_thread() and thread.name == "headwise-engine"
    setup.loop.run(setup.give(3), DEADLINE_S)
    assert setup.engine.idle.wait(DEADLINE_S)
    assert setup.engine.thread is thread


def test_an_error_in_a_call_reaches_its_caller_and_nobody_else(setup: Setup) -> None:
    with pytest.raises(InvalidValueError, match="mine=1"):
        setup.loop.run(fail_with(InvalidValueError("mine", 1, "must be 0")), DEADLINE_S)
    assert setup.loop.run(lambda _: "yes", DEADLINE_S) == "yes"
    assert setup.failures == []


@pytest.mark.parametrize("error", [KeyError("a request"), IntegrityError("a block is free twice"), SystemExit(1)])
def test_an_error_of_the_engine_in_a_call_ends_the_loop_for_everyone(setup: Setup, error: BaseException) -> None:
    with pytest.raises(EngineStoppedError, match=f"the engine has failed: {type(error).__name__}") as stopped:
        setup.loop.run(fail_with(error), DEADLINE_S)
    assert setup.failures == [stopped.value] and stopped.value.__cause__ is error
    with pytest.raises(EngineStoppedError):
        setup.loop.run(lambda _: "never", DEADLINE_S)


@pytest.mark.parametrize("error", [ZeroDivisionError(), InvalidValueError("mine", 1, "must be 0")])
def test_any_error_ends_the_loop_where_no_caller_hears_of_it(setup: Setup, error: BaseException) -> None:
    setup.loop.post(fail_with(error))
    setup.join()
    [failure] = setup.failures
    assert isinstance(failure, EngineStoppedError) and failure.__cause__ is error


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_callers_hear_of_the_end_even_if_whoever_is_told_first_fails(setup: Setup) -> None:
    def fail(error: BaseException) -> None:
        raise OSError("nobody is there")

    setup.loop._on_failure = fail
    for _ in range(2):
        with pytest.raises(ShardGroupDied):
            setup.loop.run(fail_with(DIED), DEADLINE_S)


def test_calls_are_made_between_steps(setup: Setup) -> None:
    setup.loop.run(setup.give(10**9), DEADLINE_S)
    first = setup.loop.run(lambda engine: engine.todo, DEADLINE_S)
    second = setup.loop.run(lambda engine: engine.todo, DEADLINE_S)
    assert first >= second
    setup.loop.run(setup.give(0), DEADLINE_S)


def test_many_threads_call_at_once(setup: Setup) -> None:
    def add(engine: Counter) -> int:
        engine.todo += 1
        return threading.get_ident()

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: setup.loop.run(add, DEADLINE_S), range(200)))
    assert len(set(answers)) == 1


def test_a_failing_step_ends_the_loop_for_everyone(setup: Setup) -> None:
    setup.loop.run(setup.give(5, fail_at=2), DEADLINE_S)
    setup.join()
    assert setup.failures == [DIED]
    for _ in range(2):
        with pytest.raises(ShardGroupDied):
            setup.loop.run(lambda _: None, DEADLINE_S)


def test_calls_that_wait_when_the_loop_ends_fail_with_its_error(setup: Setup) -> None:
    inside, go = threading.Event(), threading.Event()

    def hold(engine: Counter) -> None:
        inside.set()
        assert go.wait(DEADLINE_S)
        engine.todo, engine.fail_at = 1, 0

    with ThreadPoolExecutor(2) as pool:
        held = pool.submit(setup.loop.run, hold, DEADLINE_S)
        assert inside.wait(DEADLINE_S)
        setup.loop._functions.put(None)  # the end stands before the call that comes now
        late = pool.submit(setup.loop.run, lambda _: "never", DEADLINE_S)
        deadline = time.monotonic() + DEADLINE_S
        while setup.loop._functions.qsize() < 2 and time.monotonic() < deadline:
            threading.Event().wait(0.001)
        go.set()
        held.result(DEADLINE_S)
        with pytest.raises(EngineStoppedError):
            late.result(DEADLINE_S)


def test_a_dead_group_found_in_a_call_ends_the_loop(setup: Setup) -> None:
    with pytest.raises(ShardGroupDied):
        setup.loop.run(fail_with(DIED), DEADLINE_S)
    assert setup.failures == [DIED]  # who waits for nothing but the end has heard of it first
    setup.join()


def test_a_function_may_be_handed_in_when_another_s_failure_is_heard_of(setup: Setup) -> None:
    again: list[BaseException] = []

    def hand_in(done: Future[object]) -> None:
        try:
            setup.loop.submit(lambda _: "never")
        except ShardGroupDied as error:
            again.append(error)

    inside, go = threading.Event(), threading.Event()

    def hold(engine: Counter) -> None:
        inside.set()
        assert go.wait(DEADLINE_S)
        raise DIED

    setup.loop.post(hold)
    assert inside.wait(DEADLINE_S)
    setup.loop.submit(lambda _: "never").add_done_callback(hand_in)
    go.set()
    setup.join()
    assert again == [DIED]


def test_post_does_not_wait_and_does_not_raise(setup: Setup) -> None:
    done = threading.Event()
    # From the loop's own thread too, where run() would wait for itself.
    setup.loop.run(lambda _: setup.loop.post(lambda _: done.set()), DEADLINE_S)
    assert done.wait(DEADLINE_S)
    setup.loop.close()
    setup.loop.post(lambda _: None)


def test_close_joins_and_may_be_repeated(setup: Setup) -> None:
    setup.loop.run(setup.give(10**9), DEADLINE_S)
    setup.loop.close(DEADLINE_S)
    assert not setup.loop._thread.is_alive() and setup.engine.todo > 0
    setup.loop.close(DEADLINE_S)
    with pytest.raises(EngineStoppedError):
        setup.loop.run(lambda _: None)
    assert len(setup.failures) == 1 and isinstance(setup.failures[0], EngineStoppedError)


def test_close_on_the_loops_own_thread_does_not_wait_for_itself(setup: Setup) -> None:
    setup.loop.run(lambda _: setup.loop.close(), DEADLINE_S)
    setup.join()


def test_a_call_past_its_timeout(setup: Setup) -> None:
    go = threading.Event()
    with pytest.raises(TimeoutError):
        setup.loop.run(lambda _: go.wait(DEADLINE_S), timeout_s=0.01)
    go.set()
    assert setup.loop.run(lambda _: "alive", DEADLINE_S) == "alive"


def test_an_idle_loop_uses_no_cpu(setup: Setup) -> None:
    setup.loop.run(setup.give(1), DEADLINE_S)
    assert setup.engine.idle.wait(DEADLINE_S)
    thread_time = lambda _: time.thread_time()  # noqa: E731
    before = setup.loop.run(thread_time, DEADLINE_S)
    threading.Event().wait(0.5)
    assert setup.loop.run(thread_time, DEADLINE_S) - before < 0.05
