"""Requests whose heads keep a window, or different windows: tokens, blocks and hits."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.cluster.group import ShardGroupDied
from headwise.runtime.engine.block_tables import Admission, BlockTables
from headwise.runtime.engine.request import Request, seat_of
from headwise.runtime.engine.tables import GONE
from headwise.runtime.handoff.messages import TransferKey
from headwise.runtime.kv.blocks import BlockPool
from headwise.runtime.kv.eviction import Chain
from headwise.runtime.kv.prefix_cache import PrefixCache
from headwise.runtime.output import FinishReason
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.policy import DENSE, Reach
from headwise.workers.kv.transfer import Tier
from tests.effort import examples
from tests.plain_group import BLOCK, POISON, VOCAB, Bench, PlainGroup, alone, make_request
from tests.runtime.engine.test_recovery import Mortal

REACHES = (
    (Reach(0, 3),),
    (Reach(0, 9),),
    (Reach(2, 6),),
    (Reach(6, 1),),
    (DENSE, Reach(0, 5)),
    (Reach(1, 4), DENSE),
    (Reach(0, 2), Reach(5, 8)),
)


def bench_of(*reaches: Reach, **settings: int) -> Bench:
    return Bench(group=PlainGroup(reaches=reaches), **settings)


def run_one(bench: Bench, request: Request) -> None:
    bench.add(request)
    bench.run()
    assert (bench.got[request.key], bench.ended[request.key]) == alone(request)


@pytest.mark.parametrize("depth", [1, 2])
@examples(150)
@given(data=st.data())
def test_every_request_gets_the_tokens_it_would_get_alone(depth: int, data: st.DataObject) -> None:
    """Little memory, so that requests are preempted; groups die; requests come, share prompts and are aborted."""
    chance = random.Random(data.draw(st.integers(0, 1 << 30), "chance"))
    reaches = data.draw(st.sampled_from(REACHES), "reaches")
    bounded = DENSE not in reaches
    dying = data.draw(st.sampled_from([0.0, 0.0, 0.02, 0.1]), "dying")
    tiers = data.draw(st.sampled_from([(0, 0), (6, 0), (6, 12)]), "tiers") if len(reaches) == 1 else (0, 0)
    rows, budget = data.draw(st.integers(1, 5), "rows"), data.draw(st.integers(1, 30), "budget")
    blocks = data.draw(st.integers(8, 20), "blocks")
    bench = Bench(blocks, rows, budget, depth, group=PlainGroup(chance, 0.1, dying, reaches=reaches), tiers=tiers)
    mortal = Mortal(bench)
    longest = 60 if bounded else 14
    prompt = st.builds(
        lambda shared, length, rest: [shared] * length + rest,
        st.integers(0, 1),
        st.integers(0, longest),
        st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8),
    )
    poisoned = st.just([*range(10), POISON, 2])
    most = 40 if bounded else 8
    drawn = st.tuples(prompt | prompt | poisoned, st.integers(1, most), st.just(()), st.integers(0, 3))
    todo = [
        make_request(str(i), *fields) for i, fields in enumerate(data.draw(st.lists(drawn, max_size=8), "requests"))
    ]
    requests, aborted = list(todo), set[str]()
    for at in range(6000):
        if todo and chance.random() < 0.2:
            bench.add(todo.pop())
        if bench.got and chance.random() < 0.02:
            name = chance.choice([request.request_id for request in bench.requests])
            aborted.add(name)
            bench.engine.abort(name)
        if bench.engine.rebuilding:
            bench.resume(PlainGroup(chance, 0.1, dying if at < 300 else 0.0, reaches=reaches))
        elif bench.engine.has_work:
            mortal.step()
        elif not todo:
            break
    bench.check_idle()
    for request in requests:
        got = bench.got[request.key]
        if request.request_id in aborted and bench.ended[request.key] is FinishReason.ABORT:
            assert alone(request)[0][: len(got)] == got
        elif bench.ended[request.key] is FinishReason.ERROR and request.error and "whenever" in request.error:
            continue  # taken for deadly: it was alone in the third death without a new token
        else:
            assert (got, bench.ended[request.key]) == alone(request)


@pytest.mark.parametrize("reach", [Reach(0, 9), Reach(5, 8)])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_text_without_end_takes_constant_memory(reach: Reach, depth: int) -> None:
    bench = bench_of(reach, depth=depth, budget=8)
    request = make_request("a", [1, 2, 3], 400)
    bench.add(request)
    held = []
    for _ in range(440):
        bench.step()
        if request.seat is not None:
            table = request.seat.tables[0]
            assert bench.pool.states()["active"] == table.num_held
            held.append(table.num_held)
    assert bench.got[request.key] == alone(request)[0]
    most = reach.most_blocks(BLOCK, 1 << 30, depth)
    assert max(held) <= most and max(held[-100:]) - min(held[-100:]) <= 1
    bench.check_idle()


def test_a_prompt_longer_than_the_memory_is_computed_chunk_by_chunk() -> None:
    bench = bench_of(Reach(2, 6), blocks=8, budget=64, depth=2)
    requests = [make_request(str(i), [i + 1] * 150, 20, seed=i) for i in range(3)]
    for request in requests:
        bench.add(request)
    bench.run()
    bench.check_idle()
    assert bench.got == {request.key: alone(request)[0] for request in requests}


def test_a_prompt_that_is_shared_beyond_the_window_is_found() -> None:
    """Its last blocks have left the window of the first request before a token was sampled after them."""
    bench = bench_of(Reach(2, 8), budget=6)
    shared = [number % VOCAB for number in range(40)]
    first, second = make_request("a", [*shared, *[5] * 30], 4), make_request("b", [*shared, *[6] * 9], 4)
    run_one(bench, first)
    computed = bench.group.computed_tokens
    run_one(bench, second)
    assert second.metrics.num_cached_tokens == 40 and bench.group.computed_tokens - computed == 9 + 3
    bench.check_idle()


def test_a_hit_needs_its_window_and_sinks_and_nothing_else() -> None:
    cache = PrefixCache(BlockPool(32), BLOCK, reach=Reach(2, 8))
    tables = BlockTables(cache)
    first = make_request("a", list(range(40)), 1)
    assert tables.admit(first, 0) is Admission.SEATED
    tables.grow(seat_of(first), 40)
    tables.publish(first, 40)
    tables.leave(first)
    blocks = first.token_blocks
    assert blocks is not None

    def found(limit: int) -> list[int]:
        chain: Chain = []
        cache.match(blocks, limit, chain)
        tables.cache.check_integrity([])
        return [index for index, node in enumerate(chain) if node is not None] + [len(chain)]

    assert found(10) == [0, 8, 9, 10], "a window of 8 before token 40 begins at 33"
    assert found(9) == [0, 7, 8, 9]
    nodes = [cache.get(digest) for digest in blocks.digests]
    for index in (3, 4):  # whoever goes on after block 10 does not need them
        cache._evict(nodes[index], "room")  # type: ignore[arg-type]
    assert found(10) == [0, 8, 9, 10] and found(6) == [0, 1, 2, 3]
    cache._evict(nodes[9], "room")  # type: ignore[arg-type]
    assert found(10) == [0, 7, 8, 9]
    cache._evict(nodes[0], "room")  # type: ignore[arg-type]
    assert found(10) == [0], "the sinks are missing"
    cache.check_integrity([])


def test_what_left_the_window_of_a_request_that_fails_is_withdrawn() -> None:
    bench = bench_of(Reach(0, 6), budget=8)
    shared = [number % VOCAB for number in range(24)]
    bad, good = make_request("bad", [*shared, POISON], 4), make_request("good", [*shared, 3], 4)
    bench.add(bad)
    bench.step()
    bench.step()
    assert len(bench.cache) > 0, "it has left the window"
    bench.add(good)
    bench.run()
    assert bench.ended[bad.key] is FinishReason.ERROR
    assert good.metrics.num_cached_tokens == 0
    assert (bench.got[good.key], bench.ended[good.key]) == alone(good)
    stats = bench.cache.stats()
    assert stats["evictions"]["unverified"] > 0
    bench.check_idle()


def test_nobody_finds_or_saves_what_is_not_verified() -> None:
    bench = bench_of(Reach(0, 6), budget=8)
    told: list[object] = []
    bench.cache.on_idle = told.append
    first = make_request("a", [number % VOCAB for number in range(40)], 1)
    bench.add(first)
    for _ in range(3):
        bench.step()
    assert first.token_blocks is not None and bench.pool.num_idle > 0 and not told
    chain: Chain = []
    bench.cache.match(first.token_blocks, 4, chain)
    assert chain == [] and bench.events.sequence == 0
    bench.run()
    bench.cache.match(first.token_blocks, 4, chain)
    assert len(chain) == 4 and len(told) == 10
    bench.check_idle()


def test_no_tier_gets_what_is_not_verified() -> None:
    """Not even if it has just lost another copy of it, and would have it again."""
    bench = Bench(blocks=64, budget=8, tiers=(32, 0), group=PlainGroup(reaches=(Reach(0, 6),)))
    request = make_request("a", [*(number % VOCAB for number in range(40)), POISON], 1)
    bench.add(request)
    for _ in range(3):
        bench.step()
    assert request.token_blocks is not None and bench.tiers is not None and bench.pool.num_idle > 0
    bench.tiers.books.on_dropped(request.token_blocks.digests[:3], "damage")
    bench.run()
    assert bench.ended[request.key] is FinishReason.ERROR
    assert not bench.group.stored[Tier.HOST] and not any(map(len, bench.tiers.books.tiers.values()))
    bench.check_idle()


def test_a_prompt_for_another_engine_keeps_its_blocks_and_finds_only_what_is_whole() -> None:
    cache = PrefixCache(BlockPool(64), BLOCK, reach=Reach(0, 6))
    tables = BlockTables(cache, chunk=8)
    first, other = make_request("a", list(range(40)), 1), make_request("b", list(range(40)), 1)
    other.transfer = TransferKey(bytes(16), 1, 1, 1)
    assert tables.admit(first, 0) is Admission.SEATED
    seat = seat_of(first)
    tables.grow(seat, 40)
    tables.publish(first, 40)
    seat.num_done = 40
    tables.give_back(seat)
    assert seat.block_ids[:8] == [GONE] * 8 and GONE not in seat.block_ids[8:]
    evicted = cache.get(first.token_blocks.digests[3])  # type: ignore[union-attr]
    assert evicted is not None
    cache._evict(evicted, "room")
    assert tables.admit(other, 1) is Admission.SEATED
    kept = seat_of(other)
    assert kept.num_computed == 3 * BLOCK and len(kept.block_ids) == 11 and GONE not in kept.block_ids
    assert kept.gives_at > 1 << 40
    for request in (first, other):
        tables.leave(request)
    cache.check_integrity([])


def test_several_groups_find_what_all_of_them_have() -> None:
    bench = bench_of(DENSE, Reach(0, 6), budget=64)
    caches = bench.engine.generation.tables.caches
    run_one(bench, make_request("a", list(range(16)) + [3] * 9, 1))
    again = make_request("b", list(range(16)) + [3] * 9, 1)
    assert again.token_blocks is not None
    last = caches[1].get(again.token_blocks.digests[5])
    assert last is not None
    caches[1]._evict(last, "room")
    run_one(bench, again)
    assert again.metrics.num_cached_tokens == 5 * BLOCK
    stats = bench.engine.stats()
    assert [group["reach"] for group in stats["kv_groups"]] == ["dense", "window:6"]
    assert [group["num_free_blocks"] for group in stats["kv_groups"]] == [64, 64]
    bench.check_idle()


def test_pins_keep_what_a_hit_needs_in_every_group() -> None:
    bench = bench_of(Reach(2, 6), DENSE)
    prompt = make_request("a", list(range(17)) + [3] * 24, 1)
    run_one(bench, prompt)
    assert prompt.token_blocks is not None
    assert bench.engine.pin(prompt.token_blocks, 41, 1000.0) == 40
    assert [pins.num_blocks for pins in bench.engine.generation.all_pins] == [1 + 3, 10]
    for cache in bench.engine.generation.tables.caches:
        for block in cache.allocate(cache.num_available):
            cache.release_block(block, 0, None)  # type: ignore[arg-type]
    for number, tokens in ((41, 40), (40, 36)):  # one of its tokens is always computed
        again = make_request(f"b{number}", (list(range(17)) + [3] * 24)[:number], 1)
        run_one(bench, again)
        assert again.metrics.num_cached_tokens == tokens
    bench.engine.lose_group(ShardGroupDied(0, "here", "for the test"))
    bench.resume(PlainGroup(reaches=(Reach(2, 6), DENSE)))
    bench.run()
    assert [pins.num_blocks for pins in bench.engine.generation.all_pins] == [1 + 3, 10]
    bench.engine.reset_prefix_cache()
    bench.check_idle()


def test_more_than_may_be_pinned_in_any_group_is_pinned_in_none() -> None:
    bench = bench_of(Reach(0, 6), DENSE, blocks=16)
    prompt = make_request("a", list(range(17)) + [3] * 24, 1)
    run_one(bench, prompt)
    assert prompt.token_blocks is not None
    with pytest.raises(InvalidValueError, match="10 blocks would be pinned"):
        bench.engine.pin(prompt.token_blocks, 41, 1000.0)
    assert [pins.num_blocks for pins in bench.engine.generation.all_pins] == [0, 0]
    bench.check_idle()


def test_what_no_group_can_hold_ends_with_the_reason() -> None:
    """Memory for less than the window: such requests must be as short as with dense heads."""
    bench = bench_of(Reach(0, 60), blocks=8)
    long, short = make_request("long", [1, 2], 200), make_request("short", [1, 2], 20)
    bench.add(long)
    bench.add(short)
    bench.run()
    assert bench.ended[long.key] is FinishReason.ERROR
    assert long.error is not None and f"for {8 * BLOCK} tokens" in long.error
    assert bench.got[short.key] == alone(short)[0]
    bench.check_idle()


def test_tiers_bring_back_what_a_hit_is_missing() -> None:
    bench = Bench(blocks=16, budget=64, tiers=(32, 0), group=PlainGroup(reaches=(Reach(2, 8),)))
    prompt = [number % VOCAB for number in range(40)]
    run_one(bench, make_request("a", [*prompt, 1], 1))
    run_one(bench, make_request("other", [7] * 70, 1))
    assert bench.tiers is not None
    blocks = make_request("b", [*prompt, 2], 1).token_blocks
    assert blocks is not None
    there = [index for index in range(10) if bench.cache.find(blocks, index) is not None]
    second = make_request("b", [*prompt, 2], 1)
    run_one(bench, second)
    assert second.metrics.num_cached_tokens == 40
    assert 0 < second.metrics.num_restored_tokens <= 3 * BLOCK, f"at most the sinks and the window; {there} were there"
    bench.check_idle()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("reach", [Reach(2, 6), Reach(2, 9), Reach(6, 11)])
def test_a_row_without_end_does_not_preempt_others_for_ever(reach: Reach, depth: int) -> None:
    """Room for two windows. The endless row takes a block and gives it back, again and again; a long prompt beside it,
    were it preempted each time, would begin again each time."""
    steady = BlockTables(PrefixCache(BlockPool(64), BLOCK, reach=reach)).rooms[0].steady  # type: ignore[union-attr]
    for blocks in (2 * steady, 2 * steady + 1):
        bench = bench_of(reach, blocks=blocks, budget=16, depth=depth)
        endless, prompt = make_request("endless", [1, 2, 3], 100_000), make_request("b", [5] * 100, 20)
        bench.add(endless)
        for _ in range(30):
            bench.step()
        bench.add(prompt)
        for _ in range(250):
            bench.step()
        assert (bench.got[prompt.key], bench.ended[prompt.key]) == alone(prompt)
        assert bench.engine.stats()["num_preemptions"] == 0
        bench.engine.abort("endless")
        bench.run()
        bench.check_idle()


def test_a_prompt_is_admitted_with_what_there_is_beside_rows_without_end() -> None:
    bench = bench_of(Reach(2, 6), blocks=36, budget=200)
    for index in range(7):
        bench.add(make_request(str(index), [1, 2, index], 100_000))
    for _ in range(60):
        bench.step()
    assert bench.cache.num_available < 17, "less than a window and half of what is beside one"
    prompt = make_request("b", [5] * 200, 3)
    bench.add(prompt)
    for _ in range(60):
        bench.engine.step()
    assert bench.got[prompt.key] == alone(prompt)[0]


def test_a_prompt_for_another_engine_that_does_not_fit_ends_with_the_reason() -> None:
    """Though any text would that keeps only its window. Later shards may have less memory than the first."""
    bench = bench_of(Reach(0, 6), blocks=8)
    whole = make_request("a", [1] * 40, 1)
    whole.transfer = TransferKey(bytes(16), 1, 1, 1)
    bench.add(whole)
    assert bench.ended[whole.key] is FinishReason.ERROR
    assert whole.error is not None and f"for {8 * BLOCK} tokens" in whole.error
    run_one(bench, make_request("b", [1] * 40, 1))
    bench.check_idle()
