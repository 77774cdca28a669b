"""KV events: which blocks an engine holds, told to routers as a stream of msgpack messages beside a snapshot.

A message is a map, and the messages of an epoch are numbered::

    {"epoch": 3, "sequence": 17, "events": [
        {"type": "stored", "tier": "device", "digests": [...], "parent": ...},    # consecutive blocks of one chain
        {"type": "removed", "tier": "host", "digests": [...]},
        {"type": "cleared", "tier": None}]}                                       # None: every tier
    {"epoch": 3, "sequence": 17, "resnapshot": true}     # messages up to this one were not delivered

Message 0 of an epoch says that everything is cleared. A reader subscribes, takes a snapshot, passes over messages up to
the snapshot's (epoch, sequence), applies the later ones, and takes another snapshot when it is told to or a number is
missing. Messages hold digests, never token ids.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import msgpack

from headwise.workers.errors import InvalidValueError
from headwise.workers.plan import foreign_is_value_error

TIERS = ("device", "host", "disk")
MAX_MESSAGE_BYTES = 64 << 20
"""The largest message; a step that notes more has its subscribers take a snapshot instead."""
MAX_SNAPSHOT_BYTES = 1 << 30
"""The largest snapshot that is decoded, of about 15 million blocks."""
MAX_DIGEST_BYTES = 64


@dataclass(frozen=True, slots=True)
class Stored:
    """Blocks of one chain are there; the first one's parent is ``parent``, and each other's is the one before it."""

    tier: str
    digests: tuple[bytes, ...]
    parent: bytes


@dataclass(frozen=True, slots=True)
class Removed:
    tier: str
    digests: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Cleared:
    """A tier holds nothing any more; None: no tier does."""

    tier: str | None


KvEvent = Stored | Removed | Cleared


@dataclass(frozen=True, slots=True)
class KvMessage:
    """What happened between two messages, in order; ``resnapshot``: messages up to this one were not delivered."""

    epoch: int
    sequence: int
    events: tuple[KvEvent, ...] = ()
    resnapshot: bool = False


@dataclass(frozen=True, slots=True)
class KvSnapshot:
    """What was there after a message: by tier, each block's parent by its digest, parents before their children."""

    epoch: int
    sequence: int
    blocks: dict[str, dict[bytes, bytes]]


class Subscription:
    """The messages from now on, for one reader. Thread-safe; close it, or use it as a context manager."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._messages: deque[bytes] = deque()
        self._changed = threading.Condition(threading.Lock())
        self._closed = False

    def get(self, timeout_s: float | None = None) -> bytes | None:
        """The next message, waited for; None when the time is over or the subscription is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._messages or self._closed, timeout_s)
            return self._messages.popleft() if self._messages else None

    def close(self) -> None:
        """Ends every wait; nothing more is delivered. Idempotent."""
        with self._changed:
            self._closed = True
            self._messages.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[bytes]:
        """The messages until the subscription is closed."""
        while (data := self.get()) is not None:
            yield data

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _offer(self, data: bytes, resnapshot: bytes) -> bool:
        """Delivers a message; to a reader that is behind, in place of all it has not read, that it should resnapshot.

        Returns:
            False once closed.
        """
        with self._changed:
            if self._closed:
                return False
            if len(self._messages) >= self._capacity:
                self._messages.clear()
                data = resnapshot
            self._messages.append(data)
            self._changed.notify()
            return True


