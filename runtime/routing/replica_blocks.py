"""The blocks of one replica, as its KV events tell, and those that requests on their way there will bring."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from headwise.runtime.kv.events import TIERS, Cleared, KvMessage, KvSnapshot, Removed, Stored
from headwise.runtime.routing.block_index import BlockIndex

MAX_HELD_BACK = 1 << 16
"""Digests in messages that wait for a snapshot; with more they are given up, and another snapshot is asked for."""

_TIER_BIT = {tier: 1 << index for index, tier in enumerate(TIERS)}


class ReplicaBlocks:
    """Keeps a replica's bit in the index: set for the blocks that it holds in any tier, or that are coming.

    *Stale*: a message is missing, or no snapshot was there yet. What was known goes on being believed, as a wrong guess
    only costs time. Later messages wait until a snapshot says what they follow.

    Attributes:
        epoch, sequence: of the last message or snapshot that was applied; -1 before the first.
        stale: whether a snapshot is wanted.
    """

    def __init__(self, index: BlockIndex, slot: int) -> None:
        self.epoch, self.sequence, self.stale = -1, -1, True
        self._index, self._bit = index, 1 << slot
        self._held: dict[bytes, int] = {}  # the tiers, a bit each
        self._coming: dict[bytes, int] = {}  # how many requests bring it
        self._held_back: deque[KvMessage] = deque()
        self._num_held_back = 0

    def __len__(self) -> int:
        """Blocks that it holds."""
        return len(self._held)

    def holds(self, digest: bytes) -> bool:
        return digest in self._held

    def see(self, message: KvMessage) -> bool:
        """The next message of its KV events.

        Returns:
            Whether a snapshot is wanted that was not before.
        """
        if message.epoch < self.epoch:
            return False
        if message.epoch > self.epoch:  # the replica has started anew, with nothing
            self._clear(None)
            self._give_up_held_back()
            self.epoch, self.sequence = message.epoch, -1
            follows = message.sequence == 0 and not message.resnapshot
            was_stale, self.stale = self.stale, not follows
            if self.stale:
                self._hold_back(message)
                return not was_stale
        if message.sequence <= self.sequence:
            return False
        if self.stale:
            self._hold_back(message)
            return False
        if message.resnapshot or message.sequence != self.sequence + 1:
            self.stale = True
            self._hold_back(message)
            return True
        self.sequence = message.sequence
        for event in message.events:
            self._apply(event)
        return False

    def take(self, snapshot: KvSnapshot) -> bool:
        """A snapshot. One that is older than what is known changes nothing.

        Returns:
            Whether another is wanted: this one was too old, or a message after it is missing.
        """
        if (snapshot.epoch, snapshot.sequence) < (self.epoch, self.sequence):
            return self.stale
        held: dict[bytes, int] = {}
        for tier, blocks in snapshot.blocks.items():
            bit = _TIER_BIT[tier]
            for digest in blocks:
                held[digest] = held.get(digest, 0) | bit
        gone = [digest for digest in self._held if digest not in held]
        new = [digest for digest in held if digest not in self._held]
        self._held = held
        self._discard(gone)
        self._index.add(new, self._bit)
        self.epoch, self.sequence, self.stale = snapshot.epoch, snapshot.sequence, False
        waiting = list(self._held_back)
        self._give_up_held_back()
        for message in waiting:
            self.see(message)
        return self.stale

    def expect(self, digests: Sequence[bytes]) -> list[bytes]:
        """A request with these blocks comes. Hand what is returned to :meth:`forget` once it is finished or fails."""
        held, coming = self._held, self._coming
        missing = [digest for digest in digests if digest not in held]
        for digest in missing:
            coming[digest] = coming.get(digest, 0) + 1
        self._index.add(missing, self._bit)
        return missing

    def forget(self, expected: Iterable[bytes]) -> None:
        """A request that came has brought its blocks, or will not."""
        coming, gone = self._coming, []
        for digest in expected:
            count = coming[digest] - 1
            if count:
                coming[digest] = count
            else:
                del coming[digest]
                gone.append(digest)
        self._index.discard([digest for digest in gone if digest not in self._held], self._bit)

    def drop(self) -> None:
        """The replica is gone: the index knows nothing of it any more."""
        self._index.discard(self._held, self._bit)
        self._index.discard(self._coming, self._bit)
        self._held, self._coming = {}, {}
        self._give_up_held_back()

    def _apply(self, event: Stored | Removed | Cleared) -> None:
        held = self._held
        match event:
            case Stored(tier, digests):
                bit = _TIER_BIT[tier]
                new = [digest for digest in digests if digest not in held]
                for digest in digests:
                    held[digest] = held.get(digest, 0) | bit
                self._index.add(new, self._bit)
            case Removed(tier, digests):
                self._remove(digests, _TIER_BIT[tier])
            case Cleared(tier):
                self._clear(tier)

    def _clear(self, tier: str | None) -> None:
        self._remove(list(self._held), sum(_TIER_BIT.values()) if tier is None else _TIER_BIT[tier])

    def _remove(self, digests: Sequence[bytes], tiers: int) -> None:
        held, gone = self._held, []
        for digest in digests:
            before = held.get(digest, 0)
            if not before:
                continue
            if after := before & ~tiers:
                held[digest] = after
            else:
                del held[digest]
                gone.append(digest)
        self._discard(gone)

    def _discard(self, digests: Iterable[bytes]) -> None:
        """From the index, but for those that are coming."""
        self._index.discard([digest for digest in digests if digest not in self._coming], self._bit)

    def _hold_back(self, message: KvMessage) -> None:
        size = sum(len(event.digests) for event in message.events if not isinstance(event, Cleared)) + 1
        if self._num_held_back + size > MAX_HELD_BACK:
            self._give_up_held_back()
            message = KvMessage(message.epoch, message.sequence, resnapshot=True)
            size = 1
        self._held_back.append(message)
        self._num_held_back += size

    def _give_up_held_back(self) -> None:
        self._held_back.clear()
        self._num_held_back = 0
