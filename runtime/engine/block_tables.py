"""BlockTables: every request's blocks; which it found, which it computes itself, and which others may use."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from headwise.runtime.engine.request import Request, Seat, seat_of
from headwise.runtime.engine.tables import GONE, Table
from headwise.runtime.handoff.inbound import Arrival, Handoff, Inbound, LocalLoad
from headwise.runtime.kv.blocks import IntegrityError, Use
from headwise.runtime.kv.eviction import Chain
from headwise.runtime.kv.prefix_cache import PrefixCache, match_all
from headwise.runtime.kv.restorer import Found
from headwise.runtime.kv.tiers import Tiers
from headwise.runtime.kv.windows import RowRoom
from headwise.workers.kv.policy import DENSE


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
        chains: the cached blocks of each group that held its first tokens when it last looked; all of the same length,
            and not held, so a guess by now.
        awaits: the digest of a block that another request computes or restores.
        restoring: blocks are on their way to the device for the request, from the tiers or from another engine.
        came_short: not all of them arrived from the tiers; the request computes what is missing.
        handoff: the blocks are on their way from another engine.
        was_handed_over: they were once, and whatever came of it, the request computes the rest itself.
        reserve: how many blocks it waits to reserve for them; 0 if it does not wait for that.
    """

    chains: list[Chain]
    awaits: bytes | None = None
    restoring: bool = False
    came_short: bool = False
    handoff: Handoff | None = None
    was_handed_over: bool = False
    reserve: int = 0

    @property
    def num_found(self) -> int:
        """How many blocks need not be computed."""
        return len(self.chains[0])


