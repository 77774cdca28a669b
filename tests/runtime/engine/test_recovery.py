"""An engine whose shard groups die: each request gets the tokens it would get from a group that does not."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.cluster.group import ShardGroupDied
from headwise.runtime.kv.events import Cleared, decode_events, decode_snapshot
from headwise.runtime.kv.identity import TokenBlocks
from headwise.runtime.output import FinishReason
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.transfer import BlockKey, Tier
from tests.effort import examples
from tests.plain_group import BLOCK, DEADLY, POISON, VOCAB, Bench, PlainGroup, alone, make_request


class Mortal:
    """A bench whose groups die."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.deaths = bench, 0

    def step(self) -> bool:
        """Steps; returns False if the group has died in it, and the engine has none."""
        try:
            self.bench.step()
        except ShardGroupDied as death:
            self.deaths += 1
            self.bench.engine.lose_group(death)
            self.bench.check_books()
            return False
        return True

    def run(self, explains: bool = True) -> None:
        """Until all is done; each group that dies is followed by one that may die of deadly tokens only."""
        for _ in range(5000):
            if not self.bench.engine.has_work:
                return
            if not self.step():
                self.bench.resume(PlainGroup(explains=explains))
        raise AssertionError(f"still at work: {self.bench.engine.stats()}")


