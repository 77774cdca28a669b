"""Router: which replica is to compute a request. Events come in, a choice goes out; no I/O, no clock, one thread.

A request goes where it costs least, in seconds::

    (tokens that wait there + tokens of the prompt not cached there) * seconds a token
    + requests that run there * seconds each adds
    + work weight * tokens of the prompt not cached there * seconds a token

The first two lines are what the request waits for. The third stands for what requests after it will wait for because
of it; the work weight is from 1 to 4, and grows with the part of the replicas that are busy (load.py).

A request counts there as soon as it is routed: its tokens wait, and its blocks are *coming*, which is as good as there.
So equal prompts that come at once meet. When the wait grows longer than the beginning is worth, the next one goes
elsewhere, and its blocks are there too from then on.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from headwise.runtime.kv.events import KvMessage, KvSnapshot
from headwise.runtime.routing.block_index import BlockIndex
from headwise.runtime.routing.load import LoadReport, Loads
from headwise.runtime.routing.replica_blocks import ReplicaBlocks
from headwise.workers.errors import InvalidValueError


@dataclass(frozen=True, slots=True)
class SnapshotWanted:
    """Take a snapshot of a replica's KV events, and hand it in."""

    replica: str


@dataclass(frozen=True, slots=True)
class RouteAgain:
    """A request's replica is gone; the router has forgotten the request."""

    request: str


Instruction = SnapshotWanted | RouteAgain


@dataclass(frozen=True, slots=True)
class Choice:
    """
    Attributes:
        replica: where the request goes.
        number: of the choice, from 1 on. It goes with the request, so that load reports can tell which have arrived.
        cached_tokens: leading tokens of the prompt that are there, or will be once the requests before it are computed.
        wait_s: seconds to the first token, as far as known.
    """

    replica: str
    number: int
    cached_tokens: int
    wait_s: float


@dataclass(slots=True)
class _Request:
    replica: _Replica
    number: int
    tokens: int  # that are still to be computed of its prompt, as far as known
    expected: list[bytes]
    runs: bool = False  # its first token is there


@dataclass(slots=True)
class _Replica:
    name: str
    slot: int
    blocks: ReplicaBlocks
    drains: bool = False
    requests: dict[str, _Request] = field(default_factory=dict)  # in the order of their numbers
    other_tokens: int = 0  # that wait there, but not of requests that are known here
    other_running: int = 0
    num_running: int = 0


