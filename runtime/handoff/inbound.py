"""Inbound: decode's side of handoffs. Blocks are reserved, a prefill engine is asked to fill them, and once every byte
is there they are cached like any other computed block.

All of it runs on the engine's thread. What comes from other threads, the answers of prefill engines, waits in a queue
until the next :meth:`Inbound.pump`.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from headwise.runtime.handoff.choice import HandoffCost, Prompt
from headwise.runtime.handoff.choice import Peer as KnownPeer
from headwise.runtime.handoff.link import Answer
from headwise.runtime.handoff.messages import Ask, Status, TransferKey
from headwise.runtime.handoff.messages import State as StateThere
from headwise.runtime.handoff.peer import Peer
from headwise.runtime.handoff.receiving import (
    Abort,
    Cause,
    Close,
    Commit,
    Fallback,
    Free,
    Instruction,
    Open,
    Publish,
    Receiving,
)
from headwise.runtime.handoff.receiving import Ask as AskPeer
from headwise.runtime.kv.arrivals import cache_arrivals
from headwise.runtime.kv.blocks import Use
from headwise.runtime.kv.eviction import CachedBlock, Chain
from headwise.runtime.kv.identity import TokenBlocks
from headwise.runtime.kv.ledger import Ledger, Outcome
from headwise.runtime.kv.prefix_cache import PrefixCache
from headwise.runtime.kv.windows import ENDLESS
from headwise.workers.kv.handoff import TICKET_BYTES, TRANSFER_BYTES, Fence, HandoffJob, HandoffOp

_logger = logging.getLogger(__name__)

MAX_PROMPT_S = 3600.0
"""Seconds after which a prefill engine need not go on with a prompt, however often its lease was renewed."""


class LocalLoad(NamedTuple):
    """What a prompt that is computed here has to wait for, and would hold up.

    Attributes:
        queued_tokens: of prompts that are being computed.
        streams: whether requests run whose tokens are read as they come.
    """

    queued_tokens: int = 0
    streams: bool = False


class Chosen(NamedTuple):
    """Who is to compute a prompt, and what was known of both."""

    peer: Peer
    known: KnownPeer
    prompt: Prompt


@dataclass(slots=True)
class Arrival:
    """What became of a handoff.

    Attributes:
        num_blocks: that are cached now.
        peer: who computed them.
        failure: the cause if there are none, which a client may hear; empty if there are.
    """

    num_blocks: int
    peer: str
    failure: str = ""


@dataclass(slots=True, eq=False)
class Handoff:
    """One prompt on its way here.

    Attributes:
        blocks: the prompt's.
        chain: the cached blocks that hold its first tokens; held until the end, as ``memory`` is.
        memory: the device blocks that are filled.
        done: told once, what became of it, unless it is cancelled.
    """

    chosen: Chosen
    key: TransferKey
    fence: Fence
    blocks: TokenBlocks
    chain: Chain
    memory: list[int]
    tenant: str
    done: Callable[[Arrival], None]
    machine: Receiving
    started: float

    @property
    def peer(self) -> Peer:
        return self.chosen.peer


class Inbound:
    """The handoffs of one generation of an engine that has others compute prompts.

    Attributes:
        peers: the prefill engines; see :meth:`use`.
        cost: decides whether a prompt is handed over, and to whom.
        must_succeed: whether a request whose handoff fails is to fail, too, and is not computed here.
        max_tokens: longer texts, such as one without end that was preempted, are computed here.
    """

    def __init__(
        self,
        cache: PrefixCache,
        ledger: Ledger,
        epoch: int,
        peers: Sequence[Peer],
        cost: HandoffCost,
        *,
        lease_s: float,
        max_reserved: int,
        max_tokens: int = ENDLESS,
        must_succeed: bool = False,
        meet_s: float = 0.0,
    ) -> None:
        """
        Args:
            max_reserved: most blocks that may be reserved at once, so that running requests find room.
            meet_s: how long prompts that must not be computed here wait for the first peer to be connected.
        """
        self.peers, self.cost, self.must_succeed, self.max_tokens = peers, cost, must_succeed, max_tokens
        self._leaving: list[Peer] = []
        self._cache, self._ledger, self._epoch = cache, ledger, epoch
        self._lease_s, self._max_reserved = lease_s, max_reserved
        self._running: dict[int, Handoff] = {}  # by the fence's number
        self._reserved = 0
        self._meet_by = time.monotonic() + meet_s if meet_s else -math.inf
        self._somebody_waits = False
        self._next_fence = 0
        self._events: SimpleQueue[Callable[[float], None]] = SimpleQueue()
        self._counts: Counter[str] = Counter()
        self._seconds = 0.0
        self.on_event: Callable[[], None] = lambda: None
        """Wakes the engine; called on any thread when there is something to pump."""

    @property
    def busy(self) -> bool:
        """Whether a handoff is on its way, or its blocks wait to be free; or a prompt waits for peers."""
        return bool(self._running) or (self._somebody_waits and self._meets)

    def use(self, peers: Sequence[Peer]) -> None:
        """Asks these prefill engines from now on, and leaves others once what they have begun is over."""
        self._leaving = [peer for peer in (*self.peers, *self._leaving) if peer not in peers]
        self.peers = peers
        self._leave()

    def choose(self, blocks: TokenBlocks, num_tokens: int, first: int, stop: int, load: LocalLoad) -> Chosen | None:
        """Who is to compute a prompt's blocks from ``first`` to ``stop``; None if they are better computed here."""
        prompt, known = self._prompt(blocks, num_tokens, first, stop), self._known(stop)
        chosen = self.cost.choose(prompt, known, load.queued_tokens, load.streams)
        if chosen is None or self.has_room(stop - first):
            self.cost.pass_over(known, chosen)
        if chosen is None:
            return None
        return Chosen(next(peer for peer in self.peers if peer.name == chosen.address), chosen, prompt)

    def awaits_peers(self, blocks: TokenBlocks, num_tokens: int, first: int, stop: int) -> bool:
        """Whether a prompt that nobody was chosen for, and that must not be computed here, is to wait until peers are
        connected, which they were not yet."""
        prompt = self._prompt(blocks, num_tokens, first, stop)
        waits = self.must_succeed and self._meets and self.cost.is_handed_over(prompt)
        self._somebody_waits |= waits
        return waits

    def forbids(self, blocks: TokenBlocks, num_tokens: int, first: int, stop: int) -> str:
        """Why a prompt that nobody was chosen for must not be computed here; empty if it may be."""
        prompt = self._prompt(blocks, num_tokens, first, stop)
        if not self.must_succeed or not self.cost.is_handed_over(prompt) or self._known(stop):
            return ""
        return "no engine that computes prompts can be reached, or takes another one of this length"

    def has_room(self, num_blocks: int) -> bool:
        """Whether so many blocks may be reserved now. If not, handoffs are on their way, and will be over."""
        return not self._running or self._reserved + num_blocks <= self._max_reserved

    def start(
        self,
        chosen: Chosen,
        blocks: TokenBlocks,
        chain: Sequence[CachedBlock | None],
        stop: int,
        tenant: str,
        done: Callable[[Arrival], None],
    ) -> Handoff:
        """Reserves blocks for what a prompt has after ``chain``, up to its block ``stop``, and has them filled.

        Raises:
            OutOfBlocksError: the device has no room for them; nothing is started.
        """
        self._cache.hold(chain, Use.TRANSFER)
        try:
            memory = self._cache.allocate(stop - len(chain), Use.TRANSFER, blocks.owner)
        except BaseException:
            self._cache.release(chain, Use.TRANSFER)
            raise
        session = chosen.peer.session
        transfer = secrets.token_bytes(TRANSFER_BYTES)
        fence = Fence(transfer, 1, self._epoch, self._next_fence, secrets.token_bytes(TICKET_BYTES))
        key = TransferKey(transfer, 1, self._epoch, session.epoch if session is not None else 0)
        machine = Receiving(self._lease_s, None)
        now = time.monotonic()
        handoff = Handoff(chosen, key, fence, blocks, list(chain), memory, tenant, done, machine, now)
        self._running[fence.number] = handoff
        self._next_fence += 1
        self._reserved += len(memory)
        self._counts["started"] += 1
        self._follow(handoff, machine.start(now))
        return handoff

    def cancel(self, handoff: Handoff) -> None:
        """Nobody wants the prompt any more; ``done`` is not told."""
        self._follow(handoff, handoff.machine.cancel(time.monotonic()))

    def pump(self) -> None:
        """Takes note of what prefill engines have answered, and of the time. Called once a step."""
        now = time.monotonic()
        while True:
            try:
                event = self._events.get_nowait()
            except Empty:
                break
            event(now)
        for handoff in list(self._running.values()):
            if handoff.machine.renewable and not _is_there(handoff):
                self._follow(handoff, handoff.machine.renewed(now, False, "the connection was lost"))
            self._follow(handoff, handoff.machine.tick(now))
        if self._leaving:
            self._leave()

    def stats(self) -> dict[str, Any]:
        """Counts since the start: handoffs ``started``, ``committed``, ``cancelled``, and ``fallbacks``, prompts that
        were computed here after all, which ``causes`` has by cause; ``bytes``, ``blocks`` and prompt ``tokens`` that
        came, and ``seconds`` from the start of those handoffs to their end. What computing and handing over took
        lately: ``cost_s``. And what holds now: ``in_flight``, ``reserved_blocks``, ``oldest_s``, and of each peer
        whether it is ``connected`` or what the ``problem`` is."""
        oldest = min((handoff.started for handoff in self._running.values()), default=None)
        causes = {cause.value: self._counts[cause.value] for cause in Cause if cause is not Cause.CANCELLED}
        return {
            "role": "decode",
            **{name: self._counts[name] for name in ("started", "committed", "cancelled", "fallbacks")},
            "causes": causes,
            **{name: self._counts[name] for name in ("bytes", "blocks")},
            "tokens": self._counts["blocks"] * self._cache.block_size,
            "seconds": self._seconds,
            "cost_s": self.cost.stats(),
            "in_flight": len(self._running),
            "reserved_blocks": self._reserved,
            "oldest_s": 0.0 if oldest is None else time.monotonic() - oldest,
            "peers": {
                peer.name: {"connected": peer.session is not None, "problem": peer.problem} for peer in self.peers
            },
        }

    def abandon(self) -> None:
        """The ranks are dead, and nobody waits for a handoff any more. The prefill engines are told."""
        for handoff in self._running.values():
            handoff.peer.untrack(handoff.key)
            handoff.peer.abort(handoff.key, "the shard group of decode died")
            self._counts["cancelled"] += 1
        self._running.clear()
        self._reserved = 0

    def count_on(self, before: Inbound) -> None:
        """Counts go on from those of the generation before, and what handoffs took is known from it."""
        self._counts.update(before._counts)
        self._seconds += before._seconds
        self.cost = before.cost

    def close(self) -> None:
        """Leaves the prefill engines, once the engine's thread has ended or uses another generation. Idempotent."""
        for peer in (*self.peers, *self._leaving):
            peer.close()

    def _leave(self) -> None:
        """Ends the connections that no handoff needs any more, on threads of their own: that may take a while."""
        used = [handoff.peer for handoff in self._running.values()]
        for peer in [peer for peer in self._leaving if peer not in used]:
            self._leaving.remove(peer)
            threading.Thread(target=peer.close, name="headwise-leave", daemon=True).start()

    @property
    def _meets(self) -> bool:
        return time.monotonic() < self._meet_by and all(peer.session is None for peer in self.peers)

    def _prompt(self, blocks: TokenBlocks, num_tokens: int, first: int, stop: int) -> Prompt:
        size = self._cache.block_size
        return Prompt(num_tokens, first * size, blocks.digests[:stop], size)

    def _known(self, num_blocks: int) -> list[KnownPeer]:
        """The peers that can be reached and take another prompt, of so many blocks."""
        size = self._cache.block_size
        known: dict[str, KnownPeer] = {}
        asked: Counter[str] = Counter()  # more than a peer has told of, as a rule, when many prompts come at once
        count: Counter[str] = Counter()
        for handoff in self._running.values():
            asked[handoff.peer.name] += len(handoff.memory) * size
            count[handoff.peer.name] += 1
        for peer in self.peers:
            session, load = peer.session, peer.load
            if session is None or count[peer.name] >= session.max_transfers:
                continue
            if session.max_tokens >= num_blocks * size:
                queued = max(load.queued_tokens, asked[peer.name])
                known[peer.name] = KnownPeer(peer.name, queued, load.token_s, peer.digests)
        return list(known.values())

    def _follow(self, handoff: Handoff, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Open():
                    self._open(handoff)
                case AskPeer():
                    self._ask(handoff)
                case Commit():
                    handoff.peer.commit(handoff.key, partial(self._post, handoff, _committed))
                case Publish():
                    self._publish(handoff)
                case Abort(reason):
                    handoff.peer.abort(handoff.key, reason)
                case Close():
                    handoff.peer.untrack(handoff.key)
                    self._hand_over(handoff, HandoffOp.CLOSE, lambda outcome: self._on(handoff, _closed))
                    if handoff.machine.cause is Cause.CANCELLED:
                        self._counts["cancelled"] += 1
                case Fallback(cause, reason):
                    self._counts["fallbacks"] += 1
                    self._counts[cause.value] += 1
                    if _is_there(handoff):  # else it is not chosen before it is back, and may be another then
                        seconds = time.monotonic() - handoff.started
                        self.cost.saw_failure(handoff.chosen.prompt, handoff.chosen.known, seconds)
                    _logger.info("a handoff from %s failed: %s: %s", handoff.peer.name, cause, reason)
                    handoff.done(Arrival(0, handoff.peer.name, cause))
                case Free():
                    self._cache_arrivals(handoff, sound=False)
                    self._forget(handoff)

    def _open(self, handoff: Handoff) -> None:
        session = handoff.peer.session
        if session is None:
            self._on(handoff, lambda machine, now: machine.opened(now, "the prefill engine is not connected"))
            return
        job = HandoffJob(0, HandoffOp.OPEN, handoff.fence, handoff.memory, sources=list(session.ranks))
        self._ledger.hand_over(job, partial(self._opened, handoff))

    def _opened(self, handoff: Handoff, outcome: Outcome) -> None:
        self._on(handoff, lambda machine, now: machine.opened(now, outcome.error))
        if not outcome.error:
            self._hand_over(handoff, HandoffOp.FILL, partial(self._filled, handoff), partial(self._broken, handoff))

    def _broken(self, handoff: Handoff, error: str) -> None:
        """One rank gets no more; what the others still get is of no use."""
        self._on(handoff, lambda machine, now: machine.filled(now, error))

    def _filled(self, handoff: Handoff, outcome: Outcome) -> None:
        if not outcome.error:
            self._counts["bytes"] += outcome.num_bytes
            self._on(handoff, lambda machine, now: machine.filled(now))

    def _ask(self, handoff: Handoff) -> None:
        session = handoff.peer.session
        if session is None or session.epoch != handoff.key.prefill_epoch:
            self._on(handoff, lambda machine, now: machine.answered(now, Cause.UNREACHABLE, "the connection was lost"))
            return
        first = len(handoff.chain)
        ask = Ask(
            key=handoff.key,
            fence=handoff.fence.number,
            ticket=handoff.fence.ticket,
            token_ids=handoff.blocks.tokens(first + len(handoff.memory)),
            first_block=first,
            namespace=handoff.blocks.namespace,
            owner=handoff.blocks.owner,
            tenant=handoff.tenant,
            deadline_s=MAX_PROMPT_S,
            lease_s=self._lease_s,
        )
        handoff.peer.ask(ask, partial(self._post, handoff, _answered))
        handoff.peer.track(handoff.key, lambda key, status: self._post(handoff, _renewed, status))

    def _publish(self, handoff: Handoff) -> None:
        handoff.peer.untrack(handoff.key)
        arrived = self._cache_arrivals(handoff, sound=True)
        seconds = time.monotonic() - handoff.started
        self._counts["committed"] += 1
        self._counts["blocks"] += arrived
        self._seconds += seconds
        self.cost.saw_handoff(handoff.chosen.prompt, handoff.chosen.known, seconds)
        self._forget(handoff)
        handoff.done(Arrival(arrived, handoff.peer.name))

    def _cache_arrivals(self, handoff: Handoff, sound: bool) -> int:
        """Returns how many blocks are cached."""
        chain, memory = handoff.chain, handoff.memory
        indices = range(len(chain), len(chain) + len(memory))
        return len(cache_arrivals(self._cache, handoff.blocks, chain, indices, memory, [sound] * len(memory)))

    def _forget(self, handoff: Handoff) -> None:
        del self._running[handoff.fence.number]
        self._reserved -= len(handoff.memory)

    def _hand_over(
        self,
        handoff: Handoff,
        op: HandoffOp,
        done: Callable[[Outcome], None],
        on_error: Callable[[str], None] | None = None,
    ) -> None:
        self._ledger.hand_over(HandoffJob(0, op, handoff.fence), done, on_error)

    def _on(self, handoff: Handoff, event: Callable[[Receiving, float], list[Instruction]]) -> None:
        self._follow(handoff, event(handoff.machine, time.monotonic()))

    def _post(self, handoff: Handoff, read: Callable[[Receiving, float, Any], list[Instruction]], answer: Any) -> None:
        """Called on any thread."""
        self._events.put(lambda now: self._follow(handoff, read(handoff.machine, now, answer)))
        self.on_event()


def _is_there(handoff: Handoff) -> bool:
    """Whether the engine that was asked is still connected. If it comes back later it may have lost the prompt."""
    session = handoff.peer.session
    return session is not None and session.epoch == handoff.key.prefill_epoch


def _answered(machine: Receiving, now: float, answer: Answer) -> list[Instruction]:
    if answer.cause is None:
        return machine.answered(now)
    return machine.answered(now, _CAUSES.get(answer.cause, answer.cause), answer.detail)


_CAUSES = {
    # What a peer says that does not know this engine any more.
    Cause.LEASE: Cause.PEER,
    # By the link or by the peer, and not by whoever wants the prompt.
    Cause.CANCELLED: Cause.UNREACHABLE,
}


def _committed(machine: Receiving, now: float, answer: Answer) -> list[Instruction]:
    if answer.status is not None:
        return machine.committed(now, answer.status.state is StateThere.COMMITTED, answer.status.reason)
    no_answer = answer.cause in (Cause.UNREACHABLE, Cause.CANCELLED)
    return machine.committed(now, None if no_answer else False, answer.detail)


def _renewed(machine: Receiving, now: float, status: Status | None) -> list[Instruction]:
    if status is None:  # no answer
        return []
    gone = status.state in (StateThere.UNKNOWN, StateThere.FAILED)
    return machine.renewed(now, not gone, status.reason or "the prefill engine does not know the transfer")


def _closed(machine: Receiving, now: float) -> list[Instruction]:
    return machine.closed(now)
