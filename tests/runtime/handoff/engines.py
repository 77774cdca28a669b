"""Two engines without models, one of which computes prompts for the other, and everything that can go wrong between
them: calls and answers are lost, repeated and late, blocks are lost on their way or come when nobody wants them."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from headwise.runtime.handoff.choice import HandoffCost
from headwise.runtime.handoff.inbound import Inbound
from headwise.runtime.handoff.link import Answer
from headwise.runtime.handoff.messages import Ask, HelloAnswer, Identity, Load, State, Status, TransferKey
from headwise.runtime.handoff.outbound import Outbound
from headwise.runtime.handoff.receiving import Cause
from headwise.runtime.kv.ledger import Ledger
from headwise.runtime.kv.prefix_cache import PrefixCache
from headwise.workers.errors import HeadwiseError, InvalidValueError
from headwise.workers.kv.handoff import Fence, HandoffJob, HandoffOp, KvEndpoint
from headwise.workers.kv.transfer import TransferJob, TransferResult, decode_job, encode_job
from tests.plain_group import BLOCK, Bench, PlainGroup

LEASE_S = 30.0
DECODE_EPOCH, PREFILL_EPOCH = 7, 9
IDENTITY = Identity(1, 1, "model", "float32", BLOCK, "dense", 1, 1, 1)


class Clock:
    """Stands for the module ``time``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@dataclass
class OpenFence:
    fence: Fence
    blocks: list[int]
    missing: set[int]
    fill: int | None = None
    broken: str = ""


@dataclass
class Flying:
    """A block on its way."""

    fence: Fence
    place: int
    content: list[tuple[int, ...]]
    push: int
    dropped: bool = False


class HandoffGroup(PlainGroup):
    """A PlainGroup of one rank that hands over KV to ``other``."""

    other: HandoffGroup

    def __init__(self, chance: random.Random, faults: float) -> None:
        super().__init__(chance)
        self.faults = faults
        self.pace = chance.choice([0.05, 0.3, 0.6])  # how soon it does what it is told
        self.handoffs: list[HandoffJob] = []
        self.fences: dict[int, OpenFence] = {}
        self.flying: list[Flying] = []
        self.pushes: dict[int, list[Flying]] = {}

    def transfer(self, job: TransferJob | HandoffJob) -> None:
        if isinstance(job, HandoffJob):
            assert decode_job(encode_job(job)) == job
            self.handoffs.append(job)
        else:
            super().transfer(job)

    def transferred(self, timeout_s: float) -> TransferResult | None:
        self.move()
        return super().transferred(timeout_s)

    def move(self) -> None:
        """Does some of what is to be done, jobs in their order, and lets some blocks arrive, in any order."""
        while self.handoffs and self.chance.random() < self.pace:
            self._do(self.handoffs.pop(0))
        self.chance.shuffle(self.flying)
        while self.flying and self.chance.random() < self.pace:
            self._arrive(self.flying.pop())

    def _do(self, job: HandoffJob) -> None:
        number, error = job.fence.number, ""
        if job.op is HandoffOp.OPEN:
            assert not {(0, block) for block in job.blocks} & set().union(*self.in_use), (
                "a block is reserved that a step works on"
            )
            self.loading |= set(job.blocks)
            self.fences[number] = OpenFence(job.fence, job.blocks, set(range(len(job.blocks))))
            error = "no memory" if self._fault() else ""
        elif job.op is HandoffOp.FILL:
            self._fill(job)
            return
        elif job.op is HandoffOp.CLOSE:
            self._close(number)
        elif job.op is HandoffOp.PUSH:
            self._push(job)
            return
        elif job.op is HandoffOp.STOP:
            for flying in [one for one in self.flying if one.fence == job.fence]:
                flying.dropped = True
        self.results.append(TransferResult(job.id, error=error))

    def _fill(self, job: HandoffJob) -> None:
        fence = self.fences.get(job.fence.number)
        if fence is None:
            self.results.append(TransferResult(job.id, error="no such fence"))
            return
        fence.fill = job.id
        self._settle(fence)

    def _settle(self, fence: OpenFence) -> None:
        if fence.fill is not None and (fence.broken or not fence.missing):
            self.results.append(TransferResult(fence.fill, error=fence.broken, num_bytes=len(fence.blocks)))
            fence.fill = None
            if not fence.broken:
                self._forget(fence)

    def _close(self, number: int) -> None:
        fence = self.fences.get(number)
        if fence is None:
            return
        fence.broken = fence.broken or "closed"
        self._settle(fence)
        self._forget(fence)

    def _forget(self, fence: OpenFence) -> None:
        del self.fences[fence.fence.number]
        self.loading -= set(fence.blocks)

    def _push(self, job: HandoffJob) -> None:
        sent = []
        for index, block in enumerate(job.blocks):
            content = [self.memory[0, block, slot] for slot in range(BLOCK)]
            sent.append(Flying(job.fence, job.first + index, content, job.id, self._fault()))
        self.pushes[job.id] = list(sent)
        self.flying += sent

    def _arrive(self, flying: Flying) -> None:
        waiting = self.pushes.get(flying.push)
        if waiting is None:
            return
        error = "lost" if flying.dropped else self.other.take(flying)
        waiting.remove(flying)
        if error or not waiting:
            del self.pushes[flying.push]
            self.results.append(TransferResult(flying.push, error=error))
        if not error and self._fault():
            self.other.take(flying)  # it comes again

    def take(self, flying: Flying) -> str:
        """A block has come; returns why it is refused."""
        fence = self.fences.get(flying.fence.number)
        if fence is None or fence.fence != flying.fence or fence.broken:
            return "no such fence"
        if flying.place not in fence.missing:
            fence.broken = "a block came twice"
            self._settle(fence)
            return fence.broken
        for slot, seen in enumerate(flying.content):
            self.memory[0, fence.blocks[flying.place], slot] = seen
        fence.missing.discard(flying.place)
        self._settle(fence)
        return ""

    def _fault(self) -> bool:
        return self.chance.random() < self.faults


