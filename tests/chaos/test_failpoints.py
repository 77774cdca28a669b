"""Each failpoint by name: whatever dies or fails there, every request gets the tokens that it would have had."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from headwise.runtime import LLM, SamplingParams
from headwise.runtime.chaos import books
from headwise.runtime.chaos.books import check_engine, leftovers
from headwise.runtime.engine.engine import Engine
from headwise.runtime.engine.loop import EngineStoppedError
from headwise.runtime.kv.blocks import Use
from headwise.runtime.output import FinishReason
from headwise.workers import failpoints
from headwise.workers.failpoints import Action, Point
from tests.chaos.bench import DEADLINE_S, STEP_TIMEOUT_S, ChaosBench, failpoint_folder, speaking_model

IN_STEPS = (Point.RANK_REPLY, Point.STEP_ATTENTION, Point.STEP_MLP, Point.COLLECTIVE_ENTER, Point.COLLECTIVE_LEAVE)
IN_STARTS = (Point.LOAD_LAYER, Point.ALLOCATE)
IN_TIERS = (Point.KV_COPY, Point.KV_WRITE, Point.KV_JOURNAL)
IN_RECOVERY = (Point.RECOVERY_CLOSE, Point.RECOVERY_START, Point.RECOVERY_RESUME)
IN_ENGINE = (Point.ENGINE_SUBMIT, Point.ENGINE_SUBMITTED, Point.ENGINE_OUTPUT)
IN_HANDOFF = (Point.HANDOFF_PUSH, Point.HANDOFF_RECEIVE, Point.HANDOFF_COMMIT)

SETTINGS = {"kv_memory": "64MiB", "max_model_len": 128, "step_timeout": STEP_TIMEOUT_S, "quiet": True}
FEW_BLOCKS = 40
"""So few that the blocks of earlier requests have to move to the disk."""


def test_every_point_is_tried_here() -> None:
    tried = {*IN_STEPS, *IN_STARTS, *IN_TIERS, *IN_RECOVERY, *IN_ENGINE, *IN_HANDOFF}
    assert tried | {Point.CHANNEL_PLAN, Point.STEP_TOKEN} == set(Point)


# Ranks that are threads of this process: nothing can be killed, but everything can fail


@pytest.fixture(scope="module")
def threads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChaosBench]:
    path = tmp_path_factory.mktemp("threads")
    with failpoint_folder(path) as folder:
        model = speaking_model(path / "model")
        settings = {"executor": "local", "num_blocks": FEW_BLOCKS, "disk_kv_path": path / "disk"}
        with LLM(model, **SETTINGS, **settings) as llm:  # type: ignore[arg-type]
            yield ChaosBench(llm, folder)


@pytest.fixture(autouse=True)
def disarmed(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in ("threads", "ranks"):
        if name in request.fixturenames:
            failpoints.disarm(request.getfixturevalue(name).folder)


@pytest.mark.parametrize("action", [Action.RAISE, Action.NO_SPACE])
@pytest.mark.parametrize("point", [point for point in IN_STEPS if "collective" not in point])
def test_an_error_in_a_step(threads: ChaosBench, point: Point, action: Action) -> None:
    threads.survives(lambda: threads.arm(point, action, skip=9))


@pytest.mark.parametrize("action", [Action.RAISE, Action.NO_SPACE])
@pytest.mark.parametrize("point", [*IN_STARTS, *IN_RECOVERY])
def test_an_error_while_the_next_group_starts(threads: ChaosBench, point: Point, action: Action) -> None:
    def act() -> None:
        threads.arm(point, action)
        threads.arm(Point.STEP_MLP, Action.RAISE, skip=9)

    threads.survives(act)


@pytest.mark.parametrize("action", [Action.RAISE, Action.NO_SPACE, Action.SLEEP])
@pytest.mark.parametrize("point", IN_TIERS)
def test_an_error_in_a_tier_costs_no_more_than_a_block(threads: ChaosBench, point: Point, action: Action) -> None:
    before = threads.recoveries
    threads.survives(lambda: threads.arm(point, action, seconds=0.3), recovers=False)
    assert threads.recoveries == before


def test_a_message_that_is_lost_and_one_that_is_late(threads: ChaosBench) -> None:
    threads.survives(lambda: threads.arm(Point.RANK_REPLY, Action.DROP, 0, skip=5))
    threads.survives(lambda: threads.arm(Point.CHANNEL_PLAN, Action.DROP, 0, skip=5))
    threads.survives(lambda: threads.arm(Point.CHANNEL_PLAN, Action.SLEEP, 0, seconds=0.5), recovers=False)


def test_a_poison_fails_alone_and_its_neighbours_finish(threads: ChaosBench) -> None:
    fails_alone(threads, Action.RAISE)


def fails_alone(bench: ChaosBench, action: Action) -> None:
    """One request holds a token at which the group dies whenever it is computed; eight others do not."""
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    prompts = [[20 + (3 * i + j) % 60 for j in range(12 + i)] for i in range(8)]
    want = [output.outputs[0].token_ids for output in bench.llm.generate(prompts, params, use_tqdm=False)]
    held = {token for tokens in (*prompts, *want) for token in tokens}
    poison = next(token for token in range(100, 250) if token not in held)
    before = bench.recoveries
    bench.arm(Point.STEP_TOKEN, action, token=poison, stays=True)
    outputs = bench.llm.generate(
        [*prompts[:4], [5, poison, 7], *prompts[4:]], params, cache_salt="poison", use_tqdm=False
    )
    failed = outputs.pop(4)
    assert failed.outputs[0].finish_reason is FinishReason.ERROR
    assert failed.error is not None and failed.error.startswith("the shard group died")
    assert [output.outputs[0].token_ids for output in outputs] == want
    assert [output.error for output in outputs] == [None] * 8
    failpoints.disarm(bench.folder)
    deaths = 3 if action is Action.RAISE else 4
    assert bench.recoveries - before >= deaths - 1  # on a slow machine a step may be taken for one that hangs, too
    bench.survives(lambda: None, recovers=False)


@pytest.mark.parametrize("point", IN_ENGINE)
def test_an_error_in_the_engine_itself_is_told_to_everybody(tmp_path: Path, point: Point) -> None:
    with failpoint_folder(tmp_path) as folder:
        model = speaking_model(tmp_path / "model")
        with LLM(model, executor="local", **SETTINGS) as llm:  # type: ignore[arg-type]
            bench = ChaosBench(llm, folder)
            bench.arm(point, Action.RAISE, skip=3)
            with pytest.raises(EngineStoppedError, match="FailpointError"):
                bench.ask()
            with pytest.raises(EngineStoppedError):
                bench.ask()


@pytest.mark.parametrize("action", [Action.RAISE, Action.SLEEP])
@pytest.mark.parametrize("point", IN_HANDOFF)
def test_an_error_in_a_handoff_costs_its_prompt_a_computation(tmp_path: Path, point: Point, action: Action) -> None:
    with failpoint_folder(tmp_path) as folder:
        model = speaking_model(tmp_path / "model")
        sides = {"executor": "local", "prefill": {}, "handoff_min_tokens": 0, "handoff_shared_memory": False}
        with LLM(model, **SETTINGS, **sides) as llm:  # type: ignore[arg-type]
            bench = ChaosBench(llm, folder)
            bench.survives(lambda: bench.arm(point, action, seconds=0.3), recovers=False)
            assert len(failpoints.fired(folder)) == 1 and bench.recoveries == 0


def test_blocks_that_are_not_given_back_are_found(threads: ChaosBench) -> None:
    def look(engine: Engine) -> list[str]:
        pool = engine.generation.cache.pool
        taken = pool.allocate(1)
        try:
            return books._problems(engine)
        finally:  # in one call: the engine itself looks at its books between two
            pool.release(taken[0], Use.COMPUTE)

    threads.llm.reset_prefix_cache()
    assert any("blocks are free" in problem for problem in threads.llm._loop.run(look))
    assert check_engine(threads.llm, DEADLINE_S) == []


# Ranks that are processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChaosBench]:
    path = tmp_path_factory.mktemp("ranks")
    with failpoint_folder(path) as folder:
        model = speaking_model(path / "model")
        settings = {"tensor_parallel_size": 2, "cpus_per_rank": 0.5, "num_blocks": FEW_BLOCKS}
        with LLM(model, **SETTINGS, **settings, disk_kv_path=path / "disk") as llm:  # type: ignore[arg-type]
            yield ChaosBench(llm, folder)


slow = pytest.mark.slow
ONCE_IN_CI = {(Point.STEP_MLP, Action.KILL), (Point.COLLECTIVE_LEAVE, Action.RAISE)}


def each(points: tuple[Point, ...], *actions: Action) -> list[object]:
    """Every point with every action, slow but for two."""
    pairs = [(point, action) for point in points for action in actions]
    return [pytest.param(*pair, marks=() if pair in ONCE_IN_CI else slow) for pair in pairs]


@pytest.mark.parametrize(("point", "action"), each(IN_STEPS, Action.KILL, Action.RAISE, Action.EXIT))
def test_a_rank_that_ends_in_a_step(ranks: ChaosBench, point: Point, action: Action) -> None:
    ranks.survives(lambda: ranks.arm(point, action, 1, skip=30))
    [*_, last] = failpoints.fired(ranks.folder)
    assert (last.point, last.action) == (point, action)
    assert last.pid not in ranks.llm.stats()["shard_pids"]


@pytest.mark.parametrize(("point", "action"), each((*IN_STARTS, *IN_RECOVERY), Action.KILL, Action.RAISE))
def test_a_group_that_dies_before_it_has_begun(ranks: ChaosBench, point: Point, action: Action) -> None:
    if point in IN_RECOVERY and action is Action.KILL:
        pytest.skip("this point is in the engine's own process")

    def act() -> None:
        ranks.arm(point, action, None if point in IN_RECOVERY else 1)
        ranks.kill(0)

    ranks.survives(act)


@pytest.mark.parametrize(("point", "action"), each(IN_TIERS, Action.KILL, Action.RAISE, Action.NO_SPACE))
def test_a_rank_that_ends_while_it_writes_blocks(ranks: ChaosBench, point: Point, action: Action) -> None:
    ranks.survives(lambda: ranks.arm(point, action), recovers=action is Action.KILL)


@slow
def test_both_ranks_killed_at_once(ranks: ChaosBench) -> None:
    ranks.survives(lambda: ranks.kill(0, 1))


@slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_and_comes_back_has_no_say(ranks: ChaosBench, rank: int) -> None:
    """It is stopped in the middle of a step for longer than a step may take, and gets SIGCONT once others compute."""
    ranks.survives(lambda: ranks.arm(Point.STEP_MLP, Action.STOP, rank, skip=30))
    [*_, last] = failpoints.fired(ranks.folder)
    if psutil.pid_exists(last.pid):
        psutil.Process(last.pid).resume()
    ranks.survives(lambda: None, recovers=False)
    assert not psutil.pid_exists(last.pid)


@slow
def test_a_rank_that_is_stopped_for_a_moment_is_waited_for(ranks: ChaosBench) -> None:
    before = ranks.recoveries
    ranks.survives(lambda: ranks.arm(Point.STEP_ATTENTION, Action.SLEEP, 1, seconds=1.0, skip=30), recovers=False)
    assert ranks.recoveries == before


@slow
def test_messages_between_processes_that_are_lost(ranks: ChaosBench) -> None:
    ranks.survives(lambda: ranks.arm(Point.CHANNEL_PLAN, Action.DROP, 1, skip=5))
    ranks.survives(lambda: ranks.arm(Point.RANK_REPLY, Action.DROP, 0, skip=5))


@slow
def test_a_poison_that_kills_its_rank_fails_alone(ranks: ChaosBench) -> None:
    fails_alone(ranks, Action.KILL)


@slow
@pytest.mark.parametrize("point", [Point.HANDOFF_PUSH, Point.HANDOFF_RECEIVE])
def test_a_rank_that_ends_in_a_handoff(tmp_path: Path, point: Point) -> None:
    """Of prefill, it costs a prompt a computation; of decode, the requests go on in the next group. Prompts are handed
    over again after either."""
    with failpoint_folder(tmp_path) as folder:
        model = speaking_model(tmp_path / "model")
        # A CPU is what the ranks of the tests before have.
        sides = {"prefill": {"cpus_per_rank": 0.25}, "handoff_min_tokens": 0, "cpus_per_rank": 0.25}
        with LLM(model, **SETTINGS, **sides) as llm:  # type: ignore[arg-type]
            bench = ChaosBench(llm, folder)
            bench.survives(lambda: bench.arm(point, Action.KILL), recovers=point is Point.HANDOFF_RECEIVE)
            assert [one.point for one in failpoints.fired(folder)] == [point]
            before = llm.stats()["handoff"]["committed"]
            bench.ask_until(lambda: llm.stats()["handoff"]["committed"] > before)


ENGINE = """
import sys
from pathlib import Path
from headwise.runtime import LLM
from tests.chaos.bench import ChaosBench
from tests.chaos.test_failpoints import SETTINGS
from headwise.workers.failpoints import Action, Point

model, folder, point = sys.argv[1:]
with LLM(model, tensor_parallel_size=2, cpus_per_rank=0.5, **SETTINGS) as llm:
    bench = ChaosBench(llm, Path(folder))
    print(*llm.stats()["shard_pids"], flush=True)
    bench.arm(Point(point), Action.KILL, skip=5)
    bench.ask()
"""


@slow
@pytest.mark.parametrize("point", IN_ENGINE)
def test_an_engine_that_is_killed_leaves_nothing(tmp_path: Path, point: Point) -> None:
    before = leftovers()
    with failpoint_folder(tmp_path) as folder:
        model = speaking_model(tmp_path / "model")
        command = [sys.executable, "-c", ENGINE, str(model), str(folder), point]
        engine = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
        out, _ = engine.communicate(timeout=240)
        assert engine.returncode == -signal.SIGKILL
        assert [one.point for one in failpoints.fired(folder)] == [point]
    deadline = time.monotonic() + 10
    while any(map(psutil.pid_exists, map(int, out.split()))) or leftovers() - before:
        assert time.monotonic() < deadline, leftovers() - before
        time.sleep(0.05)
