"""Both sides of a handoff against each other, over links and on engines that do what they like: what becomes readable
is always right, no block is written that is another's, and in the end nothing is left."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headwise.runtime.handoff.receiving import Cause, State
from tests.effort import examples
from tests.runtime.handoff.fake_ranks import BLOCKS, RANKS, Wish
from tests.runtime.handoff.world import LIMIT, SLOW, World

PROMPTS = st.sampled_from([(1, 2), (1, 3), (1, 2, 3), (1, 2, 4), (5, 6, 7, 8)])
INDEX = st.integers(0, 30)
RARELY = st.integers(0, 9).map(lambda number: number == 7)
SOMETIMES = st.integers(0, 3).map(lambda number: number == 3)
FAULTS = (
    "lose",
    "abort",
    "repeat",
    "damage",
    "fence",
    "kill",
    "restart",
    "pause",
    "slow",
    "jump",
    "cancel",
    "unsound",
    "stale",
)


def may(*faults: str) -> Callable[[HandoffMachine], bool]:
    return lambda machine: bool(machine.faults & set(faults))


class HandoffMachine(RuleBasedStateMachine):
    """Each example has a few kinds of faults, or none: with all of them at once no transfer would come far."""

    @initialize(faults=st.sets(st.sampled_from(FAULTS), max_size=5), each=st.integers(2, 9))
    def begin(self, faults: set[str], each: int) -> None:
        self.faults = faults
        self.world = World(
            lose_each=each if "lose" in faults else 0,
            repeat_each=each + 1 if "repeat" in faults else 0,
            no_aborts="abort" in faults,
        )

    @precondition(lambda self: sum(not wish.outcome for wish in self.world.wishes) < 5)
    @rule(
        prompt=PROMPTS,
        first_block=st.integers(0, 1),
        unsound=SOMETIMES,
        spare=st.integers(0, 2),
        deadline_s=st.sampled_from([None, None, 20.0, 90.0]),
        stale=RARELY,
    )
    def wish(
        self,
        prompt: tuple[int, ...],
        first_block: int,
        unsound: bool,
        spare: int,
        deadline_s: float | None,
        stale: bool,
    ) -> None:
        world = self.world
        sound = not (unsound and "unsound" in self.faults)
        deadline = None if deadline_s is None else world.now + deadline_s
        transfer = world.count().to_bytes(16, "big")
        world.wish(Wish(prompt, first_block, sound, spare, deadline, transfer), stale and "stale" in self.faults)

    @rule(times=st.integers(1, 5), seconds=st.sampled_from([0.05, 0.2, 3.0]))
    def go_on(self, times: int, seconds: float) -> None:
        for _ in range(times):
            self.world.go_on(seconds)

    @precondition(lambda self: self.world.deliverable())
    @rule(index=INDEX, fate=st.sampled_from(["deliver", "repeat", "lose"]))
    def message(self, index: int, fate: str) -> None:
        found = self.world.deliverable()
        message = found[index % len(found)]
        fate = fate if fate in self.faults else "deliver"
        if fate != "repeat":
            self.world.control.remove(message)
        if fate != "lose":
            self.world.deliver(message)

    @precondition(lambda self: self.world.data)
    @rule(index=INDEX, fate=st.sampled_from(["deliver", "deliver", "repeat", "lose", "damage"]))
    def chunk(self, index: int, fate: str) -> None:
        world = self.world
        chunk = world.data[index % len(world.data)]
        fate = fate if fate in self.faults else "deliver"
        if fate == "damage":
            world.damage(chunk)
            return
        if fate != "repeat":
            world.data.remove(chunk)
        if fate == "lose":
            world.prefill.chunk_done(chunk, "reset")
        else:
            world.deliver_chunk(chunk)

    @precondition(lambda self: any(rank.jobs for rank in self.world.decode.ranks))
    @rule(index=INDEX)
    def rank_runs(self, index: int) -> None:
        ranks = [rank for rank in self.world.decode.ranks if rank.jobs]
        ranks[index % len(ranks)].run()

    @precondition(lambda self: self.world.takeable())
    @rule(index=INDEX)
    def result(self, index: int) -> None:
        ranks = self.world.takeable()
        self.world.decode.take_result(ranks[index % len(ranks)])

    @precondition(lambda self: self.world.computable())
    @rule(index=INDEX, blocks=st.integers(1, 5))
    def compute(self, index: int, blocks: int) -> None:
        keys = self.world.computable()
        key = keys[index % len(keys)]
        for _ in range(blocks):
            if key in self.world.prefill.requests:
                self.world.prefill.compute(key)

    @rule(seconds=st.sampled_from([0.1, 0.6, 5.0, 31.0, 100.0]), look=st.booleans())
    def time(self, seconds: float, look: bool) -> None:
        self.world.now += seconds if seconds < 31 or "jump" in self.faults else 0.6
        if look:
            self.world.look()

    @precondition(may("pause"))
    @rule(side=st.sampled_from(["prefill", "decode"]))
    def pause(self, side: str) -> None:
        self.world.paused ^= {side}

    @precondition(may("slow"))
    @rule(what=st.sampled_from(SLOW))
    def slow(self, what: str) -> None:
        self.world.slow ^= {what}

    @precondition(may("cancel"))
    @precondition(lambda self: self.world.wishes)
    @rule(index=INDEX)
    def cancel(self, index: int) -> None:
        self.world.cancel(self.world.wishes[index % len(self.world.wishes)])

    @precondition(may("fence"))
    @rule(index=st.integers(0, RANKS - 1))
    def rank_cannot_open(self, index: int) -> None:
        self.world.decode.ranks[index].fails_next = True

    @precondition(may("fence"))
    @precondition(lambda self: any(rank.fences for rank in self.world.decode.ranks))
    @rule(index=INDEX)
    def fill_breaks(self, index: int) -> None:
        found = [(rank, fence) for rank in self.world.decode.ranks for fence in rank.fences]
        rank, fence = found[index % len(found)]
        rank.break_fill(fence)

    @precondition(may("kill"))
    @rule()
    def prefill_dies_or_starts(self) -> None:
        if self.world.prefill_up:
            self.world.kill_prefill()
        else:
            self.world.start_prefill()

    @precondition(may("restart"))
    @rule()
    def decode_restarts(self) -> None:
        self.world.restart_decode()

    @rule(count=st.integers(1, 8))
    def strangers_use_blocks(self, count: int) -> None:
        self.world.lend(count)

    @precondition(lambda self: any(wish.blocks for wish in self.world.wishes))
    @rule(index=INDEX)
    def evict(self, index: int) -> None:
        found = [wish for wish in self.world.wishes if wish.blocks]
        self.world.evict(found[index % len(found)])

    @invariant()
    def everybody_reads_what_is_right(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        self.world.settle()
        self.world.check()


TestHandoffMachine = HandoffMachine.TestCase
TestHandoffMachine.settings = examples(250, stateful_step_count=60)


def make_wish(prompt: tuple[int, ...], transfer: int, sound: bool = True) -> Wish:
    return Wish(prompt, 0, sound, 0, None, transfer.to_bytes(16, "big"))


def test_where_nothing_goes_wrong_every_prompt_is_published() -> None:
    world = World()
    for number in range(LIMIT):
        world.wish(make_wish((1, 2, number), number))
    world.settle()
    world.check()
    assert [wish.outcome for wish in world.wishes] == ["published"] * LIMIT


def test_what_is_not_finite_is_computed_again() -> None:
    world = World()
    world.wish(make_wish((1, 2), 1, sound=False))
    world.wish(make_wish((1, 2), 2))
    world.settle()
    world.check()
    assert [wish.outcome for wish in world.wishes] == ["computed", "published"]
    assert world.causes[Cause.PEER] == 1


def test_a_cancel_reaches_prefill_long_before_its_lease_runs_out() -> None:
    world = World()
    world.slow.add("chunks")  # or prefill would notice that its bytes are refused
    world.wish(make_wish(tuple(range(20)), 1))
    while not world.prefill.requests:
        world.go_on()
    world.cancel(world.wishes[0])
    before = world.now
    while world.prefill.requests or world.decode.attempts:
        world.go_on()
        assert world.now < before + 2
    world.settle()
    assert world.wishes[0].outcome == ""


def test_chunks_that_come_after_an_abort_do_not_reach_whoever_has_the_blocks_now() -> None:
    world = World()
    world.slow.add("chunks")
    world.wish(make_wish((1, 2, 3), 1))
    while not world.data:
        world.go_on()
    blocks = list(world.decode.attempts[0].blocks)
    world.cancel(world.wishes[0])
    while world.decode.attempts:
        assert blocks == [block for block, owner in enumerate(world.decode.owners) if owner is not None]
        world.go_on()
    world.lend(BLOCKS)
    late = list(world.data)
    world.slow.clear()
    world.settle()
    world.check()
    assert late and not world.data
    for chunk in late:
        assert world.decode.ranks[chunk.rank].memory[blocks[chunk.place]] is None


def test_a_commit_that_reaches_the_next_generation_of_prefill_publishes_nothing() -> None:
    world = World()
    world.wish(make_wish((1, 2, 3), 1))
    while world.decode.attempts[0].machine.state is not State.COMMITTING:
        world.go_on()
    world.kill_prefill()
    world.start_prefill()
    world.settle()
    world.check()
    assert world.wishes[0].outcome == "computed"
    assert world.causes[Cause.PEER] == 1