def test_a_group_whose_output_is_lost_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after it may be anything: the request goes on in another group."""
    bench = Bench(12, 2, 30, 2)
    mortal, request = Mortal(bench), make_request("a", [1, 2, 0], 8)
    bench.add(request)
    assert mortal.step()
    collect = bench.group.collect

    def lose_one() -> object:
        collect()
        return collect()

    monkeypatch.setattr(bench.group, "collect", lose_one)
    assert not mortal.step()
    bench.resume()
    mortal.run()
    bench.check_idle()
    assert bench.got[request.key] == alone(request)[0]


@pytest.mark.parametrize("depth", [1, 2])
@examples(150)
@given(data=st.data())
def test_every_request_gets_the_tokens_it_would_get_alone(depth: int, data: st.DataObject) -> None:
    """Groups die in any call; meanwhile requests come, end and are paused; the next group may have other memory."""
    chance = random.Random(data.draw(st.integers(0, 1 << 30), "chance"))
    dying = data.draw(st.sampled_from([0.02, 0.1, 0.3]), "dying")
    tiers = data.draw(st.sampled_from([(0, 0), (6, 0), (6, 12)]), "tiers")
    rows, budget = data.draw(st.integers(1, 5), "rows"), data.draw(st.integers(2, 30), "budget")
    group = PlainGroup(chance, 0.1, dying)
    bench = Bench(data.draw(st.integers(8, 20)), rows, budget, depth, group=group, tiers=tiers)
    mortal = Mortal(bench)
    prompt = st.lists(st.integers(0, 2), min_size=1, max_size=14) | st.just([1, POISON, 2])
    drawn = st.tuples(prompt, st.integers(1, 14), st.just(()), st.integers(0, 3))
    todo = [
        make_request(str(i), *fields) for i, fields in enumerate(data.draw(st.lists(drawn, max_size=8), "requests"))
    ]
    requests, aborted, paused = list(todo), set[str](), set[str]()
    for at in range(4000):
        dying = dying if at < 300 else 0.0
        if todo and chance.random() < 0.3:
            bench.add(todo.pop())
        if bench.got and chance.random() < 0.05:
            name = chance.choice([request.request_id for request in bench.requests])
            if chance.random() < 0.5:
                aborted.add(name)
                bench.engine.abort(name)
            else:
                bench.engine.pause(name, name not in paused)
                paused ^= {name}
        if at > 300 and paused:
            bench.engine.pause(paused.pop(), False)
        if bench.engine.rebuilding:
            if chance.random() < 0.5:
                bench.resume(PlainGroup(chance, 0.1, dying), chance.randint(8, 20))
        elif bench.engine.has_work:
            mortal.step()
        elif not todo and not paused:
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


def test_who_waited_keeps_the_place() -> None:
    bench = Bench(rows=2)
    mortal = Mortal(bench)
    for name in "abcd":
        bench.add(make_request(name, [1, 2, 3], 3, seed=ord(name)))
    assert mortal.step()
    bench.engine.lose_group(ShardGroupDied(0, "here", "for the test"))
    assert bench.engine.num_waiting == 4
    bench.add(make_request("e", [1, 2, 3], 3))
    bench.resume()
    mortal.run()
    scheduled = [request.metrics.first_scheduled for request in bench.requests]
    assert scheduled == sorted(scheduled)
    assert [request.metrics.num_recoveries for request in bench.requests] == [1, 1, 0, 0, 0]
    assert all((bench.got[request.key], bench.ended[request.key]) == alone(request) for request in bench.requests)


@pytest.mark.parametrize(("explains", "deaths"), [(True, 3), (False, 4)])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_request_that_groups_die_of_fails_alone(depth: int, explains: bool, deaths: int) -> None:
    """Where a process is killed, which may be no fault of the request, it is tried once more."""
    bench = Bench(depth=depth, group=PlainGroup(explains=explains))
    mortal = Mortal(bench)
    neighbours = [make_request(str(i), [i, 2, 3], 12, seed=i) for i in range(8)]
    for request in neighbours[:4]:
        bench.add(request)
    for _ in range(3):
        mortal.step()
    deadly = make_request("deadly", [4, DEADLY, 5], 12)
    bench.add(deadly)
    for request in neighbours[4:]:
        bench.add(request)
    mortal.run(explains)
    assert mortal.deaths == deaths
    assert bench.ended[deadly.key] is FinishReason.ERROR and "died whenever" in str(deadly.error)
    assert all((bench.got[request.key], bench.ended[request.key]) == alone(request) for request in neighbours)
    bench.check_idle()


def test_two_that_are_deadly_fail_and_nobody_else() -> None:
    bench = Bench(rows=4)
    mortal = Mortal(bench)
    requests = [make_request(str(i), [i, 2, DEADLY if i in (1, 4) else 3], 6, seed=i) for i in range(8)]
    for request in requests:
        bench.add(request)
    mortal.run()
    assert {key for key, reason in bench.ended.items() if reason is FinishReason.ERROR} == {"1#0", "4#0"}
    bench.check_idle()


def test_whoever_gets_on_is_not_suspected_any_more() -> None:
    """A lone stream whose shards are killed at every second token is not to blame."""
    bench = Bench()
    mortal = Mortal(bench)
    request = make_request("long", [1, 2, 3], 40)
    bench.add(request)
    while bench.engine.has_work:
        before = len(bench.got[request.key])
        while bench.engine.has_work and len(bench.got[request.key]) < before + 2:
            assert mortal.step()
        if bench.engine.has_work:
            bench.engine.lose_group(ShardGroupDied(0, "here", "for the test"))
            bench.resume()
    assert (bench.got[request.key], bench.ended[request.key]) == alone(request)


def test_a_suspect_that_nobody_reads_holds_nobody_up() -> None:
    bench = Bench()
    mortal = Mortal(bench)
    deadly, other = make_request("deadly", [4, DEADLY], 4), make_request("other", [1, 2], 4)
    bench.add(deadly)
    bench.add(other)
    for _ in range(2):
        while mortal.step():
            pass
        bench.resume()
    bench.engine.pause("deadly", True)
    mortal.run()
    assert bench.ended == {other.key: FinishReason.LENGTH} and mortal.deaths == 2
    bench.engine.pause("deadly", False)
    mortal.run()
    assert bench.ended[deadly.key] is FinishReason.ERROR and mortal.deaths == 3


def test_a_suspect_waits_for_nobody_who_is_not_computed_meanwhile() -> None:
    """Another computes the prompt that both begin with, and is stopped half-way."""
    bench = Bench(budget=4, depth=2)
    mortal = Mortal(bench)
    suspect, same = (make_request(name, [1] * 13, 8) for name in ("suspect", "same"))
    bench.add(suspect)
    for _ in range(2):
        assert mortal.step()
        bench.engine.lose_group(ShardGroupDied(0, "here", "for the test"))
        bench.resume()
    bench.engine.pause("suspect", True)
    bench.add(same)
    assert mortal.step()
    bench.engine.pause("suspect", False)
    mortal.run()
    assert all((bench.got[request.key], bench.ended[request.key]) == alone(request) for request in (suspect, same))
    bench.check_idle()


@pytest.mark.parametrize("seed", [1902, 2295, 7630])
def test_a_suspect_does_not_give_up_its_own_blocks(seed: int) -> None:
    """It was paused until others had all the blocks that were left; now nobody else is computed, who could give some
    back."""
    chance = random.Random(seed)
    bench = Bench(chance.randint(8, 12), rows=4, budget=chance.choice([3, 40]), depth=2)
    mortal, paused = Mortal(bench), set[str]()
    for name in "01":
        prompt = [chance.randint(0, 5) for _ in range(chance.randint(4, 13))]
        bench.add(make_request(name, prompt, chance.randint(8, 14), seed=int(name)))
    for _ in range(2):
        for _ in range(chance.randint(1, 3)):
            assert mortal.step()
        bench.engine._submit_next()
        bench.engine.lose_group(ShardGroupDied(0, "here", "for the test"))
        bench.resume()
    for _ in range(40):
        if chance.random() < 0.3:
            name = chance.choice("01")
            bench.engine.pause(name, name not in paused)
            paused ^= {name}
        if bench.engine.has_work:
            assert mortal.step()
    for name in paused:
        bench.engine.pause(name, False)
    mortal.run()
    assert all((bench.got[request.key], bench.ended[request.key]) == alone(request) for request in bench.requests)


def test_a_group_with_less_memory_ends_what_does_not_fit() -> None:
    bench = Bench(blocks=20)
    small, large = make_request("small", [1] * 8, 8), make_request("large", [2] * 8, 40)
    bench.add(small)
    bench.add(large)
    bench.step()
    bench.engine.lose_group(ShardGroupDied(0, "here", "for the test"))
    bench.resume(blocks=9)
    late = make_request("late", [3] * 30, 8)
    bench.add(late)
    Mortal(bench).run()
    assert (bench.got[small.key], bench.ended[small.key]) == alone(small)
    assert bench.ended[large.key] is bench.ended[late.key] is FinishReason.ERROR
    assert large.error is not None and "8 tokens of the prompt and max_tokens=40" in large.error
    assert f"for {9 * BLOCK} tokens" in large.error and "30 tokens of the prompt" in str(late.error)


def test_what_was_pinned_is_pinned_again_for_the_rest_of_its_time() -> None:
    bench = Bench()
    mortal = Mortal(bench)
    prompt = make_request("pinned", [5] * 11, 1)
    bench.add(prompt)
    mortal.run()
    assert prompt.token_blocks is not None
    assert bench.engine.pin(prompt.token_blocks, 11, 1000.0) == 2 * BLOCK
    for _ in range(2):
        bench.engine.lose_group(ShardGroupDied(0, "here", "for the test"))
        assert bench.engine.stats()["num_blocks"] == 0
        bench.resume()
        mortal.run()
        assert bench.engine.stats()["prefix_cache"]["pinned_blocks"] == 2
    left = bench.engine.generation.pins.left()
    assert [(pin.num_blocks, pin.ttl_s <= 1000.0) for pin in left] == [(2, True)]
    bench.engine.reset_prefix_cache()
    bench.check_idle()


def test_a_pin_that_is_over_or_has_no_room_is_not_set_again(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(blocks=16)
    mortal = Mortal(bench)
    prompt = make_request("pinned", [5] * 30, 1)
    bench.add(prompt)
    mortal.run()
    assert isinstance(prompt.token_blocks, TokenBlocks)
    bench.engine.pin(prompt.token_blocks, 30, 1000.0)
    bench.engine.pin(prompt.token_blocks, 30, 1e-9)
    bench.engine.lose_group(ShardGroupDied(0, "here", "for the test"))
    bench.resume(blocks=10)  # of which 2 may be pinned
    mortal.run()
    assert bench.engine.stats()["prefix_cache"]["pinned_blocks"] == 0
    assert caplog.text.count("28 tokens that were pinned are not any more") == 1


def test_readers_of_events_see_all_cleared_and_a_new_epoch() -> None:
    bench = Bench()
    mortal = Mortal(bench)
    reader = bench.events.subscribe()
    bench.add(make_request("a", [1] * 8, 2))
    mortal.run()
    bench.engine.lose_group(ShardGroupDied(0, "here", "for the test"))
    assert decode_snapshot(bench.events.snapshot()).blocks["device"] == {}
    bench.resume()
    messages = [decode_events(data) for data in iter(lambda: reader.get(0), None)]
    assert [message.epoch for message in messages] == sorted(message.epoch for message in messages)
    assert messages[-2].events == messages[-1].events == (Cleared(None),)
    assert (messages[-1].epoch, messages[-1].sequence) == (messages[0].epoch + 1, 0)
    reader.close()


def test_a_reset_while_there_are_no_shards_is_done_once_there_are() -> None:
    bench = Bench(tiers=(0, 12))
    mortal = Mortal(bench)
    bench.add(make_request("a", [1] * 8, 2))
    mortal.run()
    bench.engine.lose_group(ShardGroupDied(0, "here", "for the test"))
    bench.engine.reset_prefix_cache()
    cleared = []
    bench.engine.on_resume.append(lambda generation: cleared.append(generation.cache.stats()["cached_blocks"]))
    bench.resume()
    mortal.run()
    assert bench.engine.stats()["prefix_cache"]["cached_blocks"] == 0 and cleared == [0]


def test_a_reset_and_pins_outlive_a_group_that_dies_before_they_are_done() -> None:
    bench = Bench(tiers=(0, 12))
    mortal = Mortal(bench)
    bench.add(make_request("a", [1] * 8, 2))
    mortal.run()
    bench.engine.lose_group(ShardGroupDied(0, "here", "for the test"))
    bench.engine.reset_prefix_cache()
    pinned = make_request("pinned", [5] * 11, 1).token_blocks
    assert pinned is not None and bench.engine.pin(pinned, 11, 1000.0) == 2 * BLOCK
    dead = PlainGroup()
    generation = bench.generation(dead, 64)
    generation.ledger.drop(Tier.DISK, [BlockKey(b"0" * 32, b"", b"", [1] * BLOCK)])
    dead.give_up("for the test")
    with pytest.raises(ShardGroupDied):
        bench.engine.resume(generation)
    assert bench.engine.rebuilding
    bench.resume()
    mortal.run()
    assert bench.engine.stats()["prefix_cache"]["pinned_blocks"] == 2


def test_a_reset_forgets_the_pins_that_are_still_to_be_set_again() -> None:
    bench = Bench()
    mortal = Mortal(bench)
    prompt = make_request("pinned", [5] * 11, 1)
    bench.add(prompt)
    mortal.run()
    assert prompt.token_blocks is not None
    bench.engine.pin(prompt.token_blocks, 11, 1000.0)
    bench.engine.lose_group(ShardGroupDied(0, "here", "for the test"))
    bench.resume()
    bench.engine.reset_prefix_cache()
    mortal.run()
    assert bench.engine.stats()["prefix_cache"]["pinned_blocks"] == 0
    bench.check_idle()


def test_whoever_is_aborted_hears_of_it_if_the_group_dies_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a handoff is to be ended on ranks that are dead."""
    bench = Bench(rows=1)
    mortal = Mortal(bench)
    running, waiting = make_request("running", [1, 2, 3], 4), make_request("waiting", [1, 2], 4)
    bench.add(running)
    bench.add(waiting)
    assert mortal.step()
    monkeypatch.setattr(bench.engine._scheduler._tables, "forget", lambda request: bench.group.die("for the test"))
    with pytest.raises(ShardGroupDied) as death:
        bench.engine.abort("waiting")
    bench.engine.lose_group(death.value)
    bench.engine.abort("waiting")
    assert bench.ended[waiting.key] is FinishReason.ABORT
    bench.resume()
    mortal.run()
    assert (bench.got[running.key], bench.ended[running.key]) == alone(running)


def test_counts_go_on() -> None:
    bench = Bench(tiers=(6, 0))
    mortal = Mortal(bench)
    for name in ("a", "b"):
        bench.add(make_request(name, [1] * 9, 2))
        mortal.run()
    before = bench.engine.stats()
    assert before["prefix_cache"]["hit_tokens"] == 8
    bench.engine.lose_group(ShardGroupDied(0, "here", "for the test"))
    bench.resume()
    after = bench.engine.stats()
    assert after["prefix_cache"]["hit_tokens"] == 8 and after["num_steps"] == before["num_steps"]
    assert after["epoch"] > before["epoch"]


def test_pinning_more_than_may_be_is_refused_as_ever() -> None:
    bench = Bench(blocks=10)
    prompt = make_request("pinned", [VOCAB - 1] * 13, 1)
    bench.add(prompt)
    Mortal(bench).run()
    assert prompt.token_blocks is not None
    with pytest.raises(InvalidValueError, match="blocks would be pinned"):
        bench.engine.pin(prompt.token_blocks, 13, 10.0)
