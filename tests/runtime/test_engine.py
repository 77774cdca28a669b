"""The engine on a group that has no model: whatever joins, leaves or is preempted, each request gets its own tokens."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.cluster.group import Progress, ShardGroup
from headwise.runtime import engine as engine_module
from headwise.runtime.engine import Delta, Engine, Sink
from headwise.runtime.kv.blocks import BlockPool
from headwise.runtime.output import TextStream
from headwise.runtime.request import FinishReason, Request
from headwise.runtime.sampling_params import SamplingParams
from headwise.runtime.scheduler import Scheduler
from headwise.runtime.tokenizer import IncrementalDetokenizer, load_tokenizer
from headwise.workers.plan import (
    RowSampling,
    StepOutput,
    StepPlan,
    decode_output,
    decode_plan,
    encode_output,
    encode_plan,
)

BLOCK = 4
VOCAB = 17
POISON = VOCAB  # in a prompt: the request's logits are not finite


def next_token(tokens: list[int], seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr((tokens, seed)).encode(), digest_size=4).digest()) % VOCAB


@dataclass
class Row:
    tokens: list[int]
    computed: int
    blocks: list[int]
    seed: int


class PlainGroup(ShardGroup):
    """Follows plans as a shard does, as late as it may; a slot of a block remembers the tokens up to the one that was
    written to it."""

    def __init__(self) -> None:
        self.rows: dict[int, Row] = {}
        self.memory: dict[tuple[int, int], tuple[int, ...]] = {}
        self.plans: deque[bytes] = deque()
        self.tables: dict[int, list[int]] = {}  # of each row, once the plans in flight are done
        self.in_use: deque[set[int]] = deque()  # the blocks that each plan in flight works on
        self.next_step = 0
        self.max_in_flight = 0

    def start(self, progress: Progress | None = None, num_blocks: int | None = None) -> int:
        raise NotImplementedError

    def submit(self, plan: StepPlan) -> None:
        handed_out = {block for admit in plan.admits for block in admit.block_ids}
        handed_out |= {block for _, block in plan.appends}
        assert not handed_out & set().union(*self.in_use), "a step in flight still works on this block"
        self.tables |= {admit.row: list(admit.block_ids) for admit in plan.admits}
        for row, block in plan.appends:
            self.tables[row].append(block)
        self.in_use.append({block for row, _ in plan.computes for block in self.tables[row]})
        self.plans.append(encode_plan(plan))
        self.max_in_flight = max(self.max_in_flight, len(self.plans))

    def collect(self) -> StepOutput:
        self.in_use.popleft()
        return decode_output(encode_output(self._step(decode_plan(self.plans.popleft()))))

    def call(self, method: str) -> list[Any]:
        assert not self.plans
        return [method]

    def close(self) -> None:
        pass

    def _step(self, plan: StepPlan) -> StepOutput:
        assert plan.step == self.next_step
        self.next_step += 1
        for row in plan.drops:
            del self.rows[row]
        for admit in plan.admits:
            assert admit.row not in self.rows
            self.rows[admit.row] = Row(
                list(admit.token_ids), admit.num_computed, list(admit.block_ids), admit.sampling.seed
            )
        for index, block in plan.appends:
            self.rows[index].blocks.append(block)
        held = [block for row in self.rows.values() for block in row.blocks]
        assert len(held) == len(set(held))
        output = StepOutput(plan.step)
        for index, count in plan.computes:
            self._compute(index, count, output)
        return output

    def _compute(self, index: int, count: int, output: StepOutput) -> None:
        row = self.rows[index]
        assert 0 < count <= len(row.tokens) - row.computed
        row.computed += count
        slots = [(row.blocks[at // BLOCK], at % BLOCK) for at in range(row.computed)]
        for at in range(row.computed - count, row.computed):
            self.memory[slots[at]] = tuple(row.tokens[: at + 1])
        for at, slot in enumerate(slots):
            assert self.memory[slot] == tuple(row.tokens[: at + 1]), "another request wrote here"
        if row.computed == len(row.tokens):
            token = next_token(row.tokens, row.seed)
            if POISON in row.tokens:
                output.failed.append((index, "not finite"))
            else:
                output.tokens.append((index, token))
            row.tokens.append(token)


class Letters:
    """A detokenizer: token 0 is a, 1 is b."""

    def add(self, token_ids: list[int]) -> str:
        return "".join(chr(ord("a") + token) for token in token_ids)

    def flush(self) -> str:
        return ""


def make_request(
    name: str,
    prompt: list[int],
    max_tokens: int,
    stop: tuple[int, ...] = (),
    seed: int = 0,
    index: int = 0,
    **params: Any,
) -> Request:
    sampling = RowSampling(seed=seed, stop_token_ids=stop)
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, **params), sampling, max_tokens, index)


def alone(request: Request) -> tuple[list[int], FinishReason]:
    """What the request's tokens and end must be, computed without an engine."""
    if POISON in request.prompt_token_ids:
        return [], FinishReason.ERROR
    generated: list[int] = []
    while len(generated) < request.max_tokens:
        generated.append(next_token(request.prompt_token_ids + generated, request.sampling.seed))
        if generated[-1] in request.sampling.stop_token_ids:
            return generated, FinishReason.STOP
    return generated, FinishReason.LENGTH


