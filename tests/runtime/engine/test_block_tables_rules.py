"""The rules of block tables, one by one; test_block_tables.py has them all at once."""

from __future__ import annotations

import pytest

from headwise.runtime.engine.block_tables import Admission, BlockTables
from headwise.runtime.engine.request import Request, seat_of
from headwise.runtime.engine.scheduler import Schedule, Scheduler
from headwise.runtime.kv.blocks import BlockPool
from headwise.runtime.kv.prefix_cache import PrefixCache
from headwise.workers.kv.transfer import Op, Tier
from tests.runtime.engine.test_block_tables import SIZE, make_request
from tests.runtime.kv.test_tiers import Bed, sequence


def tables(blocks: int = 8) -> BlockTables:
    return BlockTables(PrefixCache(BlockPool(blocks), SIZE))


def compute(its: BlockTables, request: Request) -> None:
    """Its prompt, in one step, after which a finite token was sampled."""
    its.publish(request, len(request.prompt_token_ids))


def test_at_least_one_token_is_left_to_compute() -> None:
    for length, found in ((3, 1), (4, 1), (5, 2)):
        its = tables()
        first, second = (make_request(name, list(range(length))) for name in "ab")
        assert its.admit(first, 0) is Admission.SEATED and seat_of(first).num_computed == 0
        compute(its, first)
        assert its.admit(second, 0) is Admission.SEATED
        assert (
            seat_of(second).num_computed == found * SIZE
            and seat_of(second).block_ids[:found] == seat_of(first).block_ids[:found]
        )
        assert not set(seat_of(second).block_ids[found:]) & set(seat_of(first).block_ids)
        assert second.metrics.num_cached_tokens == found * SIZE
        its.cache.check_integrity(its.computing([first, second]))


def test_a_later_request_waits_for_what_an_earlier_one_computes_and_others_go_first() -> None:
    its = tables(16)
    first = make_request("a", [1, 2, 3, 4, 5, 6, 7])
    second, other = make_request("b", [1, 2, 3, 4, 9, 9, 9]), make_request("c", [8, 8, 8])
    assert its.admit(first, 0) is Admission.SEATED
    assert its.admit(second, 1) is Admission.LATER and its.admit(other, 1) is Admission.SEATED
    compute(its, first)
    assert its.admit(second, 2) is Admission.SEATED and seat_of(second).num_computed == 4


def test_nobody_waits_for_one_that_is_paused() -> None:
    its = tables(16)
    first, second, third = (make_request(name, [1, 2, 3, 4, 5]) for name in "abc")
    assert its.admit(first, 0) is Admission.SEATED
    assert its.admit(second, 0) is Admission.LATER
    first.paused = True
    assert its.admit(second, 0) is Admission.SEATED and seat_of(second).num_computed == 0
    assert its.admit(third, 0) is Admission.LATER, "the second computes it now"
    compute(its, second)
    assert its.admit(third, 0) is Admission.SEATED and seat_of(third).num_computed == 2 * SIZE
    first.paused = False
    compute(its, first)
    for request in (first, second, third):
        its.leave(request)
    its.cache.check_integrity([])


def test_nobody_waits_for_one_that_left() -> None:
    its = tables(16)
    first, second = make_request("a", [1, 2, 3, 4, 5]), make_request("b", [1, 2, 3, 4, 5])
    its.admit(first, 0)
    assert its.admit(second, 0) is Admission.LATER
    its.leave(first)
    assert its.admit(second, 0) is Admission.SEATED and seat_of(second).num_computed == 0


def test_no_room_takes_nothing() -> None:
    its = tables(4)
    first, second = make_request("a", [1, 2, 3]), make_request("b", [1, 2, 3, 4, 5, 6, 7])
    its.admit(first, 0)
    compute(its, first)
    assert its.admit(second, 0) is Admission.NO_ROOM and second.seat is None
    its.cache.check_integrity(seat_of(first).block_ids)
    its.leave(first)
    assert its.admit(second, 0) is Admission.SEATED and seat_of(second).num_computed == 2


def test_a_block_computed_twice_is_held_twice_and_let_go() -> None:
    its = tables(16)
    first, second = make_request("a", [1, 2, 3]), make_request("b", [1, 2, 3])
    its.admit(first, 0)
    its._coming.clear()  # as if they had not known of each other
    its.admit(second, 0)
    compute(its, first)
    compute(its, second)
    assert (
        seat_of(second).tables[0].chain == seat_of(first).tables[0].chain
        and seat_of(second).block_ids[0] != seat_of(first).block_ids[0]
    )
    its.cache.check_integrity(its.computing([first, second]))
    its.leave(first)
    its.cache.check_integrity(its.computing([second]))
    its.leave(second)
    assert its.cache.pool.num_idle == 1 and its.cache.pool.num_free == 15
    assert its.cache.stats()["duplicate_blocks"] == 1


