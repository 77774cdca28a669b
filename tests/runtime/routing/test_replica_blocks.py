"""A replica's blocks: KV events are applied in order, a gap asks for a snapshot, a new epoch begins with nothing."""

from __future__ import annotations

import pytest

from headwise.runtime.kv.events import TIERS, Cleared, KvEvent, KvMessage, KvSnapshot, Removed, Stored
from headwise.runtime.routing import replica_blocks
from headwise.runtime.routing.block_index import BlockIndex
from headwise.runtime.routing.replica_blocks import ReplicaBlocks

A, B, C, D = (bytes([number]) * 32 for number in range(4))


def stored(*digests: bytes, tier: str = "device") -> Stored:
    return Stored(tier, digests, bytes(32))


def snapshot(sequence: int, *digests: bytes, epoch: int = 5) -> KvSnapshot:
    blocks = {tier: dict.fromkeys(digests if tier == "device" else (), bytes(32)) for tier in TIERS}
    return KvSnapshot(epoch, sequence, blocks)


class World:
    """A replica whose snapshot after message 3 was taken, with block A."""

    def __init__(self) -> None:
        self.index = BlockIndex()
        self.replica = ReplicaBlocks(self.index, 0)
        assert not self.replica.take(snapshot(3, A))

    def see(self, sequence: int, *events: KvEvent, epoch: int = 5, resnapshot: bool = False) -> bool:
        return self.replica.see(KvMessage(epoch, sequence, events, resnapshot))

    @property
    def known(self) -> set[bytes]:
        return {digest for digest in (A, B, C, D) if self.index.slots(digest)}


@pytest.fixture
def world() -> World:
    return World()


def test_messages_change_what_is_held(world: World) -> None:
    assert not world.see(4, stored(B, C), Removed("device", (A, C)))
    assert world.known == {B} and len(world.replica) == 1
    assert not world.see(5, Cleared(None), stored(D))
    assert world.known == {D}


def test_a_block_is_held_until_the_last_tier_has_it_no_more(world: World) -> None:
    world.see(4, stored(A, tier="host"), Removed("device", (A,)))
    assert world.known == {A}
    world.see(5, Cleared("device"))
    assert world.known == {A}
    world.see(6, Cleared("host"))
    assert world.known == set()


def test_what_the_snapshot_has_already_is_passed_over(world: World) -> None:
    assert not world.see(3, stored(B)) and not world.see(9, stored(C), epoch=4)
    assert world.known == {A} and not world.replica.stale


def test_a_gap_asks_once_for_a_snapshot_and_goes_on_from_it(world: World) -> None:
    assert world.see(5, stored(B))
    assert not world.see(6, Removed("device", (B,))) and not world.see(7, stored(D))
    assert world.replica.stale and world.known == {A}
    assert not world.replica.take(snapshot(6, C))
    assert world.known == {C, D} and world.replica.sequence == 7 and not world.replica.stale


def test_a_reader_that_fell_behind_asks_for_a_snapshot(world: World) -> None:
    assert world.see(4, resnapshot=True)
    assert not world.replica.take(snapshot(4, B))
    assert world.known == {B}


def test_a_snapshot_from_before_the_gap_asks_for_another(world: World) -> None:
    world.see(5, stored(B))
    assert world.replica.take(snapshot(2, D)) and world.known == {A}
    assert world.replica.take(snapshot(3, A)) and world.known == {A}
    assert not world.replica.take(snapshot(5, A, B)) and world.known == {A, B}


def test_a_snapshot_that_is_older_than_what_is_known_changes_nothing(world: World) -> None:
    world.see(4, stored(B))
    assert not world.replica.take(snapshot(3, A)) and world.known == {A, B}


def test_a_new_epoch_begins_with_nothing_and_needs_no_snapshot(world: World) -> None:
    assert not world.see(0, Cleared(None), stored(B), epoch=6)
    assert world.known == {B} and world.replica.epoch == 6
    assert not world.replica.take(snapshot(9, A)) and world.known == {B}


@pytest.mark.parametrize(("sequence", "resnapshot"), [(2, False), (0, True)])
def test_a_new_epoch_whose_beginning_is_missing_asks_for_a_snapshot(
    world: World, sequence: int, resnapshot: bool
) -> None:
    assert world.see(sequence, epoch=6, resnapshot=resnapshot)
    assert world.known == set()
    assert world.replica.take(snapshot(9, A)) and world.known == set()
    assert not world.replica.take(snapshot(sequence, D, epoch=6)) and world.known == {D}


def test_a_new_epoch_cures_a_gap_in_the_one_before(world: World) -> None:
    world.see(5, stored(B))
    assert not world.see(0, Cleared(None), epoch=6) and not world.replica.stale
    assert not world.see(1, stored(C), epoch=6) and world.known == {C}


def test_the_first_snapshot_is_asked_for_once() -> None:
    replica = ReplicaBlocks(BlockIndex(), 0)
    assert not replica.see(KvMessage(5, 7)) and not replica.see(KvMessage(6, 2))
    assert replica.stale and not replica.take(snapshot(2, A, epoch=6))


def test_messages_that_wait_for_a_snapshot_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_blocks, "MAX_HELD_BACK", 4)
    world.see(5, stored(B))
    assert not world.see(6, stored(C, D)) and not world.see(7, stored(D))
    assert world.replica.take(snapshot(5, A, B))
    assert not world.replica.take(snapshot(6, A, B, C)) and world.known == {A, B, C, D}


def test_coming_blocks_are_known_until_the_last_request_that_brings_them_ends(world: World) -> None:
    first, second = world.replica.expect([A, B, C]), world.replica.expect([A, B])
    assert (first, second) == ([B, C], [B])
    world.replica.forget(first)
    assert world.known == {A, B}
    world.replica.forget(second)
    assert world.known == {A}


def test_a_block_that_came_stays_when_its_request_ends_and_one_that_was_removed_does_not(world: World) -> None:
    expected = world.replica.expect([B, C])
    world.see(4, stored(B, C), Removed("device", (C,)))
    assert world.known == {A, B, C}
    world.replica.forget(expected)
    assert world.known == {A, B}


def test_coming_blocks_outlive_the_replicas_epoch(world: World) -> None:
    world.replica.expect([B])
    world.see(0, Cleared(None), epoch=6)
    assert world.known == {B}


def test_of_a_dropped_replica_nothing_is_left(world: World) -> None:
    world.replica.expect([B])
    world.replica.drop()
    assert len(world.index) == 0
