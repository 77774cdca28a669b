"""The engine on a group that has no model: whatever joins, leaves or is preempted, each request gets its own tokens."""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.cluster.group import Progress, ShardGroup
from headwise.runtime.engine import Delta, Engine
from headwise.runtime.kv.blocks import BlockPool
from headwise.runtime.request import FinishReason, Request
from headwise.runtime.sampling_params import SamplingParams
from headwise.runtime.scheduler import Scheduler
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
    """Follows plans as a shard does; a slot of a block remembers the tokens up to the one that was written to it."""

    def __init__(self) -> None:
        self.rows: dict[int, Row] = {}
        self.memory: dict[tuple[int, int], tuple[int, ...]] = {}
        self.outputs: deque[bytes] = deque()
        self.next_step = 0
        self.max_in_flight = 0

    def start(self, progress: Progress | None = None, num_blocks: int | None = None) -> int:
        raise NotImplementedError

    def submit(self, plan: StepPlan) -> None:
        self.outputs.append(encode_output(self._step(decode_plan(encode_plan(plan)))))
        self.max_in_flight = max(self.max_in_flight, len(self.outputs))

    def collect(self) -> StepOutput:
        return decode_output(self.outputs.popleft())

    def call(self, method: str) -> list[Any]:
        assert not self.outputs
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


def make_request(
    name: str, prompt: list[int], max_tokens: int, stop: tuple[int, ...] = (), seed: int = 0, **params: Any
) -> Request:
    sampling = RowSampling(seed=seed, stop_token_ids=stop)
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, **params), sampling, max_tokens)


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

    def __init__(self, blocks: int = 64, rows: int = 8, budget: int = 16, depth: int = 1) -> None:
        self.pool, self.group = BlockPool(blocks), PlainGroup()
        self.engine = Engine(self.group, self.pool, Scheduler(self.pool, BLOCK, rows, budget), depth)
        self.got: dict[str, list[int]] = {}
        self.ended: dict[str, FinishReason | None] = {}

    def add(self, request: Request) -> None:
        self.got[request.key] = []
        self.engine.add(request, None, self._sink)

    def run(self) -> None:
        for _ in range(5000):
            if not self.engine.has_work:
                return
            self.engine.step()
        raise AssertionError(f"still at work: {self.engine.stats()}")

    def check_idle(self) -> None:
        assert not self.engine.has_work and self.pool.num_free == self.pool.num_blocks
        assert self.engine.stats()["num_running"] == self.engine.stats()["num_waiting"] == 0
        self.engine.check_integrity()

    def _sink(self, delta: Delta) -> None:
        key = delta.request.key
        assert key not in self.ended, "a delta after the last"
        assert delta.text is None
        self.got[key] += delta.token_ids
        if delta.finished:
            self.ended[key] = delta.request.finish_reason


@pytest.mark.parametrize("depth", [1, 2])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_request_gets_the_tokens_it_would_get_alone(depth: int, data: st.DataObject) -> None:
    blocks = data.draw(st.integers(7, 20), "blocks")
    bench = Bench(blocks, data.draw(st.integers(1, 5), "rows"), data.draw(st.integers(1, 30), "budget"), depth)
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
        bench.engine.step()
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


def test_abort_while_a_step_is_in_flight() -> None:
    bench = Bench(depth=2)
    leaving, staying = make_request("leaving", [1, 2, 3], 20), make_request("staying", [4, 5], 20)
    bench.add(leaving)
    bench.add(staying)
    bench.engine.step()
    assert leaving.num_in_flight == 1
    bench.engine.abort("leaving")
    bench.engine.abort("leaving")
    bench.engine.abort("nobody")
    assert bench.ended == {"leaving#0": FinishReason.ABORT} and len(bench.got["leaving#0"]) == 1
    late = make_request("late", [1, 2, 3], 20)  # takes the row and the blocks that the step in flight still writes to
    bench.add(late)
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


def test_min_tokens_keep_a_stop_token_from_ending_the_output() -> None:
    """The shards do not choose one before; an engine that is given one all the same goes on."""
    tokens, _ = alone(make_request("free", [3, 1, 4], 6))
    bench = Bench()
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
    bench.engine.step()
    assert bench.group.outputs
    assert bench.engine.call_shards("stats") == ["stats"]
    bench.run()
    bench.check_idle()
    assert bench.got["a#0"] == alone(request)[0]


def test_an_output_out_of_order_is_refused() -> None:
    bench = Bench()
    bench.add(make_request("a", [1], 8))
    bench.engine.step()
    bench.group.outputs.append(encode_output(StepOutput(7)))
    with pytest.raises(RuntimeError, match="step 7"):
        bench.engine.step()


def test_a_request_that_nothing_can_schedule_is_an_error_and_not_a_hang() -> None:
    bench = Bench(blocks=1)
    bench.add(make_request("a", [1] * 10, 8))
    with pytest.raises(RuntimeError, match="none can be scheduled"):
        bench.engine.step()


def test_stats_count() -> None:
    bench = Bench(blocks=12)
    bench.add(make_request("a", [1, 2, 3], 5))
    assert bench.engine.stats()["num_waiting"] == 1
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