class Bench:
    """An engine on a PlainGroup, and what its requests got."""

    def __init__(
        self, blocks: int = 64, rows: int = 8, budget: int = 16, depth: int = 1, mixed: int | None = None
    ) -> None:
        self.pool, self.group = BlockPool(blocks), PlainGroup()
        self.engine = Engine(self.group, self.pool, Scheduler(self.pool, BLOCK, rows, budget, mixed), depth)
        self.requests: list[Request] = []
        self.got: dict[str, list[int]] = {}
        self.text: dict[str, str] = {}
        self.ended: dict[str, FinishReason | None] = {}

    def add(self, request: Request, stop: tuple[str, ...] | None = None) -> None:
        """Args: ``stop``: strings that end it; None is without text."""
        self.requests.append(request)
        self.got[request.key], self.text[request.key] = [], ""
        text = None if stop is None else TextStream(Letters(), stop, include_stop=False)  # type: ignore[arg-type]
        self.engine.add(request, text, self._sink)

    def run(self) -> None:
        for _ in range(5000):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError(f"still at work: {self.engine.stats()}")

    def step(self) -> None:
        self.engine.step()
        self.check_books()

    def check_books(self) -> None:
        """Every block that is not free is held by one request, and every row by at most one."""
        self.engine.check_integrity()
        blocks = [block for request in self.requests for block in request.block_ids]
        assert len(blocks) == len(set(blocks)) == self.pool.num_blocks - self.pool.num_free
        rows = [request.row for request in self.requests if request.row >= 0]
        assert len(rows) == len(set(rows))

    def check_idle(self) -> None:
        assert not self.engine.has_work and self.pool.num_free == self.pool.num_blocks
        assert self.engine.stats()["num_running"] == self.engine.stats()["num_waiting"] == 0
        self.check_books()

    def _sink(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            key = delta.request.key
            assert key not in self.ended, "a delta after the last"
            self.got[key] += delta.token_ids
            self.text[key] += delta.text or ""
            if delta.finished:
                self.ended[key] = delta.request.finish_reason


@pytest.mark.parametrize("depth", [1, 2])
@settings(max_examples=150, deadline=None)
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
    assert leaving.num_in_flight == 1
    bench.engine.abort("leaving")
    bench.engine.abort("leaving")
    bench.engine.abort("nobody")
    assert bench.ended == {"leaving#0": FinishReason.ABORT} and len(bench.got["leaving#0"]) == 1
    assert leaving.row >= 0 and leaving.block_ids, "the step in flight still writes there"
    late = make_request("late", [1, 2, 3], 20)
    bench.add(late)
    bench.step()
    assert leaving.row == -1 and not leaving.block_ids
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


def test_calls_to_shards_come_after_the_steps_in_flight() -> None:
    bench = Bench(depth=2)
    request = make_request("a", [1, 2], 8)
    bench.add(request)
    bench.step()
    assert bench.group.plans
    assert bench.engine.call_shards("stats") == ["stats"]
    bench.run()
    bench.check_idle()
    assert bench.got["a#0"] == alone(request)[0]


def test_an_output_out_of_order_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.add(make_request("a", [1], 8))
    bench.step()
    monkeypatch.setattr(bench.group, "collect", lambda: StepOutput(7))
    with pytest.raises(RuntimeError, match="step 7"):
        bench.engine.step()


def test_a_request_that_nothing_can_schedule_is_an_error_and_not_a_hang() -> None:
    bench = Bench(blocks=1)
    bench.add(make_request("a", [1] * 10, 8))
    with pytest.raises(RuntimeError, match="none can be scheduled"):
        bench.engine.step()


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


def test_a_decode_step_of_32_streams_takes_little_processor_time(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer is not None
    group = InstantGroup(tokenizer.encode("It was the best of times, it was the worst of times. 🦊 " * 9))
    pool = BlockPool(32 * 26)
    engine = Engine(group, pool, Scheduler(pool, 16, 32, 1024), pipeline_depth=2)
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