class KvEvents:
    """Keeps what each tier holds, and tells subscribers what changes. All calls on one thread, the engine's.

    Attributes:
        epoch, sequence: of the last message; sequence 0 is the epoch's start, with nothing stored.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch, self.sequence = epoch, 0
        self._blocks: dict[str, dict[bytes, bytes]] = {tier: {} for tier in TIERS}
        self._subscribers: list[Subscription] = []
        self._changed = False
        self._noted: list[dict[str, Any]] = []  # only while there are subscribers

    def stored(self, digests: Sequence[bytes], parent: bytes, tier: str) -> None:
        """Notes consecutive blocks of one chain, the first of which follows ``parent``."""
        if not digests:
            return
        blocks, before = self._blocks[tier], parent
        for digest in digests:
            blocks[digest] = before
            before = digest
        self._changed = True
        if not self._subscribers:
            return
        last = self._noted[-1] if self._noted else None
        if last and last["type"] == "stored" and last["tier"] == tier and last["digests"][-1] == parent:
            last["digests"] += digests
        else:
            self._noted.append({"type": "stored", "tier": tier, "digests": [*digests], "parent": parent})

    def removed(self, digests: Sequence[bytes], tier: str) -> None:
        """Notes that blocks are gone; one that was not there changes nothing."""
        if not digests:
            return
        blocks = self._blocks[tier]
        for digest in digests:
            blocks.pop(digest, None)
        self._changed = True
        if not self._subscribers:
            return
        last = self._noted[-1] if self._noted else None
        if last and last["type"] == "removed" and last["tier"] == tier:
            last["digests"] += digests
        else:
            self._noted.append({"type": "removed", "tier": tier, "digests": [*digests]})

    def cleared(self, tier: str | None = None) -> None:
        """Notes that a tier is empty; None: that all are."""
        for name in TIERS if tier is None else (tier,):
            self._blocks[name].clear()
        self._changed = True
        if self._subscribers:
            self._noted.append({"type": "cleared", "tier": tier})

    def new_epoch(self, epoch: int) -> None:
        """Clears everything and counts from 0 again, which subscribers are told at once.

        Raises:
            InvalidValueError: the epoch is not later than this one.
        """
        if epoch <= self.epoch:
            raise InvalidValueError("epoch", epoch, f"must be more than the present {self.epoch}")
        self._noted.clear()
        self.cleared()
        self.epoch, self.sequence = epoch, -1
        self.flush()

    def flush(self) -> None:
        """Makes one message of what was noted since the last; none where nothing was."""
        if not self._changed:
            return
        self._changed = False
        self.sequence += 1
        if not self._subscribers:
            return
        head: dict[str, Any] = {"epoch": self.epoch, "sequence": self.sequence}
        resnapshot = msgpack.packb(head | {"resnapshot": True})
        data = msgpack.packb(head | {"events": self._noted})
        if len(data) > MAX_MESSAGE_BYTES:
            data = resnapshot
        self._noted = []
        self._subscribers = [one for one in self._subscribers if one._offer(data, resnapshot)]

    def subscribe(self, capacity: int = 1024) -> Subscription:
        """The messages from now on.

        Args:
            capacity: messages that may wait unread; with one more all of them are dropped, and the reader is told to
                take a snapshot.

        Raises:
            InvalidValueError: the capacity is no int, or less than 1.
        """
        if not isinstance(capacity, int) or isinstance(capacity, bool) or capacity < 1:
            raise InvalidValueError("capacity", capacity, "must be an int, at least 1")
        self.flush()  # what was noted before is not for this one
        self._subscribers.append(Subscription(capacity))
        return self._subscribers[-1]

    def snapshot(self) -> bytes:
        """What is there after message ``sequence``, as msgpack: ``{"epoch", "sequence", "blocks": {tier: [[digest,
        parent], …]}}``, parents before their children. What is noted and no message yet becomes one first."""
        self.flush()
        blocks = {tier: _parents_first(blocks) for tier, blocks in self._blocks.items()}
        data: bytes = msgpack.packb({"epoch": self.epoch, "sequence": self.sequence, "blocks": blocks})
        return data

    def close(self) -> None:
        """Closes every subscription, so that no reader waits for an engine that is gone. Idempotent."""
        for subscription in self._subscribers:
            subscription.close()


def decode_events(data: bytes) -> KvMessage:
    """A subscriber's message.

    Raises:
        ValueError: not a message, or larger than MAX_MESSAGE_BYTES.
    """
    with foreign_is_value_error():
        message = _unpack(data, MAX_MESSAGE_BYTES)
        epoch, sequence = _count(message, "epoch"), _count(message, "sequence")
        if "resnapshot" in message:
            _only(message, "epoch", "sequence", "resnapshot")
            if message["resnapshot"] is not True:
                raise ValueError("resnapshot can only be true")
            return KvMessage(epoch, sequence, resnapshot=True)
        _only(message, "epoch", "sequence", "events")
        return KvMessage(epoch, sequence, tuple(_event(event) for event in message["events"]))


def decode_snapshot(data: bytes) -> KvSnapshot:
    """What :meth:`KvEvents.snapshot` gave.

    Raises:
        ValueError: not a snapshot, or larger than MAX_SNAPSHOT_BYTES.
    """
    with foreign_is_value_error():
        message = _unpack(data, MAX_SNAPSHOT_BYTES)
        _only(message, "epoch", "sequence", "blocks")
        _only(message["blocks"], *TIERS)
        blocks = {
            tier: {_digest(digest): _digest(parent) for digest, parent in pairs}
            for tier, pairs in message["blocks"].items()
        }
        return KvSnapshot(_count(message, "epoch"), _count(message, "sequence"), blocks)


def _parents_first(blocks: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    """(digest, parent) pairs. A tier below the device is given the end of a chain before its start."""
    placed: dict[bytes, bytes] = {}
    for digest, parent in blocks.items():
        if parent in placed or parent not in blocks:
            placed[digest] = parent
            continue
        chain: dict[bytes, bytes] = {}
        while digest in blocks and digest not in placed and digest not in chain:
            chain[digest] = blocks[digest]
            digest = blocks[digest]
        placed |= reversed(chain.items())
    return [*placed.items()]


def _unpack(data: bytes, limit: int) -> dict[str, Any]:
    if len(data) > limit:
        raise ValueError(f"a KV event message of {len(data)} bytes is over the limit of {limit}")
    message = msgpack.unpackb(data, strict_map_key=True)
    if not isinstance(message, dict):
        raise ValueError(f"a KV event message must be a map, not {type(message).__name__}")
    return message


def _only(message: Any, *keys: str) -> None:
    if not isinstance(message, dict) or message.keys() != set(keys):
        raise ValueError(f"expected a map of {', '.join(keys)}, not {repr(message)[:80]}")


def _count(message: dict[str, Any], key: str) -> int:
    value = message[key]
    if type(value) is not int or value < 0:
        raise ValueError(f"{key} must be a number of at least 0, not {value!r}")
    return value


def _event(event: dict[str, Any]) -> KvEvent:
    match event["type"]:
        case "stored":
            _only(event, "type", "tier", "digests", "parent")
            return Stored(_tier(event), _digests(event), _digest(event["parent"]))
        case "removed":
            _only(event, "type", "tier", "digests")
            return Removed(_tier(event), _digests(event))
        case "cleared":
            _only(event, "type", "tier")
            return Cleared(None if event["tier"] is None else _tier(event))
    raise ValueError(f"no KV event has the type {event['type']!r}")


def _tier(event: dict[str, Any]) -> str:
    if event["tier"] not in TIERS:
        raise ValueError(f"no tier is called {event['tier']!r}")
    return str(event["tier"])


def _digests(event: dict[str, Any]) -> tuple[bytes, ...]:
    return tuple(_digest(digest) for digest in event["digests"])


def _digest(value: Any) -> bytes:
    if type(value) is not bytes or len(value) > MAX_DIGEST_BYTES:
        raise ValueError(f"a digest must be at most {MAX_DIGEST_BYTES} bytes, not {repr(value)[:80]}")
    return value
