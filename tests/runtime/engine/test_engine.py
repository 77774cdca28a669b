"""The engine on a group that has no model: whatever joins, leaves or is preempted, each request gets its own tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.cluster.group import ShardGroupDied
from headwise.runtime.engine import engine as engine_module
from headwise.runtime.engine import idle_check
from headwise.runtime.engine.block_tables import BlockTables
from headwise.runtime.engine.engine import Engine, Sink
from headwise.runtime.engine.generation import Generation
from headwise.runtime.engine.request import seat_of
from headwise.runtime.engine.scheduler import Scheduler
from headwise.runtime.engine.text import TextStream
from headwise.runtime.inputs.tokenizer import IncrementalDetokenizer, load_tokenizer
from headwise.runtime.kv import blocks as blocks_module
from headwise.runtime.kv.blocks import BlockPool, IntegrityError
from headwise.runtime.kv.events import KvEvents
from headwise.runtime.kv.ledger import Ledger
from headwise.runtime.kv.pins import Pins
from headwise.runtime.kv.prefix_cache import PrefixCache
from headwise.runtime.output import FinishReason
from headwise.workers.plan import StepOutput, StepPlan, decode_output, decode_plan, encode_output, encode_plan
from tests.effort import examples
from tests.plain_group import POISON, VOCAB, Bench, Letters, PlainGroup, alone, make_request


@pytest.mark.parametrize("depth", [1, 2])
@examples(150)
@given(data=st.data())
def test_every_request_gets_the_tokens_it_would_get_alone(depth: int, data: st.DataObject) -> None:
    blocks = data.draw(st.integers(7, 20), "blocks")
    rows, budget = data.draw(st.integers(1, 5), "rows"), data.draw(st.integers(1, 30), "budget")
    bench = Bench(blocks, rows, budget, depth, data.draw(st.integers(1, 30), "mixed"))
    prompt = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=14)
    poisoned = st.just([1, POISON, 2])
    stops = st.sets(st.integers(0, VOCAB - 1), max_size=2).map(tuple)
    # 14 prompt and 14 generated tokens are 7 blocks: each fits alone, not all together.
    drawn = st.tuples(prompt | prompt | prompt | poisoned, st.integers(1, 14), stops, st.integers(0, 3))
    todo = [
        make_request(str(i), *fields) for i, fields in enumerate(data.draw(st.lists(drawn, max_size=8), "requests"))
    ]
    requests, aborted = list(todo), set()
    for _ in range(3000):
        if todo and data.draw(st.integers(0, 2)) == 0:
            bench.add(todo.pop())
        if bench.got and data.draw(st.integers(0, 19)) == 0:
            name = data.draw(st.sampled_from([key.split("#")[0] for key in bench.got]))
            aborted.add(name)
            bench.engine.abort(name)
            bench.check_books()
        bench.step()
        if not todo and not bench.engine.has_work:
            break
    bench.check_idle()
    for request in requests:
        tokens, reason = alone(request)
        if bench.ended[request.key] is FinishReason.ABORT:
            assert request.request_id in aborted
            assert bench.got[request.key] == tokens[: len(bench.got[request.key])]
        else:
            assert (bench.got[request.key], bench.ended[request.key]) == (tokens, reason)
        assert request.generated == bench.got[request.key]
    assert bench.engine.num_generated_tokens == sum(map(len, bench.got.values()))


class CountedName(str):
    """A request id that counts how often it is compared."""

    comparisons = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        CountedName.comparisons += 1
        return str.__eq__(self, other)


def test_to_end_or_pause_a_request_looks_at_no_other() -> None:
    bench, names = Bench(rows=2), [CountedName(f"request {number}") for number in range(300)]
    for name in names:
        for index in range(2):
            bench.add(make_request(name, [1, 2, 3], 5, index=index))
    bench.step()
    CountedName.comparisons = 0
    for name in names:
        bench.engine.pause(CountedName(name), True)
    for name in names:
        assert name in bench.engine.request_ids
        bench.engine.abort(CountedName(name))
    assert CountedName.comparisons < 20 * len(names), "each looks at all others"
    assert set(bench.ended.values()) == {FinishReason.ABORT} and len(bench.ended) == 2 * len(names)
    assert not bench.engine.request_ids and bench.engine.num_paused == 0
    bench.run()
    bench.check_idle()


def test_depth_two_keeps_two_steps_in_flight_and_gives_the_same_tokens() -> None:
    got = []
    for depth in (1, 2):
        bench = Bench(depth=depth)
        for i in range(6):
            bench.add(make_request(str(i), list(range(i + 1)), 10))
        bench.run()
        bench.check_idle()
        assert bench.group.max_in_flight == depth
        got.append(bench.got)
    assert got[0] == got[1] and all(len(tokens) == 10 for tokens in got[0].values())


@pytest.mark.parametrize("depth", [1, 2])
def test_preemption_does_not_change_tokens(depth: int) -> None:
    bench = Bench(blocks=7, depth=depth)
    requests = [make_request(str(i), [i] * 6, 14, seed=i) for i in range(5)]
    for request in requests:
        bench.add(request)
    bench.run()
    bench.check_idle()
    assert bench.engine.stats()["num_preemptions"] > 0
    assert bench.got == {request.key: alone(request)[0] for request in requests}


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_least_that_a_request_needs_is_enough(depth: int, rows: int) -> None:
    """A row and blocks that a step in flight holds on to are waited for, and none waits for ever."""
    bench = Bench(blocks=3, rows=rows, depth=depth)
    free = make_request("free", [1, 2, 3, 4, 5], 7)
    tokens, _ = alone(free)
    requests = [make_request(str(i), [1, 2, 3, 4, 5], 7, stop=(tokens[2],)) for i in range(3)]
    requests.append(free)
    for request in requests:
        bench.add(request)
    bench.run()
    bench.check_idle()
    assert bench.got == {request.key: alone(request)[0] for request in requests}


def test_abort_while_a_step_is_in_flight() -> None:
    bench = Bench(depth=2)
    leaving, staying = make_request("leaving", [1, 2, 3], 20), make_request("staying", [4, 5], 20)
    bench.add(leaving)
    bench.add(staying)
    bench.step()
    assert seat_of(leaving).is_in_flight
    bench.engine.abort("leaving")
    bench.engine.abort("leaving")
    bench.engine.abort("nobody")
    assert bench.ended == {"leaving#0": FinishReason.ABORT} and len(bench.got["leaving#0"]) == 1
    assert seat_of(leaving).block_ids, "the step in flight still writes there"
    late = make_request("late", [1, 2, 3], 20)
    bench.add(late)
    bench.step()
    assert leaving.seat is None
    bench.run()
    bench.check_idle()
    assert bench.got["staying#0"] == alone(staying)[0] and bench.got["late#0"] == alone(late)[0]


def test_abort_of_a_request_that_waits() -> None:
    bench = Bench(rows=1)
    first, second = make_request("first", [1], 3), make_request("second", [2], 3)
    bench.add(first)
    bench.add(second)
    bench.engine.step()
    bench.engine.abort("second")
    assert bench.ended == {"second#0": FinishReason.ABORT} and bench.got["second#0"] == []
    bench.run()
    bench.check_idle()
    assert bench.got["first#0"] == alone(first)[0]


def test_a_stop_seen_while_the_next_step_is_in_flight_adds_no_token() -> None:
    free = make_request("free", [3, 1, 4], 12)
    tokens, _ = alone(free)
    stop = next(token for token in tokens[1:] if token not in tokens[:1])
    bench = Bench(depth=2)
    bench.add(make_request("stopped", [3, 1, 4], 12, stop=(stop,), stop_token_ids=[stop]))
    bench.run()
    bench.check_idle()
    assert bench.got["stopped#0"] == tokens[: tokens.index(stop) + 1]
    assert bench.ended["stopped#0"] is FinishReason.STOP


@pytest.mark.parametrize("depth", [1, 2])
def test_a_stop_string_seen_while_the_next_step_is_in_flight_adds_no_text(depth: int) -> None:
    free = make_request("free", [3, 1, 4], 12)
    tokens, _ = alone(free)
    text = Letters().add(tokens)
    stop = text[4:6]
    at = text.find(stop)
    bench = Bench(depth=depth)
    samples = [make_request("a", [3, 1, 4], 12, index=0), make_request("a", [3, 1, 4], 12, seed=1, index=1)]
    bench.add(samples[0], stop=(stop,))
    bench.add(samples[1], stop=())
    bench.run()
    bench.check_idle()
    assert (bench.text["a#0"], bench.got["a#0"]) == (text[:at], tokens[: at + 2])
    assert samples[0].finish_reason is FinishReason.STOP and samples[0].stop_reason == stop
    assert bench.text["a#1"] == Letters().add(alone(samples[1])[0])


@pytest.mark.parametrize("depth", [1, 2])
def test_min_tokens_keep_a_stop_token_from_ending_the_output(depth: int) -> None:
    """The shards do not choose one before; an engine that is given one all the same goes on."""
    tokens, _ = alone(make_request("free", [3, 1, 4], 6))
    bench = Bench(depth=depth)
    bench.add(make_request("a", [3, 1, 4], 6, stop=tuple(set(tokens)), min_tokens=4))
    bench.run()
    assert bench.got["a#0"] == tokens[:5]


def test_a_row_that_fails_ends_alone() -> None:
    bench = Bench(depth=2)
    bad, good = make_request("bad", [1, POISON], 8), make_request("good", [1, 2], 8)
    bench.add(bad)
    bench.add(good)
    bench.run()
    bench.check_idle()
    assert bench.ended["bad#0"] is FinishReason.ERROR and bad.error == "not finite" and bench.got["bad#0"] == []
    assert bench.got["good#0"] == alone(good)[0]


class FailingGrammars(PlainGroup):
    """The grammar of seed 99 fails at the token after so many."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def _compute(self, index: int, count: int, output: StepOutput) -> None:
        super()._compute(index, count, output)
        row = self.rows[index]
        if row.seed == 99 and output.tokens and output.tokens[-1][0] == index and len(row.tokens) > 9 + self.after:
            output.tokens.pop()
            output.failed.append((index, "the grammar allows nothing"))
            output.verified.append(index)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_grammar_that_fails_costs_those_nothing_who_share_its_prompt(after: int, depth: int) -> None:
    group = FailingGrammars(after)
    bench, prompt = Bench(depth=depth, group=group), [1, 2, 3, 4, 5, 6, 7, 8, 9]
    requests = [make_request("failing", prompt, 12, seed=99)]
    requests += [make_request(name, prompt, 6, seed=seed) for seed, name in enumerate("abc")]
    for request in requests:
        bench.add(request)
    bench.run()
    assert bench.ended["failing#0"] is FinishReason.ERROR and len(bench.got["failing#0"]) == after
    for request in requests[1:]:
        assert (bench.got[request.key], bench.ended[request.key]) == alone(request)
        assert request.metrics.num_cached_tokens == 8, "it did not compute the prompt again"
    assert bench.engine.stats()["num_preemptions"] == 0
    bench.check_idle()


