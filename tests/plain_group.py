"""A shard group without a model, whose tokens are a hash of all before them, and which checks what it is told; and an
engine on it."""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from headwise.cluster.group import Progress, ShardGroup, ShardGroupDied
from headwise.runtime.engine.block_tables import BlockTables
from headwise.runtime.engine.engine import Engine
from headwise.runtime.engine.generation import Generation
from headwise.runtime.engine.graphs import Graphs
from headwise.runtime.engine.prefilling import Prefilling
from headwise.runtime.engine.request import Request
from headwise.runtime.engine.scheduler import Scheduler
from headwise.runtime.engine.text import Delta, TextStream
from headwise.runtime.handoff.inbound import Inbound
from headwise.runtime.handoff.outbound import Outbound
from headwise.runtime.kv.blocks import BlockPool
from headwise.runtime.kv.events import KvEvents
from headwise.runtime.kv.identity import KvIdentity
from headwise.runtime.kv.ledger import Ledger
from headwise.runtime.kv.pins import Pins
from headwise.runtime.kv.prefix_cache import PrefixCache
from headwise.runtime.kv.tiers import Tiers
from headwise.runtime.output import FinishReason
from headwise.runtime.sampling_params import SamplingParams
from headwise.workers.kv.handoff import HandoffJob
from headwise.workers.kv.policy import DENSE, Reach
from headwise.workers.kv.transfer import Op, Tier, TransferJob, TransferResult, decode_job, encode_job
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
DEADLY = VOCAB + 1  # in a prompt: the group dies when it computes it


def next_token(tokens: list[int], seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr((tokens, seed)).encode(), digest_size=4).digest()) % VOCAB


@dataclass
class Row:
    """``blocks``: of each group."""

    tokens: list[int]
    computed: int
    blocks: list[list[int]]
    seed: int


@dataclass
class Planned:
    """What a row is once the plans in flight are done. ``blocks``: of each group."""

    computed: int
    blocks: list[list[int]]


def visible(reach: Reach, first: int, stop: int) -> list[int]:
    """The tokens that some token attends to from the ``first`` one to the one before ``stop``."""
    sinks = range(min(reach.sinks, reach.first_key(first)))
    return [*sinks, *range(reach.first_key(first), stop)]