@dataclass
class FakeLink:
    """Inbound's connection to an Outbound."""

    outbound: Callable[[], Outbound]
    chance: random.Random
    faults: float
    name: str = "prefill"
    problem: str | None = None
    digests: frozenset[bytes] = frozenset()
    session: HelloAnswer | None = field(
        default_factory=lambda: HelloAnswer(IDENTITY, PREFILL_EPOCH, [(0, 1)], 1 << 16, 64)
    )
    calls: list[Callable[[], None]] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)
    tracked: dict[TransferKey, Callable[[TransferKey, Status | None], None]] = field(default_factory=dict)

    @property
    def load(self) -> Load:
        return self.outbound().load()

    def wait(self, timeout_s: float) -> bool:
        return True

    def ask(self, ask: Ask, answered: Callable[[Answer], None]) -> None:
        ask = Ask.of(ask.message(), BLOCK, max_lease_s=120)

        def accept() -> Answer:
            expected_s, load = self.outbound().accept(ask)
            return Answer(None, expected_s=expected_s, load=load)

        self._call(accept, answered)

    def commit(self, key: TransferKey, answered: Callable[[Answer], None]) -> None:
        def commit() -> None:
            status = self.outbound().commit(key)
            if self._lost():
                answered(Answer(Cause.UNREACHABLE))
            else:
                status.add_done_callback(lambda done: answered(Answer(None, status=done.result())))

        if self._lost():
            self.calls.append(lambda: answered(Answer(Cause.UNREACHABLE)))
        else:
            self.calls.append(commit)

    def abort(self, key: TransferKey, reason: str) -> None:
        self._call(lambda: self.outbound().abort(key, reason), lambda answer: None)

    def track(self, key: TransferKey, renewed: Callable[[TransferKey, Status | None], None]) -> None:
        self.tracked[key] = renewed

    def untrack(self, key: TransferKey) -> None:
        self.tracked.pop(key, None)

    def close(self) -> None:
        self.closed.set()

    def move(self) -> None:
        """Makes some of the calls, in any order."""
        self.chance.shuffle(self.calls)
        while self.calls and self.chance.random() < 0.6:
            self.calls.pop()()

    def renew(self) -> None:
        for key, renewed in list(self.tracked.items()):
            if self._lost():
                renewed(key, None)
            else:
                renewed(key, self.outbound().renew([key], LEASE_S)[0])

    def _call(self, function: Callable[[], Any], answered: Callable[[Answer], None]) -> None:
        def call() -> None:
            try:
                answer = function()
            except InvalidValueError as error:
                answer = Answer(Cause.PEER, str(error))
            except HeadwiseError as error:
                answer = Answer(Cause.REFUSED, str(error))
            answered(Answer(Cause.UNREACHABLE) if self._lost() else answer)

        for _ in range(2 if self._lost() else 1):
            self.calls.append(call)
        if self._lost():
            self.calls[-1] = lambda: answered(Answer(Cause.UNREACHABLE))

    def _lost(self) -> bool:
        return self.chance.random() < self.faults


