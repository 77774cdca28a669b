"""The rules of block tables, one by one; test_block_tables.py has them all at once."""

from __future__ import annotations

from headwise.runtime.engine.block_tables import BlockTables, Entry
from headwise.runtime.engine.request import FinishReason, Request, RequestState
from headwise.runtime.kv.blocks import BlockPool, Use
from headwise.runtime.kv.prefix_cache import PrefixCache
from tests.runtime.engine.test_block_tables import SIZE, make_request


def tables(blocks: int = 8, max_blocks_per_namespace: int | None = None) -> BlockTables:
    return BlockTables(PrefixCache(BlockPool(blocks), SIZE, max_blocks_per_namespace=max_blocks_per_namespace))


def compute(its: BlockTables, request: Request, verified: bool = True) -> None:
    """Its prompt, in one step."""
    request.num_computed = len(request.prompt_token_ids)
    its.share(request)
    if verified:
        its.verify(request, request.num_computed)


def test_at_least_one_token_is_left_to_compute() -> None:
    for length, found in ((3, 1), (4, 1), (5, 2)):
        its = tables()
        first, second = (make_request(name, list(range(length))) for name in "ab")
        assert its.enter(first) is Entry.ENTERED and first.num_computed == 0
        compute(its, first)
        assert its.enter(second) is Entry.ENTERED
        assert second.num_computed == found * SIZE and second.block_ids[:found] == first.block_ids[:found]
        assert not set(second.block_ids[found:]) & set(first.block_ids)
        assert second.metrics.num_cached_tokens == found * SIZE
        its.cache.check_integrity(its.computing([first, second]))


def test_a_later_request_waits_for_what_an_earlier_one_computes_and_for_no_more() -> None:
    its = tables(16)
    first = make_request("a", [1, 2, 3, 4, 5, 6, 7])
    second, other = make_request("b", [1, 2, 3, 4, 9, 9, 9]), make_request("c", [8, 8, 8])
    assert its.enter(first) is Entry.ENTERED
    assert its.enter(second) is Entry.LATER and its.enter(other) is Entry.ENTERED
    first.num_computed = 2
    its.share(first)
    assert its.enter(second) is Entry.LATER
    first.num_computed = 4
    its.share(first)
    assert its.enter(second) is Entry.ENTERED and second.num_computed == 4


def test_nobody_waits_for_one_that_is_paused() -> None:
    its = tables(16)
    first, second, third = (make_request(name, [1, 2, 3, 4, 5]) for name in "abc")
    assert its.enter(first) is Entry.ENTERED
    assert its.enter(second) is Entry.LATER
    first.paused = True
    assert its.enter(second) is Entry.ENTERED and second.num_computed == 0
    assert its.enter(third) is Entry.LATER, "the second computes it now"
    compute(its, second)
    assert its.enter(third) is Entry.ENTERED and third.num_computed == 2 * SIZE
    first.paused = False
    compute(its, first)
    for request in (first, second, third):
        its.leave(request)
    its.cache.check_integrity([])


def test_nobody_waits_for_one_that_left() -> None:
    its = tables(16)
    first, second = make_request("a", [1, 2, 3, 4, 5]), make_request("b", [1, 2, 3, 4, 5])
    its.enter(first)
    assert its.enter(second) is Entry.LATER
    its.leave(first)
    assert its.enter(second) is Entry.ENTERED and second.num_computed == 0


def test_no_room_takes_nothing() -> None:
    its = tables(4)
    first, second = make_request("a", [1, 2, 3]), make_request("b", [1, 2, 3, 4, 5, 6, 7])
    its.enter(first)
    compute(its, first)
    assert its.enter(second) is Entry.NO_ROOM and second.block_ids == []
    its.cache.check_integrity(first.block_ids)
    its.leave(first)
    assert its.enter(second) is Entry.ENTERED and second.num_computed == 2


def test_a_block_computed_twice_is_held_twice_and_let_go() -> None:
    its = tables(16)
    first, second = make_request("a", [1, 2, 3]), make_request("b", [1, 2, 3])
    its.enter(first)
    its._computing.clear()  # as if they had not known of each other
    its.enter(second)
    compute(its, first)
    compute(its, second)
    assert second.chain == first.chain and second.block_ids[0] != first.block_ids[0]
    its.cache.check_integrity(its.computing([first, second]))
    its.leave(first)
    its.cache.check_integrity(its.computing([second]))
    its.leave(second)
    assert its.cache.pool.num_idle == 1 and its.cache.pool.num_free == 15
    assert its.cache.stats()["duplicate_blocks"] == 1


def test_what_is_not_finite_is_taken_back_with_what_was_computed_from_it() -> None:
    its = tables(16)
    first, second = make_request("a", [1, 2, 3, 4, 5]), make_request("b", [1, 2, 3, 4, 5, 6, 7])
    its.enter(first)
    compute(its, first, verified=False)
    its.enter(second)
    compute(its, second, verified=False)
    withdrawn, relied = its.fail(first, [first])
    assert withdrawn == {*second.chain} and len(withdrawn) == 3 and not relied and len(its.cache) == 0
    assert its.fail(second, [second]) == (set(), True)


def test_what_was_verified_before_stays() -> None:
    its = tables(16)
    request = make_request("a", [1, 2, 3], max_tokens=9)
    its.enter(request)
    compute(its, request)
    request.generated += [4, 5]
    request.num_computed = 4
    its.share(request)
    withdrawn, relied = its.fail(request, [request])
    assert [node.index for node in withdrawn] == [1] and not relied and len(its.cache) == 1


def test_an_ended_request_leaves_nothing_unverified_behind() -> None:
    its = tables()
    request = make_request("a", [1, 2, 3, 4, 5])
    its.enter(request)
    compute(its, request, verified=False)
    request.state, request.finish_reason = RequestState.FINISHED, FinishReason.ABORT
    its.leave(request)
    assert len(its.cache) == 0 and its.cache.pool.num_free == 8


def test_a_pin_keeps_nothing_unverified_of_an_ended_request() -> None:
    its = tables()
    request = make_request("a", [1, 2, 3])
    its.enter(request)
    compute(its, request, verified=False)
    chain = list(request.chain)
    its.cache.hold(chain, Use.PIN)
    request.state, request.finish_reason = RequestState.FINISHED, FinishReason.ABORT
    its.leave(request)
    its.cache.release(chain, Use.PIN)
    assert len(its.cache) == 0


def test_one_that_takes_no_part_shares_and_finds_nothing() -> None:
    its = tables(16)
    first, second = make_request("a", [1, 2, 3, 4, 5]), make_request("b", [1, 2, 3, 4, 5])
    first.token_blocks = None
    assert its.enter(first) is Entry.ENTERED
    compute(its, first)
    assert len(its.cache) == 0
    assert its.enter(second) is Entry.ENTERED and second.num_computed == 0


def test_pending_tokens_are_not_shared_before_they_are_known() -> None:
    its = tables()
    request = make_request("a", [1, 2, 3], max_tokens=9)
    its.enter(request)
    request.num_pending, request.num_computed = 1, 4
    its.share(request)
    assert len(its.cache) == 1
    request.num_pending, request.generated = 0, [7]
    its.share(request)
    assert len(its.cache) == 2
    assert request.chain[1].tokens == (3).to_bytes(4, "little") + (7).to_bytes(4, "little")