class PlainGroup(ShardGroup):
    """Follows plans as a shard does, as late as it may; a slot of a block remembers the tokens up to the one that was
    written to it. Blocks are copied to and from tiers at times that ``chance`` picks, and now and then not at all."""

    def __init__(
        self,
        chance: random.Random | None = None,
        failing: float = 0.0,
        dying: float = 0.0,
        explains: bool = True,
        reaches: tuple[Reach, ...] = (DENSE,),
    ) -> None:
        """
        Args:
            reaches: of the groups of heads. (A token is the hash of all before it, whatever the reach.)
            failing: the share of blocks that are not copied.
            dying: the share of calls in which the group dies.
            explains: whether a rank says that it has met an error, where it dies of a deadly token.
        """
        self.explains, self.reaches = explains, reaches
        self.dying, self.ended = dying, False
        self.dead: ShardGroupDied | None = None
        self.rows: dict[int, Row] = {}
        self.memory: dict[tuple[int, int, int], tuple[int, ...]] = {}  # by group, block and slot
        self.plans: deque[bytes] = deque()
        self.planned: dict[int, Planned] = {}
        self.in_use: deque[set[tuple[int, int]]] = deque()  # group and number of what each plan in flight works on
        self.next_step = 0
        self.max_in_flight = 0
        self.chance, self.failing = chance or random.Random(0), failing
        self.stored: dict[Tier, dict[bytes, list[tuple[int, ...]]]] = {tier: {} for tier in Tier}
        self.jobs: dict[Tier, deque[TransferJob]] = {tier: deque() for tier in Tier}
        self.loading: set[int] = set()
        self.results: deque[TransferResult] = deque()
        self.computed_tokens = 0

    def load(self, progress: Progress | None = None) -> None:
        raise NotImplementedError

    def allocate(self, num_blocks: int | None = None, in_haste: bool = False) -> int:
        raise NotImplementedError

    def submit(self, plan: StepPlan) -> None:
        self._live()
        appends = [(0, row, block) for row, block in plan.appends] + plan.group_appends
        handed_out = {(group, block) for group, _, block in appends}
        for admit in plan.admits:
            assert admit.num_computed % BLOCK == 0
            blocks = [list(ids) for ids in (admit.block_ids, *admit.other_block_ids)]
            self.planned[admit.row] = Planned(admit.num_computed, blocks)
            for group, ids in enumerate(blocks):
                handed_out |= {(group, block) for block in ids[admit.num_computed // BLOCK :]}
        assert not handed_out & set().union(*self.in_use), "a step in flight still works on this block"
        for group, row, block in appends:
            self.planned[row].blocks[group].append(block)
        self.in_use.append(self._used_by(plan))
        assert not self.in_use[-1] & {(0, block) for block in self.loading}, "computed with before it is there"
        self.plans.append(encode_plan(plan))
        self.max_in_flight = max(self.max_in_flight, len(self.plans))
        self._copy_some()

    def collect(self) -> StepOutput:
        self._live()
        self.in_use.popleft()
        self._copy_some()
        plan = decode_plan(self.plans.popleft())
        output = decode_output(encode_output(self._step(plan)))
        if any(DEADLY in self.rows[row].tokens for row, _ in plan.computes):
            self.die("a deadly token", own_error=self.explains)
        return output

    @property
    def death(self) -> ShardGroupDied | None:
        return self.dead

    def die(self, cause: str, own_error: bool = False) -> None:
        """
        Raises:
            ShardGroupDied: always, from now on.
        """
        self.dead = self.dead or ShardGroupDied(0, "here", cause, own_error)
        raise self.dead

    def give_up(self, cause: str) -> None:
        self.dead = self.dead or ShardGroupDied(None, None, cause)

    def query(self, method: str) -> list[Any]:
        self._live()
        assert not self.plans
        return [method]

    def transfer(self, job: TransferJob | HandoffJob) -> None:
        self._live()
        assert isinstance(job, TransferJob), "a group that hands over KV is in tests/runtime/handoff"
        self.jobs[job.tier].append(job)
        assert decode_job(encode_job(job)) == job
        if job.op is Op.LOAD:
            used = set().union(*self.in_use)
            assert not self.loading & set(job.blocks) and not {(0, block) for block in job.blocks} & used
            self.loading |= set(job.blocks)

    def transferred(self, timeout_s: float) -> TransferResult | None:
        self._live()
        waiting = [tier for tier in Tier if self.jobs[tier]]
        if timeout_s and waiting and not self.results:
            self._copy_one(self.chance.choice(waiting))
        return self.results.popleft() if self.results else None

    def close(self) -> None:
        self.ended = True

    def _live(self) -> None:
        if self.dead is not None or self.chance.random() < self.dying:
            self.die("by chance")

    def _used_by(self, plan: StepPlan) -> set[tuple[int, int]]:
        used: set[tuple[int, int]] = set()
        for row, count in plan.computes:
            planned = self.planned[row]
            first, planned.computed = planned.computed, planned.computed + count
            for group, reach in enumerate(self.reaches):
                places = {at // BLOCK for at in visible(reach, first, first + count)}
                used |= {(group, planned.blocks[group][place]) for place in places}
        return used

    def _copy_some(self) -> None:
        for tier in Tier:
            while self.jobs[tier] and self.chance.random() < 0.3:
                self._copy_one(tier)

    def _copy_one(self, tier: Tier) -> None:
        job = self.jobs[tier].popleft()
        store, failed = self.stored[tier], []
        for at, key in enumerate(job.keys):
            if job.op is Op.DROP:
                store.pop(key.digest, None)
                continue
            source = store if job.op is Op.LOAD else self.stored[Tier.HOST]
            if self.chance.random() < self.failing or (job.op is not Op.SAVE and key.digest not in source):
                failed.append(key.digest)
            elif job.op is Op.SAVE:
                store[key.digest] = [self.memory[0, job.blocks[at], slot] for slot in range(BLOCK)]
            elif job.op is Op.DEMOTE:
                store[key.digest] = source[key.digest]
            else:
                self.memory |= {(0, job.blocks[at], slot): seen for slot, seen in enumerate(store[key.digest])}
        if job.op is Op.LOAD:
            self.loading -= set(job.blocks)
        self.results.append(TransferResult(job.id, failed, 1e-3))

    def _step(self, plan: StepPlan) -> StepOutput:
        assert plan.step == self.next_step
        self.next_step += 1
        for row in plan.drops:
            del self.rows[row]
        for admit in plan.admits:
            assert admit.row not in self.rows
            blocks = [list(ids) for ids in (admit.block_ids, *admit.other_block_ids)]
            self.rows[admit.row] = Row(list(admit.token_ids), admit.num_computed, blocks, admit.sampling.seed)
        for group, index, block in [*((0, *append) for append in plan.appends), *plan.group_appends]:
            self.rows[index].blocks[group].append(block)
        output = StepOutput(plan.step, seconds=1e-3)
        for index, count in plan.computes:
            self._write(index, count)
        for index, count in plan.computes:
            self._compute(index, count, output)
        return output

    def _write(self, index: int, count: int) -> None:
        row = self.rows[index]
        assert 0 < count <= len(row.tokens) - row.computed
        for at in range(row.computed, row.computed + count):
            for group, blocks in enumerate(row.blocks):
                assert blocks[at // BLOCK] >= 0, "computed where there is no block"
                self.memory[group, blocks[at // BLOCK], at % BLOCK] = tuple(row.tokens[: at + 1])
        self.computed_tokens += count

    def _compute(self, index: int, count: int, output: StepOutput) -> None:
        row = self.rows[index]
        row.computed += count
        for group, reach in enumerate(self.reaches):
            for at in visible(reach, row.computed - count, row.computed):
                seen = self.memory[group, row.blocks[group][at // BLOCK], at % BLOCK]
                assert seen == tuple(row.tokens[: at + 1]), "something else was written here"
        if row.computed == len(row.tokens):
            token = next_token(row.tokens, row.seed)
            if POISON in row.tokens:
                output.failed.append((index, "not finite"))
            else:
                output.tokens.append((index, token))
            row.tokens.append(token)


IDENTITY = KvIdentity("model", "float32", BLOCK)


class Letters:
    """A detokenizer: token 0 is a, 1 is b."""

    def add(self, token_ids: Sequence[int]) -> str:
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
    salt: str = "",
    **params: Any,
) -> Request:
    sampling = RowSampling(seed=seed, stop_token_ids=stop)
    blocks = IDENTITY.token_blocks(prompt, salt)
    return Request(
        name, prompt, SamplingParams(max_tokens=max_tokens, **params), sampling, max_tokens, index, token_blocks=blocks
    )


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
        self,
        blocks: int = 64,
        rows: int = 8,
        budget: int = 16,
        depth: int = 1,
        mixed: int | None = None,
        tiers: tuple[int, int] = (0, 0),
        group: PlainGroup | None = None,
        quota: float | None = None,
        inbound: Callable[[PrefixCache, Ledger], Inbound] | None = None,
        outbound: Callable[[Ledger], Outbound] | None = None,
        graph_rows: int = 0,
        **cache: Any,
    ) -> None:
        """
        Args:
            tiers: blocks of host memory and disk.
            inbound, outbound: make those of an engine that hands over KV.
            graph_rows: of the largest decode graph, as on a GPU; 0 has none.
            cache: other arguments of its PrefixCache.
        """
        self.events = KvEvents(1)
        self._make, self._cache, self._tiers, self._quota = (inbound, outbound), cache, tiers, quota
        self._graph_rows, self._budget = graph_rows, budget
        generation = self.generation(group or PlainGroup(), blocks)
        self.engine = Engine(generation, Scheduler(generation.tables, rows, budget, mixed), self.events, depth)
        if self.outbound is not None:
            self.outbound.prompts = Prefilling(self.engine, blocks * BLOCK, VOCAB + 1)
        self.requests: list[Request] = []
        self.got: dict[str, list[int]] = {}
        self.text: dict[str, str] = {}
        self.ended: dict[str, FinishReason | None] = {}

    def generation(self, group: PlainGroup, blocks: int) -> Generation:
        """Books of a group with so many blocks."""
        inbound, outbound = self._make
        share = None if self._quota is None else max(1, int(self._quota * blocks))
        caches = [
            PrefixCache(BlockPool(blocks), BLOCK, events=events, max_blocks_per_owner=share, reach=reach, **self._cache)
            for reach, events in zip_longest(group.reaches, [self.events])
        ]
        self.group, self.cache, self.pool = group, caches[0], caches[0].pool
        ledger = Ledger(group.transfer, group.transferred, 1)
        self.tiers = None
        if any(self._tiers):
            self.tiers = Tiers(self.cache, ledger, *self._tiers, blocks, self._quota, self.events)
        self.inbound = inbound(self.cache, ledger) if inbound is not None else None
        self.outbound = outbound(ledger) if outbound is not None else None
        tables = BlockTables(caches, self.tiers, self.inbound, self._budget)
        pins, *others = [Pins(cache, blocks - 8) for cache in caches]
        books = (self.cache, tables, ledger, self.tiers, pins, self.inbound, self.outbound, Graphs(self._graph_rows))
        return Generation(self.events.epoch, group, *books, other_pins=tuple(others))

    def resume(self, group: PlainGroup | None = None, blocks: int | None = None) -> None:
        """The engine, whose group is dead, goes on with another."""
        assert self.engine.rebuilding and not self.engine.has_work
        self.events.new_epoch(self.events.epoch + 1)
        self.engine.resume(self.generation(group or PlainGroup(), blocks or self.pool.num_blocks))

    def add(self, request: Request, stop: tuple[str, ...] | None = None) -> None:
        """Args: ``stop``: strings that end it; None is without text."""
        self.requests.append(request)
        self.got[request.key], self.text[request.key] = [], ""
        text = None if stop is None else TextStream(Letters(), stop, include_stop=False)
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
        """Every row is held by at most one request; the blocks' books agree with what the requests hold."""
        self.engine.check_integrity()
        rows = [request.seat.row for request in self.requests if request.seat is not None]
        assert len(rows) == len(set(rows))

    def check_idle(self) -> None:
        assert not self.engine.has_work
        for cache in self.engine.generation.tables.caches:
            assert cache.num_available == cache.pool.num_blocks
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
