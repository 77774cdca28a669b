"""Requests, blocks and tiers together, on ranks that do everything late: what a request computes with, what is shared
and what is restored is always what was written for those tokens, and what is not finite is never shared. With windows,
and with several groups of heads, too."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headwise.runtime.engine.block_tables import BlockTables
from headwise.runtime.engine.request import Request, RequestState
from headwise.runtime.engine.scheduler import Schedule, Scheduler
from headwise.runtime.engine.tables import GONE
from headwise.runtime.kv.blocks import BlockPool, Use
from headwise.runtime.kv.eviction import CachedBlock, Chain, EvictionName
from headwise.runtime.kv.identity import Hash, TokenBlocks, sha256
from headwise.runtime.kv.ledger import Ledger
from headwise.runtime.kv.pins import Pins
from headwise.runtime.kv.prefix_cache import PrefixCache, match_all
from headwise.runtime.kv.tiers import Tiers
from headwise.runtime.kv.windows import ENDLESS
from headwise.runtime.output import FinishReason
from headwise.runtime.sampling_params import SamplingParams
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.policy import DENSE, Reach
from headwise.workers.kv.transfer import Op, Tier, TransferJob, TransferResult
from headwise.workers.plan import RowSampling
from tests.effort import examples

SIZE = 2
NUM_BLOCKS = 12
MAX_TOKENS = 10
SALTS = ("", "tenant")
PROMPTS = st.builds(
    lambda start, length, tail: (start[:length] + tail)[: MAX_TOKENS - 3],
    st.sampled_from(([0] * 7, [0] * 4 + [1] * 3, [1] * 7)),
    st.integers(1, 7),
    st.lists(st.integers(0, 2), max_size=3),
)
RARELY = st.integers(0, 9).map(lambda number: number == 7)


def make_request(name: str, tokens: list[int], salt: str = "", max_tokens: int = 3, hash: Hash = sha256) -> Request:
    blocks = TokenBlocks(sha256(salt.encode()), SIZE, tokens, hash)
    return Request(name, tokens, SamplingParams(max_tokens=max_tokens), RowSampling(), max_tokens, token_blocks=blocks)


@dataclass(frozen=True)
class Slot:
    """What a token's place in a block holds: for whom, all tokens up to it, and whether it is finite."""

    namespace: bytes
    tokens: tuple[int, ...]
    finite: bool


@dataclass
class Row:
    """``blocks``: of each group."""

    request: Request
    tokens: list[int]
    computed: int
    blocks: list[list[int]]


