"""Two engines that hand prompts over. The state machines are real; ranks, links, pools and the clock are fakes.

Whoever drives a World says what happens next: a message or a chunk arrives, a rank works, an engine looks at the time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from headwise.runtime.handoff import receiving, sending
from headwise.runtime.handoff.errors import NotFoundError, RefusedError
from headwise.runtime.handoff.messages import TransferKey
from headwise.runtime.handoff.receiving import Cause, Receiving
from headwise.runtime.handoff.transfers import Order, Status, Transfers
from tests.runtime.handoff.fake_ranks import BLOCKS, RANKS, Attempt, Chunk, Content, Rank, Stranger, Wish

LEASE_S, RENEW_S, CALL_S, MEMORY_S = 30.0, 5.0, 4.0, 40.0
LIMIT = 3
SLOW = ("calls", "answers", "chunks", "rank 0", "rank 1", "prefill")
"""What :meth:`World.go_on` can leave for later."""


@dataclass(eq=False)
class Call:
    """An RPC of decode that waits for its answer."""

    sent: float
    done: Callable[[object], None]


@dataclass(frozen=True)
class Message:
    """A request if ``call`` is served, or else the answer to it. ``body`` is the answer, or what prefill does."""

    to_prefill: bool
    call: Call
    body: object


LOST = "no answer"


class Decode:
    """The engine that asks. ``owners`` says of every block who has it: an Attempt, a Wish, a Stranger."""

    def __init__(self, world: World, epoch: int) -> None:
        self.world, self.epoch = world, epoch
        self.owners: list[object] = [None] * BLOCKS
        self.ranks = [Rank(index, self.owners) for index in range(RANKS)]
        self.attempts: list[Attempt] = []
        self.calls: list[Call] = []
        self.renewed_at = 0.0
        self.fences = 0

    def take_blocks(self, count: int, owner: object) -> list[int] | None:
        free = [block for block, has in enumerate(self.owners) if has is None]
        if len(free) < count:
            return None
        for block in free[-count:]:
            self.owners[block] = owner
        return free[-count:]

    def give_blocks(self, blocks: list[int], owner: object) -> None:
        for block in blocks:
            assert self.owners[block] is owner
            self.owners[block] = None

    def ask(self, wish: Wish, number: int, prefill_epoch: int) -> None:
        """Starts an attempt, or computes the prompt if there is no room to receive it."""
        self.fences += 1
        machine = Receiving(LEASE_S, wish.deadline)
        attempt = Attempt(TransferKey(wish.transfer, number, self.epoch, prefill_epoch), wish, machine, [], self.fences)
        blocks = self.take_blocks(len(wish.prompt) - wish.first_block, attempt)
        if blocks is None:
            self.compute(wish)
            return
        attempt.blocks = blocks
        self.attempts.append(attempt)
        self.do(attempt, machine.start(self.world.now))

    def compute(self, wish: Wish) -> None:
        assert not wish.outcome
        wish.outcome = "computed"
        self.keep(wish, self.take_blocks(len(wish.prompt) - wish.first_block, wish) or [])
        for place, block in enumerate(wish.blocks, wish.first_block):
            for rank in self.ranks:
                rank.memory[block] = (wish.prompt[: place + 1], rank.index, True)

    def keep(self, wish: Wish, blocks: list[int]) -> None:
        wish.blocks = blocks
        for block in blocks:
            self.owners[block] = wish

    def call(self, serve: Callable[[Prefill, Callable[[object], None]], None], done: Callable[[object], None]) -> None:
        call = Call(self.world.now, done)
        self.calls.append(call)
        self.world.control.append(Message(True, call, serve))

    def do(self, attempt: Attempt, instructions: list[receiving.Instruction]) -> None:
        key, machine, world = attempt.key, attempt.machine, self.world
        for instruction in instructions:
            match instruction:
                case receiving.Open():
                    for rank in self.ranks:
                        rank.jobs.append(("open", attempt))
                case receiving.Ask():
                    self.call(lambda prefill, answer: prefill.prefill(attempt, answer), partial(self.answered, attempt))
                case receiving.Commit():
                    assert attempt.accepted and not self.fenced(attempt)
                    attempt.commit_waits_until = world.now + CALL_S
                    self.call(lambda prefill, answer: prefill.commit(key, answer), partial(self.committed, attempt))
                case receiving.Abort(reason) if not world.no_aborts:
                    self.call(partial(Prefill.abort, key=key, reason=reason), lambda answer: None)
                case receiving.Close():
                    for rank in self.ranks:
                        rank.jobs.append(("close", attempt))
                case receiving.Publish():
                    assert not attempt.wish.outcome and not attempt.wish.cancelled
                    assert not self.fenced(attempt)
                    attempt.wish.outcome = "published"
                    self.keep(attempt.wish, attempt.blocks)
                case receiving.Fallback(cause, _):
                    assert not attempt.wish.outcome and not attempt.wish.cancelled
                    world.causes[cause] += 1
                    if attempt.wish.spare:
                        attempt.wish.spare -= 1
                        self.ask(attempt.wish, key.attempt + 1, world.prefill.epoch)
                    else:
                        self.compute(attempt.wish)
                case receiving.Free():
                    self.give_blocks(attempt.blocks, attempt)
        assert (machine.state is receiving.State.ENDED) == (attempt not in self.owners), "blocks are kept, or not"

    def fenced(self, attempt: Attempt) -> bool:
        return any(attempt.fence in rank.fences for rank in self.ranks)

    def answered(self, attempt: Attempt, answer: object) -> None:
        cause = Cause.UNREACHABLE if answer == LOST else Cause.REFUSED if answer else None
        attempt.accepted = cause is None
        self.do(attempt, attempt.machine.answered(self.world.now, cause, str(answer)))

    def committed(self, attempt: Attempt, answer: object) -> None:
        sound, reason = None, LOST
        if isinstance(answer, Status):
            sound, reason = answer.state is sending.State.COMMITTED, answer.reason
        else:
            attempt.commit_waits_until = self.world.now + receiving.RETRY_S
        self.do(attempt, attempt.machine.committed(self.world.now, sound, reason))

    def renewed(self, attempts: list[Attempt], answer: object) -> None:
        for attempt, status in zip(attempts, answer if isinstance(answer, list) else [], strict=False):
            stands = status.state not in (None, sending.State.FAILED)
            self.do(attempt, attempt.machine.renewed(self.world.now, stands, status.reason))

    def take_result(self, rank: Rank) -> None:
        event, attempt, error = rank.results.popleft()
        attempt.reports[event] = attempt.reports.get(event, 0) + 1
        if error or attempt.reports[event] == RANKS:
            now, machine = self.world.now, attempt.machine
            if event == "closed":
                self.do(attempt, machine.closed(now))
            else:
                self.do(attempt, machine.opened(now, error) if event == "opened" else machine.filled(now, error))

    def tick(self) -> None:
        now = self.world.now
        for call in [call for call in self.calls if now >= call.sent + CALL_S]:
            self.calls.remove(call)
            call.done(LOST)
        for attempt in list(self.attempts):
            self.do(attempt, attempt.machine.tick(now))
            lease, state = attempt.machine.lease_until, attempt.machine.state
            assert lease is None or lease > now or state in (receiving.State.CLOSING, receiving.State.ENDED)
            assert state is not receiving.State.COMMITTING or attempt.commit_waits_until > now, "nothing is waited for"
        self.attempts = [one for one in self.attempts if one.machine.state is not receiving.State.ENDED]
        renewable = [attempt for attempt in self.attempts if attempt.machine.renewable]
        if renewable and now >= self.renewed_at + RENEW_S:
            self.renewed_at = now
            keys = [attempt.key for attempt in renewable]
            self.call(lambda prefill, answer: prefill.renew(keys, answer), partial(self.renewed, renewable))

    def cancel(self, wish: Wish) -> None:
        wish.cancelled = True
        for attempt in self.attempts:
            if attempt.wish is wish:
                self.do(attempt, attempt.machine.cancel(self.world.now))


@dataclass(eq=False)
class Running:
    """A request of prefill: what is asked for, and how many blocks of it are computed."""

    attempt: Attempt
    computed: int = 0


class Prefill:
    """The engine that computes."""

    def __init__(self, world: World, epoch: int) -> None:
        self.world, self.epoch = world, epoch
        self.transfers = Transfers(epoch, LIMIT, MEMORY_S)
        self.requests: dict[TransferKey, Running] = {}
        self.asked: dict[TransferKey, Attempt] = {}
        self.pushes: dict[int, tuple[TransferKey, int, set[Chunk]]] = {}  # with what is not answered
        self.commits: list[tuple[TransferKey, Callable[[object], None]]] = []
        self.sent: set[tuple[TransferKey, int]] = set()
        self.verified: set[TransferKey] = set()
        self.aborted: dict[TransferKey, float] = {}

    def prefill(self, attempt: Attempt, answer: Callable[[object], None]) -> None:
        wish, key, now = attempt.wish, attempt.key, self.world.now
        try:
            found = self.transfers.accept(
                key, repr(wish.prompt).encode(), len(wish.prompt), wish.first_block, now, LEASE_S, wish.deadline
            )
        except (NotFoundError, RefusedError) as refusal:
            answer(str(refusal))
            return
        if found.new:
            assert key not in self.asked, "one request for an attempt"
            assert key.prefill_epoch == self.epoch
            assert self.aborted.get(key, -MEMORY_S) + MEMORY_S <= now, "an abort has come before"
            self.asked[key] = attempt
            self.requests[key] = Running(attempt)
        assert self.transfers.running <= LIMIT
        going = [self.state(one) in (sending.State.COMPUTING, sending.State.PUSHED) for one in self.of(key.transfer)]
        assert sum(going) <= 1, "one attempt of a transfer at a time"
        self.do(found.orders)
        answer("")

    def commit(self, key: TransferKey, answer: Callable[[object], None]) -> None:
        self.commits.append((key, answer))
        self.do(self.transfers.commit(key, self.world.now))

    def renew(self, keys: list[TransferKey], answer: Callable[[object], None]) -> None:
        answer([self.transfers.renew(key, self.world.now, LEASE_S) for key in keys])

    def abort(self, answer: Callable[[object], None], key: TransferKey, reason: str) -> None:
        self.aborted.setdefault(key, self.world.now)
        self.do(self.transfers.abort(key, reason, self.world.now))
        answer("")

    def sweep(self) -> None:
        self.do(self.transfers.sweep(self.world.now))
        for key in self.asked:
            running = self.transfers.get(key)
            assert running is None or running.lease_until > self.world.now

    def compute(self, key: TransferKey) -> None:
        """The next block, and after the last the end of the request."""
        request, wish = self.requests[key], self.requests[key].attempt.wish
        machine = self.transfers.get(key)
        assert machine is not None and not machine.over, "a request goes on whose attempt is over"
        request.computed += 1
        if request.computed <= len(wish.prompt):
            self.do([(key, order) for order in machine.computed(request.computed)])
        elif request.computed > len(wish.prompt) + 1:  # the last step takes a while
            del self.requests[key]
            if wish.sound:
                self.verified.add(key)
            self.do([(key, order) for order in (machine.verified() if wish.sound else machine.failed("NaN"))])

    def do(self, orders: list[Order]) -> None:
        for key, instruction in orders:
            match instruction:
                case sending.Push(first, count):
                    self.push(key, first, count)
                case sending.Stop():
                    for number in [number for number, (of, _, _) in self.pushes.items() if of == key]:
                        self.pushed(number, "stopped")
                case sending.End():
                    self.requests.pop(key, None)
                case sending.Answer():
                    state = self.transfers.status(key).state
                    assert state is not sending.State.COMMITTED or key in self.verified
                    for one in [one for one in self.commits if one[0] == key]:
                        self.commits.remove(one)
                        one[1](self.transfers.status(key))

    def push(self, key: TransferKey, first: int, count: int) -> None:
        attempt, number = self.asked[key], self.world.count()
        wish = attempt.wish
        places = {(key, place) for place in range(first, first + count)}
        assert first >= wish.first_block and not places & self.sent, "a block is sent once, if decode has not got it"
        self.sent |= places
        chunks = [
            Chunk(key, attempt.fence, rank, place - wish.first_block, self.content(wish, place, rank), number)
            for place in range(first, first + count)
            for rank in range(RANKS)
        ]
        self.pushes[number] = (key, count, set(chunks))
        self.world.data.extend(chunks)

    def content(self, wish: Wish, place: int, rank: int) -> Content:
        return (wish.prompt[: place + 1], rank, wish.sound or place + 1 < len(wish.prompt))

    def chunk_done(self, chunk: Chunk, error: str) -> None:
        if chunk.push in self.pushes:
            missing = self.pushes[chunk.push][2]
            missing.discard(chunk)
            if error or not missing:
                self.pushed(chunk.push, error)

    def pushed(self, number: int, error: str) -> None:
        key, count, _ = self.pushes.pop(number)
        if (machine := self.transfers.get(key)) is not None:
            self.do([(key, order) for order in machine.pushed(count, error)])

    def check(self) -> None:
        """What runs is of attempts that are not over, and nothing runs of those that only wait for Commit."""
        for number, (key, _, _) in self.pushes.items():
            assert self.state(key) is sending.State.COMPUTING, number
        for key in self.requests:
            assert self.state(key) is sending.State.COMPUTING
        for key, _ in self.commits:
            assert self.state(key) is sending.State.COMPUTING, "a Commit waits that could be answered"

    def of(self, transfer: bytes) -> list[TransferKey]:
        return [key for key in self.asked if key.transfer == transfer]

    def state(self, key: TransferKey) -> sending.State | None:
        return self.transfers.status(key).state


class World:
    """Both engines and what is between them.

    Attributes:
        lose_each, repeat_each: of so many messages one is lost, or comes twice; 0 is none.
        no_aborts: each Abort is lost.
    """

    def __init__(self, lose_each: int = 0, repeat_each: int = 0, no_aborts: bool = False) -> None:
        self.lose_each, self.repeat_each, self.no_aborts = lose_each, repeat_each, no_aborts
        self.now = 0.0
        self.numbers = 0
        self.control: list[Message] = []
        self.data: list[Chunk] = []
        self.wishes: list[Wish] = []
        self.causes: dict[Cause, int] = dict.fromkeys(Cause, 0)
        self.decode, self.prefill = Decode(self, 1), Prefill(self, 1)
        self.prefill_up = True
        self.paused: set[str] = set()
        self.slow: set[str] = set()

    def count(self) -> int:
        self.numbers += 1
        return self.numbers

    def deliver(self, message: Message) -> None:
        """A message arrives, whether or not it will again."""
        if message.to_prefill:
            if self.prefill_up:
                assert callable(message.body)
                message.body(self.prefill, lambda body: self.control.append(Message(False, message.call, body)))
            else:
                self.control.append(Message(False, message.call, LOST))
        elif message.call in self.decode.calls:
            self.decode.calls.remove(message.call)
            message.call.done(message.body)

    def deliver_chunk(self, chunk: Chunk) -> None:
        error = self.decode.ranks[chunk.rank].take(chunk)
        if self.prefill_up:
            self.prefill.chunk_done(chunk, error)

    def deliverable(self) -> list[Message]:
        return [one for one in self.control if ("prefill" if one.to_prefill else "decode") not in self.paused]

    def wish(self, wish: Wish, stale: bool = False) -> None:
        self.wishes.append(wish)
        self.decode.ask(wish, 1, self.prefill.epoch - stale)

    def damage(self, chunk: Chunk) -> None:
        self.data[self.data.index(chunk)] = replace(chunk, damaged=True)

    def takeable(self) -> list[Rank]:
        return [] if "decode" in self.paused else [rank for rank in self.decode.ranks if rank.results]

    def computable(self) -> list[TransferKey]:
        return list(self.prefill.requests) if self.prefill_up and "prefill" not in self.paused else []

    def cancel(self, wish: Wish) -> None:
        """Somebody who has not got the prompt wants it no more."""
        if "decode" not in self.paused and not wish.outcome:
            self.decode.cancel(wish)

    def evict(self, wish: Wish) -> None:
        self.decode.give_blocks(wish.blocks, wish)
        wish.blocks = []

    def lend(self, count: int) -> None:
        """A stranger uses free blocks for a while, and whoever used some before gives them back."""
        for stranger in [owner for owner in self.decode.owners if isinstance(owner, Stranger)]:
            self.decode.give_blocks(stranger.blocks, stranger)
            stranger.blocks = []
        stranger = Stranger()
        stranger.blocks = self.decode.take_blocks(count, stranger) or []
        for rank in self.decode.ranks:
            for block in stranger.blocks:
                rank.memory[block] = None

    def kill_prefill(self) -> None:
        self.prefill_up = False

    def start_prefill(self) -> None:
        self.prefill = Prefill(self, self.prefill.epoch + 1)
        self.prefill_up = True

    def restart_decode(self) -> None:
        """What it had on its ranks is gone, and what was asked of it is asked no more."""
        self.decode = Decode(self, self.decode.epoch + 1)
        self.wishes.clear()

    def go_on(self, seconds: float = 0.2) -> None:
        """A bit of everything, in order, where nothing is in the way; it takes so long."""
        self.now += seconds
        for message in self.deliverable()[:4]:
            if ("calls" if message.to_prefill else "answers") not in self.slow:
                number = self.count()
                if not self.repeat_each or number % self.repeat_each:
                    self.control.remove(message)
                if not self.lose_each or number % self.lose_each:
                    self.deliver(message)
        for chunk in self.data[:8] if "chunks" not in self.slow else []:
            self.data.remove(chunk)
            self.deliver_chunk(chunk)
        for rank in self.decode.ranks:
            if rank.jobs and f"rank {rank.index}" not in self.slow:
                rank.run()
        for rank in self.takeable():
            self.decode.take_result(rank)
        for key in self.computable() if "prefill" not in self.slow else []:
            if key in self.prefill.requests:
                self.prefill.compute(key)
        if self.count() % 2:
            self.look()

    def look(self) -> None:
        """Each engine that runs looks at the time."""
        if "decode" not in self.paused:
            self.decode.tick()
        if self.prefill_up and "prefill" not in self.paused:
            self.prefill.sweep()

    def settle(self) -> None:
        """Nothing goes wrong any more, and time passes; then nothing may be left."""
        self.paused.clear()
        self.slow.clear()
        self.lose_each = self.repeat_each = 0
        if not self.prefill_up:
            self.start_prefill()
        for _ in range(120):
            self.go_on(1.0)
        assert not self.control and not self.data and not self.decode.calls
        assert not self.decode.attempts
        assert not any(rank.fences or rank.jobs or rank.results for rank in self.decode.ranks)
        assert not any(isinstance(owner, Attempt) for owner in self.decode.owners)
        assert len(self.prefill.transfers) == 0
        assert not self.prefill.requests and not self.prefill.pushes and not self.prefill.commits
        assert all(wish.outcome or wish.cancelled for wish in self.wishes)

    def check(self) -> None:
        """Whoever has a prompt reads on every rank what belongs there."""
        if self.prefill_up:
            self.prefill.check()
        for block, owner in enumerate(self.decode.owners):
            assert not isinstance(owner, Stranger) or all(rank.memory[block] is None for rank in self.decode.ranks)
        for wish in self.wishes:
            for place, block in enumerate(wish.blocks, wish.first_block):
                assert self.decode.owners[block] is wish
                for rank in self.decode.ranks:
                    assert rank.memory[block] == (wish.prompt[: place + 1], rank.index, True), wish
