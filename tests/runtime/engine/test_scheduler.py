"""Scheduling with no model: budgets, chunks, preemption, and what the shards are told."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.runtime.engine import scheduler as module
from headwise.runtime.engine.block_tables import BlockTables
from headwise.runtime.engine.request import Request, RequestState, Seat, seat_of
from headwise.runtime.engine.scheduler import Schedule, Scheduler
from headwise.runtime.kv.blocks import BlockPool
from headwise.runtime.kv.identity import TokenBlocks
from headwise.runtime.kv.prefix_cache import PrefixCache
from headwise.runtime.output import FinishReason
from headwise.runtime.sampling_params import SamplingParams
from headwise.workers.plan import RowSampling, admit_bytes
from tests.effort import examples

BLOCK = 4


def request(name: str, prompt: int, max_tokens: int) -> Request:
    return Request(name, list(range(prompt)), SamplingParams(), RowSampling(), max_tokens)


def scheduler(
    blocks: int = 100, rows: int = 8, budget: int = 16, mixed: int | None = None
) -> tuple[Scheduler, BlockPool]:
    pool = BlockPool(blocks)
    return Scheduler(BlockTables(PrefixCache(pool, BLOCK)), rows, budget, mixed), pool


def finish_step(scheduler: Scheduler, schedule: Schedule, token: int = 7) -> None:
    """What the engine does with an output in which every sampling row got ``token``."""
    scheduler.complete(schedule)
    for seat in schedule.seats:
        request = seat.request
        if seat.num_done >= seat.num_given and request.state is not RequestState.FINISHED:
            request.generated.append(token)
            if len(request.generated) == request.max_tokens:
                scheduler.finish(request)


def counts(schedule: Schedule | None) -> dict[str, int]:
    assert schedule is not None
    return {seat.request.request_id: n for seat, (_, n) in _parts(schedule)}


def test_a_long_prompt_is_computed_in_chunks_and_decodes_come_first() -> None:
    sched, _ = scheduler(budget=16)
    sched.add(request("short", 5, 10))
    step = sched.schedule()
    assert counts(step) == {"short": 5}
    finish_step(sched, step)
    sched.add(request("long", 40, 10))
    found = []
    for _ in range(4):
        step = sched.schedule()
        found.append(counts(step))
        finish_step(sched, step)
    assert found == [
        {"short": 1, "long": 15},
        {"short": 1, "long": 15},
        {"short": 1, "long": 10},
        {"short": 1, "long": 1},
    ]


def test_the_newest_is_preempted_and_comes_back_with_its_tokens() -> None:
    sched, pool = scheduler(blocks=6)
    first, second = request("first", 8, 12), request("second", 8, 12)
    for r in (first, second):
        sched.add(r)
    while second.state is not RequestState.WAITING or not second.generated:
        step = sched.schedule()
        assert step is not None
        finish_step(sched, step)
    assert first.state is RequestState.RUNNING and second.metrics.num_preemptions == 1
    known = second.prompt_token_ids + second.generated
    while second.state is RequestState.WAITING:
        step = sched.schedule()
        assert step is not None
        finish_step(sched, step)
    [admit] = [a for a in step.plan.admits if a.row == seat_of(second).row]
    assert admit.token_ids == known and admit.prompt_len == 8 and admit.num_computed == 0
    pool.check_integrity()


def test_what_a_step_admits_fits_in_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    grammar = RowSampling(grammar="x" * 1000)
    size = admit_bytes(3, grammar)
    monkeypatch.setattr(module, "MAX_ADMIT_BYTES", 2 * size + 1)
    sched, _ = scheduler(budget=64)
    for index in range(5):
        sched.add(Request(str(index), [1, 2, 3], SamplingParams(), grammar, 9))
    sched.add(Request("large", [1, 2, 3], SamplingParams(), RowSampling(grammar="x" * 9000), 9))
    admitted = []
    for _ in range(4):
        step = sched.schedule()
        assert step is not None
        admitted.append(len(step.plan.admits))
        finish_step(sched, step)
    assert admitted == [2, 2, 1, 1], "one that is too large for any goes alone"


def test_a_row_is_dropped_before_it_is_taken_again() -> None:
    sched, _ = scheduler(rows=1)
    a, b = request("a", 3, 1), request("b", 3, 1)
    sched.add(a)
    sched.add(b)
    finish_step(sched, sched.schedule())
    step = sched.schedule()
    assert step.plan.drops == [0] and [admit.row for admit in step.plan.admits] == [0]


def test_a_request_with_its_last_token_on_the_way_is_not_computed_further() -> None:
    sched, _ = scheduler()
    sched.add(request("a", 3, 2))
    assert sched.schedule() is not None
    assert sched.schedule() is not None
    assert sched.schedule() is None


def test_a_preempted_request_keeps_its_blocks_until_the_steps_in_flight_are_done() -> None:
    sched, pool = scheduler(blocks=4, budget=64)
    first, second = request("first", 7, 9), request("second", 7, 9)
    sched.add(first)
    sched.add(second)
    prefill, decode = sched.schedule(), sched.schedule()
    row = seat_of(second).row
    # The first's ninth token wants a third block: the second must go, but a step in flight still writes to its blocks.
    assert sched.schedule() is None
    assert second.state is RequestState.WAITING and seat_of(second).num_pending == 2
    finish_step(sched, prefill)
    assert sched.schedule() is None and pool.num_free == 0 and seat_of(second).row == row
    finish_step(sched, decode)
    assert pool.num_free == 2 and second.seat is None and len(second.generated) == 2
    step = sched.schedule()
    assert counts(step) == {"first": 1} and step.plan.drops == [row] and sched.num_preemptions == 1
    while first.state is RequestState.RUNNING:
        finish_step(sched, step)
        step = sched.schedule()
    assert counts(step) == {"second": 9} and step.plan.admits[0].token_ids == [*range(7), 7, 7]


def test_a_finished_request_keeps_row_and_blocks_until_the_steps_in_flight_are_done() -> None:
    sched, pool = scheduler(rows=1, blocks=4)
    first, second = request("first", 3, 9), request("second", 3, 9)
    sched.add(first)
    sched.add(second)
    prefill, decode = sched.schedule(), sched.schedule()
    finish_step(sched, prefill)
    sched.finish(first)
    sched.finish(first)
    assert sched.schedule() is None and first.seat is not None and first.seat.row == 0 and pool.num_free == 3
    finish_step(sched, decode)
    assert first.generated == [7] and first.seat is None and pool.num_free == 4
    step = sched.schedule()
    assert counts(step) == {"second": 3} and step.plan.drops == [0]


def test_a_preempted_request_that_ends_before_it_comes_back() -> None:
    sched, pool = scheduler(blocks=4, budget=64)
    first, second = request("first", 7, 9), request("second", 7, 9)
    sched.add(first)
    sched.add(second)
    in_flight = [sched.schedule(), sched.schedule()]
    assert sched.schedule() is None and second.state is RequestState.WAITING
    sched.finish(second)
    assert not sched.waiting and pool.num_free == 0
    for step in in_flight:
        finish_step(sched, step)
    assert second.seat is None and second.generated == [] and pool.num_free == 2
    assert counts(sched.schedule()) == {"first": 1}


def test_one_is_preempted_for_each_that_lacks_a_block_and_no_more() -> None:
    """Blocks that will be free once the steps in flight are done count as free, or all would be preempted for one."""
    sched, pool = scheduler(blocks=8, budget=64)
    requests = [request(name, 7, 9) for name in "abcd"]
    for r in requests:
        sched.add(r)
    in_flight = deque([sched.schedule(), sched.schedule()])
    for _ in range(3):
        assert sched.schedule() is None
    assert [r.state is RequestState.RUNNING for r in requests] == [True, True, True, False]
    while in_flight:
        finish_step(sched, in_flight.popleft())
    assert counts(sched.schedule()) == {"a": 1, "b": 1}
    pool.check_integrity()


def test_a_step_that_decodes_computes_few_prompt_tokens() -> None:
    sched, _ = scheduler(budget=16, mixed=5)
    short = request("short", 5, 4)
    sched.add(short)
    finish_step(sched, sched.schedule())
    for name in ("one", "two"):
        sched.add(request(name, 12, 9))
    found = []
    while short.state is RequestState.RUNNING:
        step = sched.schedule()
        found.append(counts(step))
        finish_step(sched, step)
    # The oldest prompt first: it gets on in every step.
    assert found == [{"short": 1, "one": 5}, {"short": 1, "one": 5}, {"short": 1, "one": 2, "two": 3}]
    step = sched.schedule()
    assert counts(step) == {"one": 1, "two": 5}
    finish_step(sched, step)


def test_a_step_without_decodes_uses_the_whole_budget() -> None:
    sched, _ = scheduler(budget=16, mixed=1)
    for name in ("one", "two"):
        sched.add(request(name, 12, 9))
    assert counts(sched.schedule()) == {"one": 12, "two": 4}


def test_prompts_wait_only_for_those_who_read_along() -> None:
    sched, _ = scheduler(budget=16, mixed=5)
    whole, stream = request("whole", 1, 9), request("stream", 1, 2)
    whole.streamed = False
    for r in (whole, stream):
        sched.add(r)
    finish_step(sched, sched.schedule())
    sched.add(request("long", 40, 9))
    found = []
    for _ in range(2):
        step = sched.schedule()
        found.append(counts(step))
        finish_step(sched, step)
    assert found == [{"whole": 1, "stream": 1, "long": 5}, {"whole": 1, "long": 15}]


def test_decodes_never_take_the_whole_budget_from_a_prompt() -> None:
    sched, _ = scheduler(rows=8, budget=3, mixed=2)
    requests = [request(str(i), 2, 100) for i in range(5)]
    late = request("late", 6, 1)
    for r in [*requests, late]:
        sched.add(r)
    sched.finish(requests[4])
    for _ in range(100):
        finish_step(sched, sched.schedule())
    assert [len(r.generated) > 90 for r in requests] == [True, True, True, False, False]
    for r in requests[:2]:
        sched.finish(r)
    for _ in range(10):
        finish_step(sched, sched.schedule())
    assert late.state is RequestState.FINISHED


def test_a_tenant_leaves_a_row_for_the_next_as_long_as_it_gets_on_itself() -> None:
    sched, _ = scheduler(rows=8, budget=64)
    alices = [request(f"a{i}", 3, 9) for i in range(10)]
    for r in alices:
        r.tenant = "alice"
        sched.add(r)
    finish_step(sched, sched.schedule())
    assert len(sched.running) == 7
    bob = request("b", 3, 9)
    bob.tenant = "bob"
    sched.add(bob)
    finish_step(sched, sched.schedule())
    assert bob.state is RequestState.RUNNING and sched.waiting.num_of("alice") == 3
    # Rows of requests that are paused are there to be had, by their own tenant too.
    for r in alices[:7]:
        r.paused = True
    finish_step(sched, sched.schedule())
    assert {r.request_id for r in alices if not r.paused and r.state is RequestState.RUNNING} == {"a7", "a8", "a9"}


def cached(sched: Scheduler, prompt: Request) -> int:
    cache = sched._tables.cache
    cache.check_integrity(sched._tables.computing([r for r in (prompt,) if r.seat is not None]))
    return len(cache)


def with_blocks(name: str, prompt: int, max_tokens: int) -> Request:
    made = request(name, prompt, max_tokens)
    made.token_blocks = TokenBlocks(bytes(32), BLOCK, made.prompt_token_ids)
    return made


def test_a_chunk_is_not_cached_before_its_prompt_has_a_token() -> None:
    sched, _ = scheduler(budget=8)
    prompt = with_blocks("a", 13, 4)
    sched.add(prompt)
    finish_step(sched, sched.schedule())
    assert prompt.generated == [] and cached(sched, prompt) == 0
    finish_step(sched, sched.schedule())
    assert prompt.generated == [7] and cached(sched, prompt) == 3


def test_what_was_verified_before_a_request_failed_stays_and_no_more_comes() -> None:
    sched, _ = scheduler()
    failing = with_blocks("a", 7, 9)
    sched.add(failing)
    finish_step(sched, sched.schedule())
    step, late = sched.schedule(), sched.schedule()  # the first computes the token that completes a block
    assert step is not None and late is not None and cached(sched, failing) == 1
    sched.complete(step, failed=[seat_of(failing).row])
    failing.finish_reason = FinishReason.ERROR
    sched.finish(failing)
    sched.complete(late)
    assert failing.seat is None and cached(sched, failing) == 1


@pytest.mark.parametrize("depth", [1, 2])
@examples(60)
@given(data=st.data())
def test_everything_is_computed_once_and_everything_is_given_back(depth: int, data: st.DataObject) -> None:
    blocks, budget, mixed = data.draw(st.integers(6, 20)), data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30))
    sched, pool = scheduler(blocks, data.draw(st.integers(1, 5)), budget, mixed)
    lengths = st.tuples(st.integers(1, 12), st.integers(1, 12))
    todo = [request(str(i), *lengths_i) for i, lengths_i in enumerate(data.draw(st.lists(lengths, max_size=8)))]
    for r in todo:
        r.streamed = data.draw(st.booleans())
    requests = list(todo)
    in_flight: deque[Schedule] = deque()
    sampling: deque[set[Seat]] = deque()  # by those steps
    shard_computed: dict[int, int] = {}
    for _ in range(2000):
        if todo and data.draw(st.booleans()):
            sched.add(todo.pop())
        running = [r for r in requests if r.state is RequestState.RUNNING]
        if running and data.draw(st.integers(0, 9)) == 0:
            sched.finish(data.draw(st.sampled_from(running)))
        while len(in_flight) < depth and (step := sched.schedule()) is not None:
            _check_plan(step, shard_computed, budget, mixed)
            in_flight.append(step)
            sampling.append({s for s in step.seats if s.num_computed >= s.num_given})
            _check_counts(requests, in_flight, sampling)
        pool.check_integrity()
        if in_flight:
            sampling.popleft()
            finish_step(sched, in_flight.popleft())
            _check_counts(requests, in_flight, sampling)
        elif not todo:
            break
    assert all(r.state is RequestState.FINISHED for r in requests)
    assert pool.num_free == blocks


def _parts(step: Schedule) -> Iterator[tuple[Seat, tuple[int, int]]]:
    return zip(step.seats, step.plan.computes, strict=True)


def _check_counts(requests: list[Request], in_flight: deque[Schedule], sampling: deque[set[Seat]]) -> None:
    """What follows from the numbers of a seat is what comes out if the steps in flight are counted."""
    for request in requests:
        if (seat := request.seat) is None or request.state is RequestState.FINISHED:
            continue
        pending = sum(seat in seats for seats in sampling)
        known = len(request.prompt_token_ids) + len(request.generated)
        assert seat.num_pending == pending and request.num_tokens == known + pending
        assert seat.is_in_flight is any(seat in step.seats for step in in_flight)
        assert seat.num_slots == BLOCK * len(seat.block_ids)
        if request.state is RequestState.RUNNING:
            ends = len(request.generated) + pending >= request.max_tokens
            assert request.num_uncomputed == (0 if ends else known + pending - seat.num_computed)


def _check_plan(step: Schedule, shard_computed: dict[int, int], budget: int, mixed: int) -> None:
    """Follows a plan as a shard would: it must never skip a token, nor compute one without a block."""
    assert 0 < sum(n for _, n in step.plan.computes) <= budget
    for row in step.plan.drops:
        del shard_computed[row]
    for admit in step.plan.admits:
        assert admit.row not in shard_computed
        shard_computed[admit.row] = admit.num_computed
    decodes = [
        seat.request
        for seat, (row, count) in _parts(step)
        if count == 1 and shard_computed[row] >= len(seat.request.prompt_token_ids)
    ]
    if any(r.streamed for r in decodes):
        assert sum(n for _, n in step.plan.computes if n > 1) <= mixed
    for seat, (row, count) in _parts(step):
        shard_computed[row] += count
        assert row == seat.row and seat is seat_of(seat.request)
        assert shard_computed[row] == seat.num_computed <= BLOCK * len(seat.block_ids)
