"""BlockTables: every request's blocks; which it found, which it computes itself, and which others may use."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from headwise.runtime.engine.request import Request, Seat, seat_of
from headwise.runtime.handoff.inbound import Arrival, Handoff, Inbound, LocalLoad
from headwise.runtime.kv.blocks import Use
from headwise.runtime.kv.eviction import CachedBlock
from headwise.runtime.kv.prefix_cache import PrefixCache
from headwise.runtime.kv.tier_index import TierBlock
from headwise.runtime.kv.tiers import Tiers


class Admission(enum.Enum):
    """What came of a waiting request's turn.

    SEATED: it has a seat. LATER: it waits for blocks that others compute, or that are brought for it from a tier or
    another engine, and the requests behind it may go first. ROOM_SOON: the blocks that it displaces are being saved;
    nobody needs to give up blocks for it, and the requests behind it would take its room. NO_ROOM: others hold the
    blocks that it needs.
    """

    SEATED = enum.auto()
    LATER = enum.auto()
    ROOM_SOON = enum.auto()
    NO_ROOM = enum.auto()


@dataclass(slots=True)
class _Search:
    """What a waiting request has found so far.

    Attributes:
        chain: the cached blocks that held its first tokens when it last looked; not held, so a guess by now.
        awaits: the digest of a block that another request computes or restores.
        restoring: blocks are on their way to the device for the request, from the tiers or from another engine.
        came_short: not all of them arrived from the tiers; the request computes what is missing.
        handoff: the blocks are on their way from another engine.
        was_handed_over: they were once, and whatever came of it, the request computes the rest itself.
        reserve: how many blocks it waits to reserve for them; 0 if it does not wait for that.
    """

    chain: list[CachedBlock] = field(default_factory=list)
    awaits: bytes | None = None
    restoring: bool = False
    came_short: bool = False
    handoff: Handoff | None = None
    was_handed_over: bool = False
    reserve: int = 0


class BlockTables:
    """Gives requests their seats' blocks and takes them back. Only the scheduler calls it.

    Attributes:
        load: tells what the engine has to compute; set by whoever schedules.
        failed: requests that are to end, and why: their blocks were to come from another engine, and did not.
    """

    def __init__(self, cache: PrefixCache, tiers: Tiers | None = None, inbound: Inbound | None = None) -> None:
        self.cache, self.tiers, self.inbound = cache, tiers, inbound
        self.load: Callable[[], LocalLoad] = LocalLoad
        self.failed: list[tuple[Request, str]] = []
        self.block_size = cache.block_size
        self._searches: dict[Request, _Search] = {}  # of requests that wait
        self._coming: dict[bytes, Request] = {}  # blocks not cached yet, and who computes or restores each
        self._somebody_waits = False  # for room to reserve blocks, in this round

    def begin_round(self) -> None:
        """The waiting requests have their turns, the first of them next."""
        self._somebody_waits = False

    def admit(self, request: Request, row: int, alone: bool = False) -> Admission:
        """Gives a request a seat, if it can have one now, with blocks for all its tokens and the next one. Its first
        blocks come from the cache where they are there; at least one token is left to compute.

        Args:
            alone: no other request is computed meanwhile, so that there is none to wait for.
        """
        search = self._searches.get(request) or self._searches.setdefault(request, _Search())
        if search.restoring or (search.awaits is not None and self._is_coming(search.awaits, alone)):
            return Admission.LATER
        if self.inbound is not None and search.reserve and not self._may_reserve(self.inbound, search.reserve):
            return Admission.LATER
        limit = self._match(request, search.chain)
        if self._waits_for_another(request, search, limit, alone):
            return Admission.LATER
        chain = search.chain
        # For all tokens at once, so that no prefill is preempted half-way by a later one.
        missing = self._blocks_for(request.num_tokens + 1) - len(chain)
        if missing > self.cache.num_available - self.cache.num_idle_in(chain):
            return Admission.NO_ROOM
        self.cache.hold(chain, Use.COMPUTE)
        if self.tiers is not None and (answer := self._ask_tiers(request, search, limit, missing)) is not None:
            self.cache.release(chain, Use.COMPUTE)
            return answer
        asks = self.inbound is not None and (not alone or self.inbound.must_succeed)  # others wait for who is alone
        if asks and self.inbound is not None and self._is_handed_over(self.inbound, request, search, limit):
            self.cache.release(chain, Use.COMPUTE)
            return Admission.LATER
        del self._searches[request]
        self._seat(request, row, chain, missing)
        return Admission.SEATED

    def forget(self, request: Request) -> None:
        """A waiting request has ended."""
        search = self._searches.pop(request, None)
        if search is not None and search.handoff is not None and self.inbound is not None:
            self._has_come(request, search.handoff.blocks.digests)
            self.inbound.cancel(search.handoff)

    def missing(self, seat: Seat, num_tokens: int) -> int:
        """How many blocks more a seat needs for so many tokens; not above 0 if none."""
        return self._blocks_for(num_tokens) - len(seat.block_ids)

    def grow(self, seat: Seat, num_tokens: int) -> list[int]:
        """Makes the table long enough for so many tokens; returns the new blocks.

        Raises:
            OutOfBlocksError: there is no room.
        """
        new = self.cache.allocate(max(0, self.missing(seat, num_tokens)), Use.COMPUTE, _owner(seat.request))
        seat.block_ids += new
        seat.num_slots = len(seat.block_ids) * self.block_size
        return new

    def publish(self, request: Request, num_tokens: int) -> None:
        """Caches the full blocks of a request's first ``num_tokens``: a finite token was sampled after them, so their
        keys and values are verified."""
        seat, blocks = seat_of(request), request.token_blocks
        # Of a request that was aborted, the tokens that were in flight stay unknown.
        known = len(request.prompt_token_ids) + len(request.generated)
        full = min(num_tokens, known) // self.block_size
        if blocks is None or full <= seat.num_offered:
            return
        self._read_tokens(request)
        self._stops_computing(request, seat.num_offered, full)
        seat.num_offered = full
        for index in range(len(seat.chain), full):
            own = seat.block_ids[index]
            node = self.cache.insert(blocks, index, seat.chain[-1] if seat.chain else None, own)
            if node is None:
                break
            if node.block != own:
                self.cache.hold([node], Use.COMPUTE)
            seat.chain.append(node)

    def leave(self, request: Request) -> None:
        """Takes a request's blocks back, the last first, and its seat."""
        seat = seat_of(request)
        self._stops_computing(request, seat.num_offered, self._num_known_blocks(request))
        for index in reversed(range(len(seat.block_ids))):
            own, node = seat.block_ids[index], seat.chain[index] if index < len(seat.chain) else None
            if node is not None and node.block != own:
                self.cache.release_block(own, Use.COMPUTE, None)
                self.cache.release_block(node.block, Use.COMPUTE, node)
            else:
                self.cache.release_block(own, Use.COMPUTE, node)
        request.seat = None

    def computing(self, requests: Iterable[Request]) -> list[int]:
        """The blocks that these requests hold, once for each hold."""
        held: list[int] = []
        for request in requests:
            seat = seat_of(request)
            held += seat.block_ids
            held += [n.block for n, own in zip(seat.chain, seat.block_ids, strict=False) if n.block != own]
        return held

    @property
    def changes(self) -> int:
        """Counts what changed in the books."""
        return self.cache.pool.changes + (self.tiers.books.changes if self.tiers is not None else 0)

    def checks(self, requests: Iterable[Request]) -> Iterator[None]:
        """Checks the books in parts; void if anything changes before the last one.

        Args:
            requests: all that have a seat.

        Raises:
            IntegrityError: the books do not agree with each other, or with what the requests hold.
        """
        yield from self.cache.checks(self.computing(requests))
        if self.tiers is not None:
            yield from self.tiers.books.checks()

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _match(self, request: Request, chain: list[CachedBlock]) -> int:
        """Finds a request's chain; returns how long it may be at most."""
        if request.token_blocks is None:
            return 0
        self._read_tokens(request)
        limit = (request.num_tokens - 1) // self.block_size
        self.cache.match(request.token_blocks, limit, chain)
        return limit

    def _waits_for_another(self, request: Request, search: _Search, limit: int, alone: bool) -> bool:
        """Whether the block after the chain is on its way for another request."""
        blocks, length = request.token_blocks, len(search.chain)
        if blocks is None or length >= limit:
            return False
        search.awaits = blocks.digests[length]
        return self._is_coming(search.awaits, alone)

    def _is_coming(self, digest: bytes, alone: bool = False) -> bool:
        """Whether a request computes or restores a block. One that is paused may never come to compute it, and one
        that has to wait for another that is computed ``alone`` does not either."""
        owner = self._coming.get(digest)
        return owner is not None and (not (owner.paused or alone) or self._is_restoring(owner))

    def _is_restoring(self, request: Request) -> bool:
        search = self._searches.get(request)
        return search is not None and search.restoring

    def _ask_tiers(self, request: Request, search: _Search, limit: int, missing: int) -> Admission | None:
        """Starts to restore what the tiers have of a request whose chain is held; None if it is to be seated now."""
        assert self.tiers is not None
        blocks, chain = request.token_blocks, search.chain
        found: list[TierBlock] = []
        if blocks is not None and len(chain) < limit and not search.came_short:
            found = self.tiers.books.find(blocks, len(chain), limit)
        worth = bool(found) and self.tiers.restorer.worth(found)
        if not self.tiers.saver.can_take(len(found) if worth else missing):
            return Admission.ROOM_SOON
        if blocks is None or not worth:
            if found:  # noted once, and not at every step that finds no room yet
                self.tiers.restorer.decline(found)
            return None
        self.tiers.restorer.restore(blocks, chain, found, partial(self._restored, request, search, found))
        for block in found:
            self._coming.setdefault(block.key.digest, request)
        search.restoring = True
        return Admission.LATER

    def _is_handed_over(self, inbound: Inbound, request: Request, search: _Search, limit: int) -> bool:
        """Whether another engine computes what a request whose chain is held still needs, or soon will."""
        blocks, first = request.token_blocks, len(search.chain)
        if self.cache.max_blocks_per_owner is not None:  # more would come, and could not be cached
            limit = min(limit, self.cache.max_blocks_per_owner)
        if blocks is None or first >= limit or search.was_handed_over:
            return False
        chosen = inbound.choose(blocks, request.num_tokens, first, limit, self.load())
        if chosen is None:
            if inbound.awaits_peers(blocks, request.num_tokens, first, limit):
                return True
            if reason := inbound.forbids(blocks, request.num_tokens, first, limit):
                self.failed.append((request, reason))
            return bool(reason)
        search.reserve = limit - first
        if not self._may_reserve(inbound, search.reserve):
            return True
        search.reserve = 0
        search.restoring = search.was_handed_over = True
        for digest in blocks.digests[first:limit]:
            self._coming.setdefault(digest, request)
        done = partial(self._handed_over, request, search, blocks.digests[first:limit])
        request.metrics.handoff_started, request.metrics.handoff_ended = time.monotonic(), 0.0
        handoff = inbound.start(chosen, blocks, search.chain, limit, request.tenant, done)
        search.handoff = handoff if search.restoring else None  # else it has failed by now
        return True

    def _may_reserve(self, inbound: Inbound, num_blocks: int) -> bool:
        """Whether so many blocks may be reserved now. Once they may not be for one request, they may be for none behind
        it in this round: else short prompts would keep a long one waiting for ever."""
        self._somebody_waits = self._somebody_waits or not inbound.has_room(num_blocks)
        return not self._somebody_waits

    def _handed_over(self, request: Request, search: _Search, wanted: Sequence[bytes], arrival: Arrival) -> None:
        self._has_come(request, wanted)
        search.restoring, search.handoff = False, None
        request.metrics.handoff_ended = time.monotonic()
        if arrival.num_blocks and not request.generated:
            request.metrics.prefilled_by = arrival.peer
            request.metrics.num_handoff_tokens = arrival.num_blocks * self.block_size
        if arrival.failure and self.inbound is not None and self.inbound.must_succeed:
            self.failed.append((request, f"another engine was to compute its prompt, and did not: {arrival.failure}"))

    def _has_come(self, request: Request, digests: Iterable[bytes]) -> None:
        """Nothing is brought for a request any more, so that nobody is to wait for it."""
        for digest in digests:
            if self._coming.get(digest) is request:
                del self._coming[digest]

    def _restored(self, request: Request, search: _Search, wanted: list[TierBlock], arrived: int) -> None:
        self._has_come(request, [block.key.digest for block in wanted])
        search.restoring, search.came_short = False, arrived < len(wanted)
        if not request.generated:
            request.metrics.num_restored_tokens = arrived * self.block_size

    def _seat(self, request: Request, row: int, chain: list[CachedBlock], missing: int) -> None:
        """Makes the seat of a request whose chain is held, and gives it the rest of its blocks."""
        new = self.cache.allocate(missing, Use.COMPUTE, _owner(request))
        num_cached = len(chain) * self.block_size
        request.seat = Seat(
            request,
            row,
            [node.block for node in chain] + new,
            chain,
            num_offered=len(chain),
            num_slots=(len(chain) + missing) * self.block_size,
            num_given=request.num_tokens,
            num_wanted=len(request.prompt_token_ids) + request.max_tokens - 1,
            num_computed=num_cached,
            num_done=num_cached,
        )
        if request.token_blocks is None:
            return
        for digest in request.token_blocks.digests[len(chain) : self._num_known_blocks(request)]:
            if not self._is_coming(digest):
                self._coming[digest] = request
        metrics = request.metrics
        if not metrics.was_computed:
            metrics.num_cached_tokens = num_cached
            metrics.num_restored_tokens = min(metrics.num_restored_tokens, num_cached)
            metrics.num_handoff_tokens = min(metrics.num_handoff_tokens, num_cached)
            on_device = (num_cached - metrics.num_restored_tokens - metrics.num_handoff_tokens) // self.block_size
            on_device = max(0, on_device)  # a block that was restored may have come from elsewhere the next time
            self.cache.count_lookup(request.num_tokens, chain[:on_device])
            if self.tiers is not None:
                self.tiers.books.count_lookup(request.num_tokens - on_device * self.block_size)

    def _read_tokens(self, request: Request) -> None:
        """Tells a request's blocks of the tokens that were generated since."""
        blocks = request.token_blocks
        assert blocks is not None
        read = blocks.num_tokens - len(request.prompt_token_ids)
        if read < len(request.generated):
            blocks.extend(request.generated[read:])

    def _num_known_blocks(self, request: Request) -> int:
        return len(request.token_blocks.digests) if request.token_blocks is not None else 0

    def _stops_computing(self, request: Request, first: int, stop: int) -> None:
        if request.token_blocks is not None:
            self._has_come(request, request.token_blocks.digests[first:stop])


def _owner(request: Request) -> bytes:
    return request.token_blocks.owner if request.token_blocks is not None else b""