def test_queries_of_shards_come_after_the_steps_in_flight() -> None:
    bench = Bench(depth=2)
    request = make_request("a", [1, 2], 8)
    bench.add(request)
    bench.step()
    assert bench.group.plans
    assert bench.engine.query_shards("stats") == ["stats"]
    bench.run()
    bench.check_idle()
    assert bench.got["a#0"] == alone(request)[0]


def test_an_output_out_of_order_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.add(make_request("a", [1], 8))
    bench.step()
    monkeypatch.setattr(bench.group, "collect", lambda: StepOutput(7))
    with pytest.raises(ShardGroupDied, match="step 7"):
        bench.engine.step()


def test_a_request_that_nothing_can_schedule_is_an_error_and_not_a_hang() -> None:
    bench = Bench(blocks=1)
    bench.add(make_request("a", [1] * 10, 8))
    with pytest.raises(RuntimeError, match="none can be scheduled"):
        bench.engine.step()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check looks at one block at a time, and lets others go before each."""
    monkeypatch.setattr(blocks_module, "CHECK_PART", 1)
    monkeypatch.setattr(idle_check, "CHECK_S", 0.0)


@pytest.mark.usefixtures("small_parts")
def test_the_check_of_an_idle_engine_lets_requests_go_first() -> None:
    bench = Bench(blocks=40)
    engine = bench.engine
    for name in "ab":
        bench.add(make_request(name, [1, 2, 3, 4, 5, int(name, 16)], 3))
        while name + "#0" not in bench.ended:
            engine._check._next = 0.0  # one that was given up is no reason to wait
            engine.step()
        for _ in range(5):
            assert engine.has_work, "the check goes on"
            engine.step()
    assert engine.stats()["prefix_cache"]["integrity_checks"] == 0
    for _ in range(500):
        if not engine.has_work:
            break
        engine.step()
    assert engine.stats()["prefix_cache"]["integrity_checks"] == 1
    bench.check_idle()


@pytest.mark.usefixtures("small_parts")
def test_what_the_check_of_an_idle_engine_finds_ends_it() -> None:
    bench = Bench(blocks=40)
    bench.add(make_request("a", [1, 2, 3], 3))
    while "a#0" not in bench.ended:
        bench.step()
    bench.pool._free.pop()
    with pytest.raises(IntegrityError, match="listed otherwise"):
        for _ in range(200):
            bench.engine.step()


@pytest.mark.usefixtures("small_parts")
def test_a_check_is_void_once_something_changes() -> None:
    bench = Bench(blocks=40)
    bench.add(make_request("a", [1, 2, 3, 4, 5], 3))
    while "a#0" not in bench.ended:
        bench.engine.step()
    assert bench.engine.has_work
    bench.engine.reset_prefix_cache()
    bench.engine.step()
    assert not bench.engine.has_work and bench.engine.stats()["prefix_cache"]["integrity_checks"] == 0


def test_what_is_new_is_delivered_once_a_step_to_each_sink() -> None:
    bench = Bench(depth=2)
    shared: list[list[str]] = []
    own: list[list[str]] = []

    def to(calls: list[list[str]]) -> Sink:
        return lambda new: calls.append([delta.request.request_id for delta in new])

    both = to(shared)
    for name, sink in (("a", both), ("b", both), ("c", to(own))):
        bench.engine.add(make_request(name, [1], 3), None, sink)
    bench.engine.step()
    bench.engine.step()
    assert shared == [["a", "b"]] * 2 and own == [["c"]] * 2
    bench.engine.abort("b")
    assert shared[2:] == [["b"]]


def test_stats_count() -> None:
    bench = Bench(blocks=12)
    bench.add(make_request("a", [1, 2, 3], 5))
    assert bench.engine.stats()["num_waiting"] == 1 and bench.text["a#0"] == ""
    assert bench.engine.request_ids == {"a"}
    bench.engine.step()
    stats = bench.engine.stats()
    assert (stats["num_running"], stats["num_waiting"], stats["num_steps"], stats["num_generated_tokens"]) == (
        1,
        0,
        1,
        1,
    )
    assert (stats["num_blocks"], stats["num_free_blocks"], stats["num_preemptions"]) == (12, 11, 0)
    bench.run()
    assert bench.engine.stats()["num_generated_tokens"] == 5 and bench.engine.request_ids == set()


class InstantGroup(PlainGroup):
    """Answers at once, with tokens of English text; plans and outputs go through the codec, as between processes."""

    def __init__(self, token_ids: list[int]) -> None:
        super().__init__()
        self._token_ids = token_ids

    def submit(self, plan: StepPlan) -> None:
        self.plans.append(encode_plan(plan))

    def collect(self) -> StepOutput:
        plan = decode_plan(self.plans.popleft())
        at = [(row, self._token_ids[(plan.step + 37 * row) % len(self._token_ids)]) for row, _ in plan.computes]
        return decode_output(encode_output(StepOutput(plan.step, at, seconds=0.02)))


@pytest.mark.thorough
def test_a_decode_step_of_32_streams_takes_little_processor_time(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer is not None
    group = InstantGroup(tokenizer.encode("It was the best of times, it was the worst of times. 🦊 " * 9))
    cache = PrefixCache(BlockPool(32 * 26), 16)
    tables, ledger = BlockTables(cache), Ledger(group.transfer, group.transferred, 1)
    generation = Generation(1, group, cache, tables, ledger, None, Pins(cache, 0))
    engine = Engine(generation, Scheduler(tables, 32, 1024), KvEvents(1), 2)
    for i in range(32):
        text = TextStream(IncrementalDetokenizer(tokenizer), stop=("\n\n", "User:"), include_stop=False)
        engine.add(make_request(str(i), [5] * 9, 400), text, lambda new: None)
    engine.step()
    taken = []
    for _ in range(4):
        before = engine.stats()["engine_cpu_seconds"]
        for _ in range(50):
            engine.step()
        taken.append((engine.stats()["engine_cpu_seconds"] - before) / 50)
    assert engine.num_generated_tokens == 201 * 32
    assert min(taken) < 1.5e-3, taken


class Clock:
    """Stands for the module ``time``: it goes on only when it is told to."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = thread_time = perf_counter

    def slow(self, function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.now += seconds
            return function(*args)

        return call


def test_stats_time_the_parts_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, bench = Clock(), Bench()
    monkeypatch.setattr(engine_module, "time", clock)
    monkeypatch.setattr(bench.engine._scheduler, "schedule", clock.slow(bench.engine._scheduler.schedule, 1))
    monkeypatch.setattr(bench.group, "submit", clock.slow(bench.group.submit, 2))
    monkeypatch.setattr(bench.group, "collect", clock.slow(bench.group.collect, 4))
    monkeypatch.setattr(bench, "_sink", clock.slow(bench._sink, 8))
    bench.add(make_request("a", [1, 2, 3], 3))
    for steps in (1, 2, 3):
        bench.engine.step()
        seconds = bench.engine.stats()["engine_seconds"]
        assert seconds == {"schedule": steps, "submit": 2 * steps, "collect": 4 * steps, "emit": 8 * steps}
        assert bench.engine.stats()["engine_cpu_seconds"] == 15 * steps