class BlockTables:
    """Gives requests their seats' blocks and takes them back. Only the scheduler calls it.

    Attributes:
        load: tells what the engine has to compute; set by whoever schedules.
        failed: requests that are to end, and why: their blocks were to come from another engine, and did not.
    """

    def __init__(
        self,
        caches: PrefixCache | Sequence[PrefixCache],
        tiers: Tiers | None = None,
        inbound: Inbound | None = None,
        chunk: int = 1 << 30,
    ) -> None:
        """
        Args:
            caches: of each group of heads.
            tiers, inbound: where there is one group.
            chunk: most tokens of a step.
        """
        self.caches = [caches] if isinstance(caches, PrefixCache) else list(caches)
        self.cache, self.tiers, self.inbound = self.caches[0], tiers, inbound
        self.load: Callable[[], LocalLoad] = LocalLoad
        self.failed: list[tuple[Request, str]] = []
        self.block_size = self.cache.block_size
        self.rooms = [
            RowRoom.of(cache.reach, self.block_size, cache.pool.num_blocks, chunk) if cache.reach != DENSE else None
            for cache in self.caches
        ]
        self.windowed = any(room is not None for room in self.rooms)
        self._searches: dict[Request, _Search] = {}  # of requests that wait
        self._seated: dict[Request, None] = {}
        self._coming: dict[bytes, Request] = {}  # blocks not cached yet, and who computes or restores each
        self._somebody_waits = False  # for room to reserve blocks, in this round

    @property
    def capacity(self) -> int | None:
        """Most tokens of a request, generated ones included, that the blocks hold; None: any number."""
        limits = [
            cache.pool.num_blocks * self.block_size if room is None else room.capacity
            for cache, room in zip(self.caches, self.rooms, strict=True)
        ]
        return min((limit for limit in limits if limit is not None), default=None)

    def capacity_for(self, request: Request) -> int | None:
        """Most tokens of a request like this one: it may have to keep all of its blocks."""
        whole = min(cache.pool.num_blocks for cache in self.caches) * self.block_size
        return whole if _keeps_all(request) else self.capacity

    def begin_round(self) -> None:
        """The waiting requests have their turns, the first of them next."""
        self._somebody_waits = False

    def admit(self, request: Request, row: int, alone: bool = False) -> Admission:
        """Gives a request a seat, if it can have one now. Its first blocks come from the cache where they are there; at
        least one token is left to compute. It gets blocks for all its tokens and the next one, so that no prefill is
        preempted half-way by a later one; with a window, for as many as it needs at a time.

        Args:
            alone: no other request is computed meanwhile, so that there is none to wait for.
        """
        search = self._searches.get(request) or self._searches.setdefault(request, _Search([[] for _ in self.caches]))
        if search.restoring or (search.awaits is not None and self._is_coming(search.awaits, alone)):
            return Admission.LATER
        if self.inbound is not None and search.reserve and not self._may_reserve(self.inbound, search.reserve):
            return Admission.LATER
        limit = self._match(request, search.chains)
        if self._waits_for_another(request, search, limit, alone):
            return Admission.LATER
        chains = search.chains
        room = self._room_beside(chains, alone)
        wanted = [self._first_blocks(request, group, chain, room[group]) for group, chain in enumerate(chains)]
        missing = [count - search.num_found for count in wanted]
        if not self._have_room(request, missing, chains, room):
            return Admission.NO_ROOM
        self._hold(chains)
        if self.tiers is not None and (answer := self._ask_tiers(request, search, limit, missing[0])) is not None:
            self._release(chains)
            return answer
        asks = not alone or (self.inbound is not None and self.inbound.must_succeed)  # others wait for who is alone
        if asks and self.inbound is not None and self._is_handed_over(self.inbound, request, search, limit):
            self._release(chains)
            return Admission.LATER
        del self._searches[request]
        self._seat(request, row, chains, wanted)
        return Admission.SEATED

    def forget(self, request: Request) -> None:
        """A waiting request has ended."""
        search = self._searches.pop(request, None)
        if search is not None and search.handoff is not None and self.inbound is not None:
            self._has_come(request, search.handoff.blocks.digests)
            self.inbound.cancel(search.handoff)

    def missing(self, seat: Seat, num_tokens: int) -> list[int]:
        """How many blocks more a seat needs for so many tokens, in each group; not above 0 if none."""
        count = self._blocks_for(num_tokens)
        return [count - len(table.block_ids) for table in seat.tables]

    def has_room(
        self, missing: Sequence[int], leaving: Iterable[Request] = (), in_flight: Iterable[Request] = ()
    ) -> bool:
        """Whether so many blocks can be had in each group, once some requests have left, and what others have in flight
        is done."""
        leave, move = [seat_of(request) for request in leaving], [seat_of(request) for request in in_flight]
        for group, count in enumerate(missing):
            soon = sum(seat.tables[group].num_held for seat in leave)
            soon += sum(seat.tables[group].num_given_back(seat.num_computed) for seat in move)
            if count > self.caches[group].num_available + soon:
                return False
        return True

    def fitting(self, seat: Seat, count: int) -> int:
        """How many tokens a seat with a window computes next, at most ``count``: as many as there are blocks for, and
        at least one."""
        most = min(len(table.block_ids) + table.cache.num_available for table in seat.tables)
        return max(1, min(count, most * self.block_size - seat.num_computed))

    def grow(self, seat: Seat, num_tokens: int) -> list[list[int]]:
        """Makes the tables long enough for so many tokens; returns the new blocks of each group.

        Raises:
            OutOfBlocksError: there is no room.
        """
        count, owner = self._blocks_for(num_tokens), _owner(seat.request)
        new = [table.grow(count, owner) for table in seat.tables]
        seat.num_slots = max(seat.num_slots, count * self.block_size)
        return new

    def publish(self, request: Request, num_tokens: int) -> None:
        """Caches the full blocks of a request's first ``num_tokens``: a finite token was sampled after them, so their
        keys and values are verified."""
        seat, blocks = seat_of(request), request.token_blocks
        full = min(num_tokens, _num_known(request)) // self.block_size
        if blocks is None or full <= seat.num_offered:
            return
        self._read_tokens(request)
        self._stops_computing(request, seat.num_offered, full)
        seat.num_offered = full
        for table in seat.tables:
            table.publish(blocks, full)

    def give_back(self, seat: Seat) -> None:
        """Gives back the blocks that no token attends to any more that the seat has still to compute."""
        request = seat.request
        if request.token_blocks is not None:
            self._read_tokens(request)
        known = min(_num_known(request) // self.block_size, self._num_known_blocks(request))
        for table in seat.tables:
            if table.gives_at <= seat.num_done:
                table.give_back(seat.num_done, request.token_blocks, known)
        seat.gives_at = min(table.gives_at for table in seat.tables)

    def leave(self, request: Request) -> None:
        """Takes a request's blocks back, the last first, and its seat."""
        seat = seat_of(request)
        self._stops_computing(request, seat.num_offered, self._num_known_blocks(request))
        for table in seat.tables:
            table.leave()
        request.seat = None
        self._seated.pop(request, None)

    def computing(self, requests: Iterable[Request], group: int = 0) -> list[int]:
        """The blocks of a group that these requests hold, once for each hold."""
        return [block for request in requests for block in seat_of(request).tables[group].held()]

    @property
    def changes(self) -> int:
        """Counts what changed in the books."""
        return sum(cache.pool.changes for cache in self.caches) + (
            self.tiers.books.changes if self.tiers is not None else 0
        )

    def checks(self, requests: Sequence[Request]) -> Iterator[None]:
        """Checks the books in parts; void if anything changes before the last one.

        Args:
            requests: all that have a seat.

        Raises:
            IntegrityError: the books do not agree with each other, or with what the requests hold.
        """
        for group, cache in enumerate(self.caches):
            yield from cache.checks(self.computing(requests, group))
        for request in requests:
            check_tables(seat_of(request))
        if self.tiers is not None:
            yield from self.tiers.books.checks()

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _first_blocks(self, request: Request, group: int, chain: Chain, beside: int) -> int:
        """How many blocks a request's table has when it gets its seat; the first are those of the chain, and
        ``beside`` more can be had."""
        num_tokens, num_found, room = request.num_tokens + 1, len(chain), self.rooms[group]
        if room is None or _keeps_all(request):
            return max(num_found, self._blocks_for(num_tokens))
        least, most = map(self._blocks_for, room.first_tokens(num_tokens, num_found * self.block_size))
        return max(num_found, least, min(most, num_found + beside))

    def _room_beside(self, chains: Sequence[Chain], alone: bool) -> list[int]:
        """How many blocks of each group a request that has found these chains can have besides them. A row whose window
        moves needs a block more now and then, before it gives another back. Were that not left to it, it would preempt
        the newcomer each time, which would begin again as soon as the block is given back, and come to no end."""
        kept = [0] * len(self.caches)
        if self.windowed and not alone:
            for request in self._seated:
                for group, table in enumerate(seat_of(request).tables):
                    if table.has_moved:
                        kept[group] += max(0, self._steady(request, group) - table.num_held)
        rest = zip(self.caches, chains, kept, strict=True)
        return [cache.num_available - cache.num_idle_in(chain) - count for cache, chain, count in rest]

    def _steady(self, request: Request, group: int) -> int:
        """How many blocks of a group with a window a row needs to go on, whatever its length."""
        room = self.rooms[group]
        assert room is not None
        return min(room.steady, self._blocks_for(len(request.prompt_token_ids) + request.max_tokens))

    def _have_room(self, request: Request, missing: list[int], chains: list[Chain], beside: list[int]) -> bool:
        """Whether there are so many blocks besides the chains, and enough to go on with."""
        if self.inbound is not None and request.num_tokens <= self.inbound.max_tokens:
            # The whole prompt may be handed over, and blocks are reserved for all of it.
            return self._blocks_for(request.num_tokens + 1) - len(chains[0]) <= beside[0]
        for group, (count, chain) in enumerate(zip(missing, chains, strict=True)):
            room = self.rooms[group]
            if room is not None and not _keeps_all(request) and request.num_tokens > (room.reach.span or 0):
                count = max(count, self._steady(request, group) - sum(node is not None for node in chain))
            if count > beside[group]:
                return False
        return True

    def _hold(self, chains: Sequence[Chain]) -> None:
        for cache, chain in zip(self.caches, chains, strict=True):
            cache.hold(chain, Use.COMPUTE)

    def _release(self, chains: Sequence[Chain]) -> None:
        for cache, chain in zip(self.caches, chains, strict=True):
            cache.release(chain, Use.COMPUTE)

    def _match(self, request: Request, chains: list[Chain]) -> int:
        """Finds a request's chains; returns how long they may be at most."""
        if request.token_blocks is None:
            return 0
        self._read_tokens(request)
        limit = (request.num_tokens - 1) // self.block_size
        match_all(self.caches, request.token_blocks, limit, chains, whole=_keeps_all(request))
        return limit

    def _waits_for_another(self, request: Request, search: _Search, limit: int, alone: bool) -> bool:
        """Whether the block after the chain is on its way for another request."""
        blocks, length = request.token_blocks, search.num_found
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
        blocks, chain, restorer = request.token_blocks, search.chains[0], self.tiers.restorer
        found: Found | None = None
        if blocks is not None and len(chain) < limit and not search.came_short:
            found = restorer.find(blocks, chain, limit)
        worth = found is not None and self._is_worth_restoring(found, len(chain))
        if not self.tiers.saver.can_take(len(found.blocks) if found is not None and worth else missing):
            return Admission.ROOM_SOON
        if blocks is None or found is None or not worth:
            if found is not None and found.blocks:  # noted once, and not at every step that finds no room yet
                restorer.decline(found.blocks)
            return None
        restorer.restore(blocks, found, partial(self._restored, request, search, found))
        for block in found.blocks:
            self._coming.setdefault(block.key.digest, request)
        search.restoring = True
        return Admission.LATER

    def _is_worth_restoring(self, found: Found, num_found: int) -> bool:
        """Whether to restore blocks, where the device has ``num_found`` first blocks that need no other."""
        assert self.tiers is not None
        if not found.blocks or len(found.blocks) > self.cache.num_available - self.cache.num_idle_in(found.chain):
            return False
        return self.tiers.restorer.worth(found.blocks, (found.length - num_found) * self.block_size)

    def _is_handed_over(self, inbound: Inbound, request: Request, search: _Search, limit: int) -> bool:
        """Whether another engine computes what a request whose chain is held still needs, or soon will."""
        blocks, first = request.token_blocks, search.num_found
        if self.cache.max_blocks_per_owner is not None:  # more would come, and could not be cached
            limit = min(limit, self.cache.max_blocks_per_owner)
        if blocks is None or first >= limit or search.was_handed_over or request.num_tokens > inbound.max_tokens:
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
        handoff = inbound.start(chosen, blocks, search.chains[0], limit, request.tenant, done)
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

    def _restored(self, request: Request, search: _Search, found: Found, arrived: int) -> None:
        self._has_come(request, [block.key.digest for block in found.blocks])
        search.restoring, search.came_short = False, arrived < len(found.blocks)
        if not request.generated:
            request.metrics.num_restored_tokens = arrived * self.block_size

    def _seat(self, request: Request, row: int, chains: Sequence[Chain], wanted: Sequence[int]) -> None:
        """Makes the seat of a request whose chains are held, and gives it the rest of the ``wanted`` blocks."""
        tables = [
            Table.after(cache, DENSE if _keeps_all(request) else cache.reach, chain)
            for cache, chain in zip(self.caches, chains, strict=True)
        ]
        for table, count in zip(tables, wanted, strict=True):
            table.grow(count, _owner(request))
        chain = chains[0]
        num_cached = len(chain) * self.block_size
        request.seat = Seat(
            request,
            row,
            tables,
            num_offered=len(chain),
            num_slots=min(wanted) * self.block_size,
            num_given=request.num_tokens,
            num_wanted=len(request.prompt_token_ids) + request.max_tokens - 1,
            num_computed=num_cached,
            num_done=num_cached,
            gives_at=min(table.gives_at for table in tables),
        )
        self._seated[request] = None
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
            for table in tables:
                table.cache.count_lookup(request.num_tokens, table.chain[:on_device])
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


def check_tables(seat: Seat) -> None:
    """
    Raises:
        IntegrityError: a block is missing that a token may attend to, or one is there that none does.
    """
    for table in seat.tables:
        gone = [index for index, block in enumerate(table.block_ids) if block == GONE]
        first = table.reach.first_key(seat.num_done) // table.cache.block_size
        if gone != list(range(table.sinks, first)):
            story = (
                f"after {seat.num_done} tokens a row has no blocks at {gone}, and its window begins at block {first}"
            )
            raise IntegrityError(story)


def _keeps_all(request: Request) -> bool:
    """Whether a request has all its blocks until it leaves: they are sent to another engine, one after another."""
    return request.transfer is not None


def _num_known(request: Request) -> int:
    """How many tokens of a request are known. Of one that was aborted, those that were in flight stay unknown."""
    return len(request.prompt_token_ids) + len(request.generated)


def _owner(request: Request) -> bytes:
    return request.token_blocks.owner if request.token_blocks is not None else b""