class Router:
    """Knows each replica's blocks, queue and speed.

    Messages and reports may come late: what is said of a replica or a request that is not there (any more) is passed
    over. A replica is one life of an engine's process: one that comes again after it left knows nothing of before.
    """

    def __init__(self, block_size: int) -> None:
        """Args: ``block_size``: tokens of a block, the same at all replicas."""
        self._block_size = block_size
        self._index, self._loads = BlockIndex(), Loads()
        self._replicas: dict[str, _Replica] = {}
        self._by_slot: dict[int, _Replica] = {}
        self._free_slots: list[int] = []
        self._requests: dict[str, _Request] = {}
        self._number = 0

    def joined(self, name: str) -> list[Instruction]:
        """A replica is ready for requests. Subscribe to its KV events before the snapshot.

        Raises:
            InvalidValueError: it is there already.
        """
        if name in self._replicas:
            raise InvalidValueError("replica", name, "must be a name that no other replica has", "say left() first")
        slot = self._free_slots.pop() if self._free_slots else len(self._by_slot)
        replica = _Replica(name, slot, ReplicaBlocks(self._index, slot))
        self._replicas[name] = self._by_slot[slot] = replica
        self._loads.open(slot, name)
        return [SnapshotWanted(name)]

    def draining(self, name: str) -> None:
        """A replica finishes what it has, and is sent nothing more."""
        replica = self._replicas.get(name)
        if replica is not None:
            replica.drains = True
            self._loads.close(replica.slot)

    def left(self, name: str) -> list[Instruction]:
        """A replica is gone, drained or dead: nothing of it is known any more. Takes 0.1 µs a block that it held."""
        replica = self._replicas.pop(name, None)
        if replica is None:
            return []
        self._loads.close(replica.slot)
        replica.blocks.drop()
        del self._by_slot[replica.slot]
        self._free_slots.append(replica.slot)
        for request in replica.requests:
            del self._requests[request]
        return [RouteAgain(request) for request in replica.requests]

    def route(
        self, request: str, digests: Sequence[bytes], num_tokens: int, without: Collection[str] = ()
    ) -> Choice | None:
        """Chooses a replica for a request, which counts there from now on.

        Args:
            request: its id.
            digests: of the prompt's full blocks, in order, as ``KvIdentity.token_blocks`` makes them.
            num_tokens: of the prompt.
            without: replicas that are not to be chosen.

        Returns:
            None if no replica takes requests, or none but those.

        Raises:
            InvalidValueError: the request is under way already, or the prompt has no tokens or fewer than its blocks.
        """
        if request in self._requests:
            raise InvalidValueError("request", request, "must be an id that no request under way has")
        if num_tokens < max(1, len(digests) * self._block_size):
            limit = f"must be at least 1, and at least {len(digests)} blocks of {self._block_size}"
            raise InvalidValueError("num_tokens", num_tokens, limit)
        prefixes = [  # at least one token is computed
            (min(blocks * self._block_size, num_tokens - 1), slots) for blocks, slots in self._index.prefixes(digests)
        ]
        number = self._number + 1
        seed = int.from_bytes(digests[-1][:8], "little") if digests else number
        with self._loads.without([self._replicas[name].slot for name in without if name in self._replicas]):
            slot = self._best(num_tokens, prefixes, seed)
        if slot is None:
            return None
        self._number = number
        replica = self._by_slot[slot]
        cached = next((tokens for tokens, slots in prefixes if slots >> slot & 1), 0)
        choice = Choice(replica.name, number, cached, self._loads.wait_s(slot, num_tokens - cached))
        entry = _Request(replica, number, num_tokens - cached, replica.blocks.expect(digests))
        self._requests[request] = replica.requests[request] = entry
        self._loads.add(slot, queued_tokens=entry.tokens)
        return choice

    def first_token(self, request: str) -> None:
        """A request's prompt is computed."""
        entry = self._requests.get(request)
        if entry is not None and not entry.runs:
            entry.runs = True
            entry.replica.num_running += 1
            self._loads.add(entry.replica.slot, queued_tokens=-entry.tokens, running=1)
            entry.tokens = 0

    def finished(self, request: str) -> None:
        """A request has all its tokens, or nobody wants more of them."""
        entry = self._requests.pop(request, None)
        if entry is not None:
            self._remove(request, entry)

    def failed(self, request: str) -> None:
        """A request ended by its replica's fault. It may be routed again."""
        entry = self._requests.pop(request, None)
        if entry is not None:
            self._remove(request, entry)
            self._loads.failed(entry.replica.slot)

    def load(self, name: str, report: LoadReport) -> None:
        """A replica reports. What it says of its queue holds for the requests that had reached it; those routed since
        count as before. What of its queue is less than known here was computed, of the oldest prompts first."""
        replica = self._replicas.get(name)
        if replica is None:
            return
        arrived = [entry for entry in replica.requests.values() if entry.number <= report.received and entry.tokens]
        computed = sum(entry.tokens for entry in arrived) - report.queued_tokens
        other_tokens, other_running = max(0, -computed), max(0, report.running - replica.num_running)
        change = other_tokens - replica.other_tokens
        for entry in arrived:
            part = max(0, min(computed, entry.tokens))
            entry.tokens -= part
            computed -= part
            change -= part
        self._loads.add(replica.slot, change, other_running - replica.other_running)
        replica.other_tokens, replica.other_running = other_tokens, other_running
        self._loads.learn(replica.slot, report)

    def kv_message(self, name: str, message: KvMessage) -> list[Instruction]:
        """A message of a replica's KV events, in their order."""
        replica = self._replicas.get(name)
        return [SnapshotWanted(name)] if replica is not None and replica.blocks.see(message) else []

    def kv_snapshot(self, name: str, snapshot: KvSnapshot) -> list[Instruction]:
        """A snapshot of a replica's KV events."""
        replica = self._replicas.get(name)
        return [SnapshotWanted(name)] if replica is not None and replica.blocks.take(snapshot) else []

    def stats(self) -> dict[str, int]:
        """``blocks``: digests in the index; ``held``: those that replicas hold, counted at each; ``stale``: replicas
        that wait for a snapshot; ``requests``: under way; ``queued_tokens``, ``running``: of all replicas."""
        loads = [self._loads.of(slot) for slot in self._by_slot]
        return {
            "replicas": len(self._replicas),
            "draining": sum(replica.drains for replica in self._replicas.values()),
            "stale": sum(replica.blocks.stale for replica in self._replicas.values()),
            "blocks": len(self._index),
            "held": sum(len(replica.blocks) for replica in self._replicas.values()),
            "requests": len(self._requests),
            "queued_tokens": sum(queued for queued, _ in loads),
            "running": sum(running for _, running in loads),
        }

    def _best(self, num_tokens: int, prefixes: Sequence[tuple[int, int]], seed: int) -> int | None:
        """As :meth:`Loads.best <headwise.runtime.routing.load.Loads.best>`; for other ways of routing, to compare."""
        return self._loads.best(num_tokens, prefixes, seed)

    def _remove(self, request: str, entry: _Request) -> None:
        replica = entry.replica
        del replica.requests[request]
        replica.blocks.forget(entry.expected)
        replica.num_running -= entry.runs
        self._loads.add(replica.slot, -entry.tokens, -entry.runs)