class Pair:
    """A decode engine, its prefill engine, and time."""

    def __init__(self, seed: int, faults: float, blocks: tuple[int, int], **settings: Any) -> None:
        """Args: ``blocks``: of decode and prefill; ``settings``: of both engines."""
        self.chance, self.clock = random.Random(seed), Clock()
        here, there = (HandoffGroup(self.chance, faults) for _ in range(2))
        here.other, there.other = there, here
        self.prefill = Bench(
            blocks[1], group=there, outbound=lambda ledger: Outbound(ledger, PREFILL_EPOCH, BLOCK), **settings
        )
        outbound = self.prefill.outbound
        assert outbound is not None
        self.outbound = outbound
        outbound.hello(DECODE_EPOCH, [KvEndpoint((0, 1), "127.0.0.1:1")])
        self.link = FakeLink(lambda: outbound, self.chance, faults)

        def inbound(cache: PrefixCache, ledger: Ledger) -> Inbound:
            cost, most = HandoffCost(0, 0), blocks[0] - 8
            return Inbound(cache, ledger, DECODE_EPOCH, [self.link], cost, lease_s=LEASE_S, max_reserved=most)

        self.decode = Bench(blocks[0], group=here, inbound=inbound, **settings)

    @property
    def sides(self) -> Sequence[Bench]:
        return self.decode, self.prefill

    @property
    def has_work(self) -> bool:
        return any(side.engine.has_work for side in self.sides) or any(link.calls for link in self.links)

    @property
    def links(self) -> list[FakeLink]:
        assert self.decode.inbound is not None
        return [link for link in self.decode.inbound.peers if isinstance(link, FakeLink)]

    def move(self) -> None:
        """Something happens on one side, on the way between both, or time passes."""
        side = self.chance.choice(self.sides)
        if side.engine.has_work:
            side.step()
        for link in self.links:
            link.move()
        for bench in self.sides:
            assert isinstance(bench.group, HandoffGroup)
            bench.group.move()
        self.clock.now += self.chance.random() * 0.5
        if self.chance.random() < 0.1:
            self.link.renew()

    def settle(self) -> None:
        """Goes on without faults until nothing is left to do."""
        self.link.faults = 0.0
        for bench in self.sides:
            assert isinstance(bench.group, HandoffGroup)
            bench.group.faults = 0.0
        for _ in range(4000):
            if not self.has_work:
                return
            self.move()
        raise AssertionError(f"still at work: {self.decode.engine.stats()}, {self.prefill.engine.stats()}")

    def check_idle(self) -> None:
        for bench in self.sides:
            bench.check_idle()
            assert isinstance(bench.group, HandoffGroup)
            assert not bench.group.fences and not bench.group.loading and not bench.group.pushes
        assert not self.link.tracked and State.COMPUTING not in [s.state for s in self.outbound.statuses([])]