def test_nothing_is_cached_before_a_finite_token_was_sampled_after_it() -> None:
    its = tables(16)
    first, second = make_request("a", [1, 2, 3, 4, 5]), make_request("b", [1, 2, 3, 4, 5, 6, 7])
    its.admit(first, 0)
    seat_of(first).num_computed = 4  # by a step that does not sample
    assert its.admit(second, 1) is Admission.LATER and len(its.cache) == 0
    its.leave(first)  # its logits were not finite, or it was aborted
    assert its.admit(second, 1) is Admission.SEATED and seat_of(second).num_computed == 0


def test_one_that_takes_no_part_shares_and_finds_nothing() -> None:
    its = tables(16)
    first, second = make_request("a", [1, 2, 3, 4, 5]), make_request("b", [1, 2, 3, 4, 5])
    first.token_blocks = None
    assert its.admit(first, 0) is Admission.SEATED
    compute(its, first)
    assert len(its.cache) == 0
    assert its.admit(second, 0) is Admission.SEATED and seat_of(second).num_computed == 0


def test_generated_tokens_are_cached_once_a_token_was_sampled_after_them() -> None:
    its = tables()
    request = make_request("a", [1, 2, 3], max_tokens=9)
    its.admit(request, 0)
    its.publish(request, 3)
    assert len(its.cache) == 1
    request.generated = [7]
    its.publish(request, 4)
    assert len(its.cache) == 2
    assert seat_of(request).tables[0].chain[1].tokens == (3).to_bytes(4, "little") + (7).to_bytes(4, "little")


def test_tokens_that_an_aborted_request_never_saw_are_not_cached() -> None:
    """A step computed a token of it whose own step came too late: of the block that it completes, nobody knows it."""
    its = tables()
    request = make_request("a", [1, 2, 3], max_tokens=9)
    its.admit(request, 0)
    its.publish(request, 4)
    assert len(its.cache) == 1


def complete(scheduler: Scheduler, schedule: Schedule | None) -> None:
    assert schedule is not None
    scheduler.complete(schedule)
    for seat in schedule.seats:
        seat.request.generated.append(7)


@pytest.mark.parametrize("restored", [True, False])
def test_nobody_loses_a_seat_to_a_request_that_waits_for_copies(restored: bool) -> None:
    """There is room for it, once what it displaces is saved: preempting would take more from others and give nothing
    to it."""
    bed = Bed(blocks=12, host=32)
    scheduler = Scheduler(BlockTables(bed.cache, bed.tiers), 8, 64)
    waits, behind = make_request("waits", list(range(9))), make_request("behind", [8, 8, 8])
    assert waits.token_blocks is not None
    if restored:
        bed.save(waits.token_blocks)
    streams = [make_request(name, [number, 9, 9], max_tokens=9) for number, name in enumerate("ab", 20)]
    for stream in streams:
        scheduler.add(stream)
    complete(scheduler, scheduler.schedule())
    bed.compute(sequence(77, 8))
    for stream in streams:
        stream.paused = True
    for request in (waits, behind):
        scheduler.add(request)
    assert scheduler.schedule() is None
    assert scheduler.num_preemptions == 0 and scheduler.running == streams
    assert scheduler.waiting.head is waits and len(scheduler.waiting) == 2, "the one behind takes nothing of its room"
    [save] = bed.send()
    assert save.op is Op.SAVE
    bed.answer(save)
    if restored:
        assert scheduler.schedule() is None, "it is being restored, and the one behind waits for a save"
        for job in bed.send():
            bed.answer(job)
    schedule = scheduler.schedule()
    assert schedule is not None and waits in [seat.request for seat in schedule.seats]
    assert seat_of(waits).num_computed == 9 and waits.metrics.num_restored_tokens == (8 if restored else 0)
    assert scheduler.num_preemptions == 0
    scheduler.check_integrity()


def test_a_restore_is_declined_once_however_long_its_request_waits() -> None:
    bed = Bed(blocks=12, host=32)
    its = BlockTables(bed.cache, bed.tiers)
    request = make_request("a", list(range(9)))
    assert request.token_blocks is not None
    bed.save(request.token_blocks)
    bed.compute(sequence(77, 12))
    bed.tiers.cost.saw_prefill(1, 1e-9)
    bed.tiers.cost.saw_restore(Tier.HOST, 1, 4.0, 2.0)
    for _ in range(10):
        assert its.admit(request, 0) is Admission.ROOM_SOON
    stats = bed.tiers.stats()
    assert stats["declined_tokens"] == 0 and stats["seconds"]["host_block"] == 4.0
    for job in bed.send():
        bed.answer(job)
    assert its.admit(request, 0) is Admission.SEATED and seat_of(request).num_computed == 0
    stats = bed.tiers.stats()
    assert stats["declined_tokens"] == 8
    assert stats["seconds"]["host_block"] == pytest.approx(4.0 * 0.98)