class Ranks:
    """Executes plans and jobs when it is told to, and remembers what is where: by group, block and slot."""

    def __init__(self, reaches: tuple[Reach, ...] = (DENSE,)) -> None:
        self.reaches = reaches
        self.rows: dict[int, Row] = {}
        self.memory: dict[tuple[int, int, int], Slot] = {}
        self.stored: dict[Tier, dict[bytes, list[Slot]]] = {tier: {} for tier in Tier}
        self.jobs: dict[Tier, deque[TransferJob]] = {tier: deque() for tier in Tier}
        self.results: list[TransferResult] = []
        self.deliverable = 0
        self.spoilt: set[Request] = set()

    def step(self, schedule: Schedule) -> set[int]:
        """Returns the rows that sample and are not finite; of others a shard does not know."""
        plan, requests = schedule.plan, {seat.row: seat.request for seat in schedule.seats}
        for row in plan.drops:
            del self.rows[row]
        for admit in plan.admits:
            request = requests[admit.row]
            blocks = [list(ids) for ids in (admit.block_ids, *admit.other_block_ids)]
            self.rows[admit.row] = Row(request, list(admit.token_ids), admit.num_computed, blocks)
        for group, index, block in [*((0, *append) for append in plan.appends), *plan.group_appends]:
            self.rows[index].blocks[group].append(block)
        for index, count in plan.computes:
            self.write(self.rows[index], count)
        finite = {index: self.read(self.rows[index], count) for index, count in plan.computes}
        sampling = (index for index in finite if self.rows[index].computed == len(self.rows[index].tokens))
        return {index for index in sampling if not finite[index]}

    def write(self, row: Row, count: int) -> None:
        assert row.request.token_blocks is not None
        for at in range(row.computed, row.computed + count):
            seen = Slot(row.request.token_blocks.namespace, tuple(row.tokens[: at + 1]), row.request not in self.spoilt)
            for group, blocks in enumerate(row.blocks):
                assert blocks[at // SIZE] >= 0, "computed where there is no block"
                self.memory[group, blocks[at // SIZE], at % SIZE] = seen
        row.computed += count

    def read(self, row: Row, count: int) -> bool:
        """What the last ``count`` tokens attend to; returns whether all of it is finite."""
        assert row.request.token_blocks is not None
        finite = True
        for group, reach in enumerate(self.reaches):
            for at in sorted(set().union(*(visible(reach, at) for at in range(row.computed - count, row.computed)))):
                slot = self.memory[group, row.blocks[group][at // SIZE], at % SIZE]
                assert slot.namespace == row.request.token_blocks.namespace
                assert slot.tokens == tuple(row.tokens[: at + 1]), "computed with another sequence's block"
                finite = finite and slot.finite
        return finite

    def take_job(self, job: TransferJob) -> None:
        self.jobs[job.tier].append(job)

    def result(self, timeout_s: float) -> TransferResult | None:
        """As many results as are deliverable now."""
        if not self.deliverable:
            return None
        self.deliverable -= 1
        return self.results.pop(0)

    def execute(self, tier: Tier, failing: set[int]) -> None:
        """The oldest job of a tier; ``failing``: which of its keys are not moved."""
        job = self.jobs[tier].popleft()
        store, failed = self.stored[tier], []
        for at, key in enumerate(job.keys):
            source = self.stored[Tier.HOST] if job.op is Op.DEMOTE else store
            if job.op is Op.DROP:
                store.pop(key.digest, None)
            elif at in failing or (job.op is not Op.SAVE and key.digest not in source):
                failed.append(key.digest)
            elif job.op is Op.SAVE:
                store[key.digest] = [self.memory[0, job.blocks[at], slot] for slot in range(SIZE)]
            elif job.op is Op.DEMOTE:
                store[key.digest] = source[key.digest]
            else:
                self.memory |= {(0, job.blocks[at], slot): seen for slot, seen in enumerate(source[key.digest])}
        self.results.append(TransferResult(job.id, failed, 1e-3))


def visible(reach: Reach, position: int) -> set[int]:
    """The tokens that one at a position attends to."""
    return {*range(min(reach.sinks, position + 1)), *range(reach.first_key(position), position + 1)}


class TablesMachine(RuleBasedStateMachine):
    """Every event on its own, in any order: steps in flight, jobs executed, results that come late."""

    hash: Hash = staticmethod(sha256)
    policies: tuple[tuple[Reach, ...], ...] = ((DENSE,),)
    longer = 1
    """How many times as long prompts and texts are."""

    @initialize(
        data=st.data(),
        eviction=st.sampled_from(["lru", "cost_aware"]),
        quota=st.sampled_from([None, None, 0.3]),
        sizes=st.sampled_from([(0, 0), (4, 0), (0, 4), (3, 6), (12, 20)]),
        budget=st.sampled_from([3, 8, 30]),
        can_fail=st.booleans(),
    )
    def start(
        self,
        data: st.DataObject,
        eviction: EvictionName,
        quota: float | None,
        sizes: tuple[int, int],
        budget: int,
        can_fail: bool,
    ) -> None:
        share = None if quota is None else max(1, int(quota * NUM_BLOCKS))
        reaches = data.draw(st.sampled_from(self.policies))
        self.caches = [PrefixCache(BlockPool(NUM_BLOCKS), SIZE, eviction, None, share, reach) for reach in reaches]
        self.cache = self.caches[0]
        self.ranks, self.in_flight, self.can_fail = Ranks(reaches), deque[Schedule](), can_fail
        self.ledger = Ledger(self.take_job, self.ranks.result, 1)
        has_tiers = any(sizes) and len(reaches) == 1
        self.tiers = Tiers(self.cache, self.ledger, *sizes, 4, quota) if has_tiers else None
        self.tables = BlockTables(self.caches, self.tiers, chunk=budget)
        self.scheduler = Scheduler(self.tables, 4, budget)
        self.now = 0.0
        rows = [
            MAX_TOKENS * self.longer // SIZE if room is None else room.most_blocks(ENDLESS)
            for room in self.tables.rooms
        ]
        self.pins = [
            Pins(cache, max(0, NUM_BLOCKS - row - 1), lambda: self.now)
            for cache, row in zip(self.caches, rows, strict=True)
        ]
        self.requests: list[Request] = []
        self.prompts: list[tuple[str, list[int]]] = []

    def take_job(self, job: TransferJob) -> None:
        """A GPU's copies do not wait for steps in flight: these have no part in the blocks of a job that is sent."""
        used = {block for schedule in self.in_flight for seat in schedule.seats for block in seat.block_ids} - {GONE}
        assert not used & set(job.blocks), "a block moves that a step in flight computes with"
        self.ranks.take_job(job)

    @rule(salt=st.sampled_from(SALTS), tokens=PROMPTS, max_tokens=st.integers(1, 3))
    def add(self, salt: str, tokens: list[int], max_tokens: int) -> None:
        self.add_longer(salt, tokens * self.longer, max_tokens * self.longer)

    def add_longer(self, salt: str, tokens: list[int], max_tokens: int) -> None:
        self.prompts.append((salt, tokens))
        request = make_request(str(len(self.prompts)), tokens, salt, max_tokens, self.hash)
        self.requests.append(request)
        self.scheduler.add(request)

    @precondition(lambda self: self.prompts)
    @rule(data=st.data())
    def add_again(self, data: st.DataObject) -> None:
        salt, tokens = data.draw(st.sampled_from(self.prompts))
        self.add_longer(salt, tokens, 2 * self.longer)

    @rule()
    def submit(self) -> None:
        if len(self.in_flight) < 2 and (schedule := self.scheduler.schedule()) is not None:
            self.in_flight.append(schedule)
        self.pump()

    @rule(steps=st.integers(1, 8), token=st.integers(0, 1), moving=st.booleans())
    def run(self, steps: int, token: int, moving: bool) -> None:
        for _ in range(steps):
            self.submit()
            if moving:
                self.work_off(random.Random(steps))
            if self.in_flight:
                self.complete(token)
            self.everything_is_what_it_seems()

    @precondition(lambda self: self.in_flight)
    @rule(token=st.integers(0, 1))
    def complete(self, token: int) -> None:
        schedule = self.in_flight.popleft()
        failed = self.ranks.step(schedule)
        self.scheduler.complete(schedule, failed)
        for seat in schedule.seats:
            request = seat.request
            if seat.num_done < seat.num_given:
                continue
            # The shards sample for those too whose token nobody wants any more.
            self.ranks.rows[seat.row].tokens.append(token)
            if request.state is RequestState.FINISHED:
                continue
            if seat.row in failed:
                self.finish(request, FinishReason.ERROR)
                continue
            request.generated.append(token)
            if len(request.generated) >= request.max_tokens:
                self.finish(request, FinishReason.LENGTH)

    def finish(self, request: Request, reason: FinishReason) -> None:
        request.finish_reason = reason
        self.scheduler.finish(request)
        self.requests.remove(request)
        assert reason is not FinishReason.ERROR or request in self.ranks.spoilt, "failed by another's fault"

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), really=RARELY)
    def abort(self, data: st.DataObject, really: bool) -> None:
        if really:
            self.finish(data.draw(st.sampled_from(self.requests)), FinishReason.ABORT)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), really=st.booleans())
    def spoil(self, data: st.DataObject, really: bool) -> None:
        """What it computes from now on is not finite."""
        if really:
            self.ranks.spoilt.add(data.draw(st.sampled_from(self.requests)))

    @precondition(lambda self: self.scheduler.running)
    @rule()
    def preempt(self) -> None:
        self.scheduler._preempt(self.scheduler.running[-1])

    @rule(saved=st.booleans(), share=st.sampled_from([1, 1, 2, 3]))
    def squeeze(self, saved: bool, share: int = 1) -> None:
        """All that is idle on the device, or a part, has to leave it, saved before or not."""
        for _ in range(20):
            if not saved or self.tiers is None or self.tiers.saver.can_take(self.cache.num_available):
                break
            self.pump()
            self.work_off(random.Random(0))
        for at, cache in enumerate(self.caches):
            for block in cache.allocate(cache.num_available // max(share, at + 1)):
                cache.release_block(block, Use.COMPUTE, None)

    @rule(salt=st.sampled_from(SALTS), tokens=PROMPTS, late=st.integers(0, 3))
    def visit(self, salt: str, tokens: list[int], late: int) -> None:
        """A request comes when all that was verified is below, and others may come in between."""
        self.run(4, 0, True)
        self.squeeze(True)
        self.add(salt, tokens, 2)
        self.submit()
        if late != 3:
            self.run(late + 1, 1, True)

    @precondition(lambda self: any(self.ranks.jobs.values()))
    @rule(data=st.data())
    def execute(self, data: st.DataObject) -> None:
        tier = data.draw(st.sampled_from([tier for tier in Tier if self.ranks.jobs[tier]]))
        failing = data.draw(st.sets(st.integers(0, 5), max_size=2)) if self.can_fail else set()
        self.ranks.execute(tier, failing)

    @precondition(lambda self: self.ranks.results)
    @rule()
    def deliver(self) -> None:
        self.ranks.deliverable = 1
        self.ledger.poll()

    @precondition(lambda self: self.prompts)
    @rule(data=st.data(), ttl=st.sampled_from([0.0, 2.0]))
    def pin(self, data: st.DataObject, ttl: float) -> None:
        salt, tokens = data.draw(st.sampled_from(self.prompts))
        chains: list[Chain] = [[] for _ in self.caches]
        blocks = TokenBlocks(sha256(salt.encode()), SIZE, tokens, self.hash)
        match_all(self.caches, blocks, len(tokens) // SIZE, chains)
        try:
            for pins, chain in zip(self.pins, chains, strict=True):
                pins.pin(chain, ttl)
        except InvalidValueError:
            self.clear_pins()

    @rule()
    def wait(self) -> None:
        self.now += 1.0
        for pins in self.pins:
            pins.expire()

    def clear_pins(self) -> None:
        for pins in self.pins:
            pins.clear()

    @rule(really=RARELY)
    def reset(self, really: bool) -> None:
        if not really:
            return
        self.clear_pins()
        for cache in self.caches:
            cache.clear()
        if self.tiers is not None:
            self.tiers.clear()

    @invariant()
    def everything_is_what_it_seems(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.scheduler.check_integrity()
        for group, cache in enumerate(self.caches):
            for node in cache._index.values():
                self.check_block(group, node)
        if self.tiers is not None:
            self.check_tiers()

    def check_block(self, group: int, node: CachedBlock) -> None:
        slots = [self.ranks.memory[group, node.block, slot] for slot in range(SIZE)]
        tokens = slots[-1].tokens
        if self.caches[group].reach == DENSE:
            path = [node]
            while path[-1].parent is not None:
                path.append(path[-1].parent)
            data = b"".join(each.tokens for each in reversed(path))
            tokens = tuple(int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4))
        blocks = TokenBlocks(node.namespace, SIZE, tokens, self.hash)
        assert (blocks.digests[-1], len(blocks.digests)) == (node.digest, node.index + 1)
        assert blocks.parent(node.index) == node.parent_digest
        for slot, seen in enumerate(slots):
            assert (seen.namespace, seen.tokens) == (node.namespace, tokens[: len(tokens) - SIZE + slot + 1])
            assert seen.finite or not node.verified, "not finite, and shared as if it were"

    def check_tiers(self) -> None:
        tiers = self.tiers
        assert tiers is not None
        unsaved, saving = tiers.saver._unsaved, tiers.saver._saving
        for node in [*unsaved, *saving]:
            assert node.cached and not self.cache.pool.is_used(node.block)
        assert not unsaved.keys() & saving
        if not self.ledger.busy:
            for tier, index in tiers.books.tiers.items():
                assert {block.key.digest for block in index} == self.ranks.stored[tier].keys()
                for block in index:
                    assert all(slot.finite for slot in self.ranks.stored[tier][block.key.digest])
                assert not index.incoming and not any(block.readers for block in index)
        if not self.can_fail:
            damaged = sum(tiers.stats()[tier.value]["damaged"] for tier in tiers.books.tiers)
            assert not damaged, "a tier was believed to hold what it did not"

    def pump(self) -> None:
        if self.tiers is not None:
            self.tiers.pump()

    def teardown(self) -> None:
        """All that is left comes to its end, and leaves nothing behind."""
        if not hasattr(self, "cache"):
            return
        chance = random.Random(0)
        for _ in range(2000):
            if not self.requests and not self.in_flight:
                break
            self.submit()
            self.work_off(chance)
            if self.in_flight:
                self.complete(0)
            self.everything_is_what_it_seems()
        assert not self.requests, "a request waits for ever"
        self.now += 100.0
        self.wait()
        for cache in self.caches:
            cache.clear()
        if self.tiers is not None:
            self.tiers.clear()
            for _ in range(50):
                self.pump()
                self.work_off(chance)
            assert not self.ledger.busy
        self.everything_is_what_it_seems()
        assert all(cache.pool.num_free == NUM_BLOCKS for cache in self.caches)
        assert not self.tables._coming and not self.tables._searches

    def work_off(self, chance: random.Random) -> None:
        for tier in Tier:
            while self.ranks.jobs[tier] and chance.random() < 0.8:
                self.ranks.execute(tier, set())
        self.ranks.deliverable = len(self.ranks.results)
        self.ledger.poll()


class CollidingMachine(TablesMachine):
    """With digests of 8 bits."""

    hash: Hash = staticmethod(lambda data: sha256(data)[:1])


class WindowMachine(TablesMachine):
    """Texts longer than the window, and than the memory."""

    policies = ((Reach(0, 1),), (Reach(0, 4),), (Reach(1, 3),), (Reach(3, 5),))
    longer = 4


class GroupsMachine(TablesMachine):
    """Heads that keep different tokens."""

    policies = (
        (DENSE, Reach(0, 3)),
        (Reach(1, 2), DENSE),
        (Reach(0, 1), Reach(2, 4)),
        (DENSE, Reach(0, 2), Reach(1, 6)),
    )
    longer = 2


for machine in (TablesMachine, CollidingMachine, WindowMachine, GroupsMachine):
    machine.TestCase.settings = examples(150, stateful_step_count=50)
TestTables = TablesMachine.TestCase
TestColliding = CollidingMachine.TestCase
TestWindow = WindowMachine.TestCase
TestGroups = GroupsMachine.TestCase
