"""What the engine believes of host memory and disk, with no shard: jobs are answered by hand, late and in any order."""

from __future__ import annotations

from collections import deque

import pytest

from headwise.runtime.kv.blocks import BlockPool, OutOfBlocksError, Use
from headwise.runtime.kv.demoter import MAX_BATCH
from headwise.runtime.kv.events import KvEvents, decode_snapshot
from headwise.runtime.kv.eviction import CachedBlock
from headwise.runtime.kv.identity import ROOT, Hash, TokenBlocks, sha256
from headwise.runtime.kv.ledger import Ledger
from headwise.runtime.kv.prefix_cache import PrefixCache
from headwise.runtime.kv.tiers import Tiers
from headwise.workers.kv.transfer import BlockKey, Op, Tier, TransferJob, TransferResult, encode_job

SIZE = 2
OURS, THEIRS = sha256(b"ours"), sha256(b"theirs")


def sequence(first: int, length: int, namespace: bytes = OURS, hash: Hash = sha256) -> TokenBlocks:
    """So many full blocks; other first tokens make all of them others."""
    return TokenBlocks(namespace, SIZE, [first, *range(1, length * SIZE)], hash)


def key_of(blocks: TokenBlocks, index: int) -> BlockKey:
    return BlockKey(blocks.digests[index], blocks.namespace, blocks.parent(index), blocks.block(index))


def keys_of(blocks: TokenBlocks) -> list[BlockKey]:
    return [key_of(blocks, index) for index in range(len(blocks.digests))]


class Bed:
    """A cache, its tiers, and ranks that remember which digests they hold."""

    def __init__(
        self, blocks: int = 8, host: int = 0, disk: int = 0, reserve: int = 0, quota: float | None = None
    ) -> None:
        self.events = KvEvents(1)
        self.cache = PrefixCache(BlockPool(blocks), SIZE, events=self.events)
        self.outbox: list[TransferJob] = []
        self.results: deque[TransferResult] = deque()
        self.ledger = Ledger(self.outbox.append, lambda timeout_s: self.results.popleft() if self.results else None, 1)
        self.tiers = Tiers(self.cache, self.ledger, host, disk, reserve, quota, self.events)
        self.stored: dict[Tier, set[bytes]] = {Tier.HOST: set(), Tier.DISK: set()}

    def compute(self, blocks: TokenBlocks) -> list[CachedBlock]:
        """A request computes a sequence, publishes it and leaves."""
        chain: list[CachedBlock] = []
        self.cache.match(blocks, len(blocks.digests), chain)
        self.cache.hold(chain, Use.COMPUTE)
        for index in range(len(chain), len(blocks.digests)):
            [own] = self.cache.allocate(1, Use.COMPUTE, blocks.namespace)
            node = self.cache.insert(blocks, index, chain[-1] if chain else None, own)
            assert node is not None
            chain.append(node)
        self.cache.release(chain, Use.COMPUTE)
        return chain

    def take_all(self) -> None:
        """Evicts everything that is idle."""
        blocks = self.cache.allocate(self.cache.num_available)
        for block in blocks:
            self.cache.release_block(block, Use.COMPUTE, None)

    def send(self) -> list[TransferJob]:
        """The ranks get what is to be sent."""
        jobs = list(self.outbox)
        self.outbox.clear()
        return jobs

    def answer(self, job: TransferJob, failed: tuple[bytes, ...] = ()) -> None:
        """Every rank does what a job says, and tells."""
        digests = [key.digest for key in job.keys]
        store = self.stored[job.tier]
        if job.op is Op.DROP:
            store -= set(digests)
        elif job.op is Op.SAVE:
            store |= set(digests) - set(failed)
        else:
            source = self.stored[Tier.HOST] if job.op is Op.DEMOTE else store
            failed = (*failed, *(digest for digest in digests if digest not in source))
            if job.op is Op.DEMOTE:
                store |= set(digests) - set(failed)
        self.results.append(TransferResult(job.id, list(failed), 1e-3))
        self.ledger.poll()
        self.check()

    def settle(self, rounds: int = 100) -> None:
        """Answers all jobs, with what they lead to."""
        for _ in range(rounds):
            self.tiers.pump()
            if not self.ledger.busy:
                return
            for job in self.send():
                self.answer(job)
        raise AssertionError("blocks are copied without end")

    def save(self, blocks: TokenBlocks) -> None:
        """Computes a sequence, has it saved, and takes its memory on the device."""
        self.compute(blocks)
        while not self.tiers.saver.can_take(self.cache.pool.num_blocks):
            self.settle()
        self.take_all()

    def held(self, tier: Tier) -> set[bytes]:
        return set(decode_snapshot(self.events.snapshot()).blocks[tier.value])

    def check(self) -> None:
        self.cache.check_integrity()
        self.tiers.books.check_integrity()


def test_what_must_leave_is_saved_first_and_found_again() -> None:
    bed = Bed(blocks=4, host=8)
    blocks = sequence(1, 3)
    bed.compute(blocks)
    assert bed.tiers.saver.can_take(1) and not bed.outbox
    assert not bed.tiers.saver.can_take(3)
    [job] = bed.send()
    assert (job.op, job.tier) == (Op.SAVE, Tier.HOST)
    assert job.keys == [key_of(blocks, 2), key_of(blocks, 1)], "those first that are evicted first, and no more"
    assert not bed.tiers.books.find(blocks, 0, 3), "a block is there only once every rank has it"
    bed.answer(job)
    assert bed.tiers.saver.can_take(3) and bed.held(Tier.HOST) == set(blocks.digests[1:])
    assert bed.tiers.books.find(blocks, 0, 3) == []
    assert [entry.key for entry in bed.tiers.books.find(blocks, 1, 3)] == keys_of(blocks)[1:]
    assert len(bed.tiers.books.find(blocks, 1, 2)) == 1


def test_a_copy_of_a_block_that_was_taken_meanwhile_is_dropped() -> None:
    bed = Bed(blocks=2, host=8)
    blocks = sequence(1, 2)
    bed.compute(blocks)
    bed.tiers.saver.can_take(2)
    [job] = bed.send()
    bed.take_all()
    bed.answer(job)
    assert not bed.tiers.books.find(blocks, 0, 2) and not bed.held(Tier.HOST)
    [drop] = bed.send()
    assert (drop.op, drop.keys) == (Op.DROP, job.keys)
    bed.answer(drop)
    assert not bed.ledger.busy and not bed.stored[Tier.HOST]


def test_a_block_computed_again_while_a_useless_copy_is_made_is_saved_after_the_copy_is_dropped() -> None:
    bed = Bed(blocks=2, host=8)
    blocks = sequence(1, 2)
    bed.compute(blocks)
    bed.tiers.saver.can_take(2)
    [job] = bed.send()
    bed.take_all()
    bed.compute(blocks)
    assert bed.tiers.saver.can_take(2), "nothing can be saved that is being copied"
    bed.answer(job)
    assert not bed.tiers.saver.can_take(2)
    jobs = bed.send()
    assert [each.op for each in jobs] == [Op.DROP, Op.SAVE]
    for each in jobs:
        bed.answer(each)
    assert len(bed.tiers.books.find(blocks, 0, 2)) == 2 and bed.stored[Tier.HOST] == set(blocks.digests)


def test_a_block_used_while_it_is_copied_is_in_the_tier_all_the_same() -> None:
    bed = Bed(blocks=4, host=8)
    blocks = sequence(1, 2)
    chain = bed.compute(blocks)
    bed.tiers.saver.can_take(4)
    [job] = bed.send()
    bed.cache.hold(chain, Use.COMPUTE)
    bed.answer(job)
    assert len(bed.tiers.books.find(blocks, 0, 2)) == 2
    bed.cache.release(chain, Use.COMPUTE)
    assert bed.tiers.saver.can_take(4) and not bed.ledger.busy


def test_a_block_that_a_rank_could_not_save_is_dropped_on_all_and_not_tried_again() -> None:
    bed = Bed(blocks=2, host=8)
    blocks = sequence(1, 2)
    bed.compute(blocks)
    bed.tiers.saver.can_take(2)
    [job] = bed.send()
    bed.answer(job, (blocks.digests[1],))
    assert [key.digest for key in bed.send()[0].keys] == [blocks.digests[1]]
    assert bed.tiers.saver.can_take(2), "it can be taken, lost as it is"
    assert bed.held(Tier.HOST) == {blocks.digests[0]}
    assert bed.tiers.stats()["host"]["refused"] == 1


def test_a_restore_has_memory_of_its_own_and_arrives_as_idle_blocks() -> None:
    bed = Bed(blocks=4, host=8)
    blocks = sequence(1, 3)
    bed.save(blocks)
    done: list[int] = []
    found = bed.tiers.restorer.find(blocks, [], 3)
    bed.tiers.restorer.restore(blocks, found, done.append)
    assert bed.cache.pool.states()["reserved"] == 3
    [job] = bed.send()
    assert (job.op, job.tier, job.keys) == (Op.LOAD, Tier.HOST, keys_of(blocks))
    with pytest.raises(OutOfBlocksError):
        bed.cache.allocate(2)
    assert done == [] and len(bed.cache) == 0
    bed.answer(job)
    assert done == [3] and bed.cache.pool.states() == {"free": 1, "idle": 3, "active": 0, "reserved": 0}
    chain: list[CachedBlock] = []
    bed.cache.match(blocks, 3, chain)
    assert [node.block for node in chain] == job.blocks
    assert bed.tiers.saver.can_take(4), "the tier still has them"
    assert bed.tiers.stats()["host"]["hit_tokens"] == 3 * SIZE


def test_a_restore_without_room_starts_nothing() -> None:
    bed = Bed(blocks=3, host=8)
    blocks = sequence(1, 3)
    bed.save(blocks)
    bed.cache.allocate(1)
    with pytest.raises(OutOfBlocksError):
        bed.tiers.restorer.restore(blocks, bed.tiers.restorer.find(blocks, [], 3), lambda count: None)
    assert not bed.ledger.busy and bed.cache.pool.states()["reserved"] == 0


@pytest.mark.parametrize(("failing", "arrived"), [(0, 0), (1, 1), (2, 2)])
def test_what_comes_after_a_damaged_block_is_no_use_and_it_is_deleted(failing: int, arrived: int) -> None:
    bed = Bed(blocks=4, host=8)
    blocks = sequence(1, 3)
    bed.save(blocks)
    done: list[int] = []
    bed.tiers.restorer.restore(blocks, bed.tiers.restorer.find(blocks, [], 3), done.append)
    [job] = bed.send()
    bed.answer(job, (blocks.digests[failing],))
    assert done == [arrived] == [len(bed.cache)]
    [drop] = bed.send()
    assert drop.op is Op.DROP and drop.keys == [key_of(blocks, failing)]
    assert bed.held(Tier.HOST) == set(blocks.digests) - {blocks.digests[failing]}
    assert bed.tiers.stats()["host"]["damaged"] == 1
    assert bed.tiers.stats()["host"]["evictions"] == {"damage": 1}
    assert bed.cache.pool.states()["reserved"] == 0


def test_a_restore_from_both_tiers_waits_for_both() -> None:
    bed = Bed(blocks=4, host=2, disk=8, reserve=2)
    blocks = sequence(1, 4)
    bed.save(blocks)
    tiers = {entry.tier for entry in bed.tiers.books.find(blocks, 0, 4)}
    assert tiers == {Tier.HOST, Tier.DISK}
    done: list[int] = []
    bed.tiers.restorer.restore(blocks, bed.tiers.restorer.find(blocks, [], 4), done.append)
    host, disk = bed.send()
    bed.answer(disk)
    assert done == [] and len(bed.cache) == 0
    bed.answer(host)
    assert done == [4] == [len(bed.cache)]


def test_a_restore_finds_what_somebody_computed_meanwhile() -> None:
    bed = Bed(blocks=6, host=8)
    blocks = sequence(1, 2)
    bed.save(blocks)
    done: list[int] = []
    bed.tiers.restorer.restore(blocks, bed.tiers.restorer.find(blocks, [], 2), done.append)
    [job] = bed.send()
    chain = bed.compute(blocks)
    bed.answer(job)
    assert done == [2]
    assert [bed.cache.get(digest) for digest in blocks.digests] == chain
    assert bed.cache.pool.states() == {"free": 4, "idle": 2, "active": 0, "reserved": 0}


def test_a_restore_does_not_continue_a_chain_that_is_cached_no_longer() -> None:
    bed = Bed(blocks=6, host=8)
    blocks = sequence(1, 3)
    bed.save(blocks)
    chain = bed.compute(TokenBlocks(OURS, SIZE, [1, 1]))
    done: list[int] = []
    bed.tiers.restorer.restore(blocks, bed.tiers.restorer.find(blocks, chain, 3), done.append)
    [job] = bed.send()
    bed.cache.clear()
    bed.answer(job)
    assert done == [0] and len(bed.cache) == 0 and bed.cache.pool.num_free == 6


def test_clearing_makes_everything_on_its_way_useless() -> None:
    bed = Bed(blocks=6, host=4, disk=8)
    saved, other = sequence(1, 2), sequence(2, 2)
    bed.save(saved)
    bed.compute(other)
    done: list[int] = []
    bed.tiers.restorer.restore(saved, bed.tiers.restorer.find(saved, [], 2), done.append)
    bed.tiers.saver.can_take(4)
    jobs = bed.send()
    assert [job.op for job in jobs] == [Op.LOAD, Op.SAVE]
    bed.cache.clear()
    bed.tiers.clear()
    for job in jobs:
        bed.answer(job)
    assert done == [0] and len(bed.cache) == 0 and bed.cache.pool.num_free == 6
    for job in bed.send():
        assert job.op is Op.DROP
        bed.answer(job)
    assert not bed.ledger.busy and not bed.stored[Tier.HOST]
    assert not bed.tiers.books.find(saved, 0, 2) and not bed.tiers.books.find(other, 0, 2)


def test_the_host_parts_with_the_oldest_once_the_disk_has_it() -> None:
    bed = Bed(blocks=8, host=3, disk=8, reserve=2)
    blocks = sequence(1, 3)
    bed.compute(blocks)
    bed.tiers.saver.can_take(8)
    [save] = bed.send()
    bed.answer(save)
    bed.tiers.pump()
    [demote] = bed.send()
    assert (demote.op, demote.tier, demote.blocks) == (Op.DEMOTE, Tier.DISK, [])
    assert demote.keys == [key_of(blocks, 2), key_of(blocks, 1)]
    bed.answer(demote)
    assert bed.held(Tier.HOST) == set(blocks.digests), "it stays in the host"
    assert bed.held(Tier.DISK) == set(blocks.digests[1:])
    bed.compute(sequence(2, 1))
    bed.tiers.saver.can_take(8)
    bed.send()
    assert blocks.digests[2] not in bed.held(Tier.HOST), "what the disk has goes first"


def test_a_failed_demotion_is_dropped_on_every_rank() -> None:
    bed = Bed(blocks=8, host=2, disk=8, reserve=2)
    blocks = sequence(1, 1)
    bed.compute(blocks)
    bed.tiers.saver.can_take(8)
    bed.answer(bed.send()[0])
    bed.compute(sequence(2, 1))
    bed.tiers.saver.can_take(8)
    bed.answer(bed.send()[0])
    bed.tiers.pump()
    [demote] = bed.send()
    bed.answer(demote, (demote.keys[0].digest,))
    [drop] = bed.send()
    assert (drop.op, drop.tier, drop.keys) == (Op.DROP, Tier.DISK, [demote.keys[0]])
    assert bed.tiers.stats()["disk"]["refused"] == 1


def test_what_is_read_is_not_dropped() -> None:
    bed = Bed(blocks=8, host=2)
    blocks = sequence(1, 2)
    bed.save(blocks)
    bed.tiers.restorer.restore(blocks, bed.tiers.restorer.find(blocks, [], 2), lambda count: None)
    bed.send()
    bed.compute(sequence(2, 2))
    assert bed.tiers.saver.can_take(6), "nothing can be saved now, and nobody waits for it"
    assert bed.held(Tier.HOST) == set(blocks.digests) and not bed.outbox


def test_adopting_takes_the_newest_that_fit_and_deletes_the_rest() -> None:
    bed = Bed(disk=3)
    blocks, useless = sequence(1, 5), sequence(2, 1)
    bed.tiers.adopt(keys_of(blocks), keys_of(useless))
    assert bed.held(Tier.DISK) == set(blocks.digests[2:])
    dropped = [key for job in bed.send() for key in job.keys]
    assert dropped == [*keys_of(blocks)[:2], *keys_of(useless)]


def long_keys(count: int) -> list[BlockKey]:
    """Of so many blocks of the longest kind, whose digests count up."""
    tokens = bytes(4 * 1024)
    return [BlockKey(number.to_bytes(32, "big"), OURS, ROOT, tokens) for number in range(count)]


MORE_THAN_A_MESSAGE = 16_500
"""Blocks of the longest kind."""


def test_a_tier_that_is_larger_than_a_message_is_cleared() -> None:
    keys = long_keys(MORE_THAN_A_MESSAGE)
    bed = Bed(disk=len(keys))
    bed.tiers.adopt(keys)
    assert not bed.ledger.busy
    bed.tiers.clear()
    jobs = bed.send()
    for job in jobs:
        encode_job(job)
    assert [key for job in jobs for key in job.keys] == keys and {job.op for job in jobs} == {Op.DROP}


def test_what_does_not_fit_a_lowered_limit_is_deleted_in_few_messages_that_fit() -> None:
    keys = long_keys(MORE_THAN_A_MESSAGE + 1000)
    bed = Bed(disk=100)
    bed.tiers.adopt(keys[:-900], keys[-900:])
    jobs = bed.send()
    for job in jobs:
        encode_job(job)
    assert len(jobs) < 10
    assert [key for job in jobs for key in job.keys] == keys[:-1000] + keys[-900:]
    assert bed.held(Tier.DISK) == {key.digest for key in keys[-1000:-900]}


def test_what_a_save_drives_out_is_dropped_in_one_job_before_it() -> None:
    bed = Bed(blocks=4, host=4)
    bed.save(sequence(1, 4))
    bed.compute(sequence(2, 4))
    bed.tiers.saver.can_take(4)
    assert [(job.op, len(job.keys)) for job in bed.send()] == [(Op.DROP, 4), (Op.SAVE, 4)]


def test_another_salts_entry_or_a_colliding_digest_is_a_miss() -> None:
    bed = Bed(host=4)
    blocks = sequence(1, 1, OURS, lambda data: b"same")
    bed.save(blocks)
    assert len(bed.tiers.books.find(blocks, 0, 1)) == 1
    assert not bed.tiers.books.find(sequence(1, 1, THEIRS, lambda data: b"same"), 0, 1)
    assert not bed.tiers.books.find(sequence(9, 1, OURS, lambda data: b"same"), 0, 1)
    second = sequence(1, 2, OURS, lambda data: b"same" if data.startswith(ROOT) else b"other")
    assert not bed.tiers.books.find(second, 1, 2)


def test_no_job_saves_more_than_a_batch() -> None:
    bed = Bed(blocks=MAX_BATCH + 8, host=MAX_BATCH + 8)
    bed.compute(sequence(1, MAX_BATCH + 4))
    bed.tiers.saver.can_take(MAX_BATCH + 8)
    [job] = bed.send()
    assert len(job.keys) == MAX_BATCH


@pytest.mark.parametrize(("host", "disk"), [(2, 0), (0, 2), (2, 3)])
def test_copying_comes_to_an_end_where_the_device_holds_more_than_the_tiers(host: int, disk: int) -> None:
    bed = Bed(blocks=10, host=host, disk=disk, reserve=10)
    bed.compute(sequence(1, 8))
    bed.settle()


def test_a_batch_of_one_salt_stays_within_its_share() -> None:
    bed = Bed(blocks=10, host=8, quota=0.25)
    bed.compute(sequence(1, 6, THEIRS))
    bed.tiers.saver.can_take(10)
    for job in bed.send():
        bed.answer(job)
    assert len(bed.held(Tier.HOST)) <= 2


def test_a_demotion_that_became_useless_does_not_take_the_next_one_along() -> None:
    bed = Bed(blocks=4, host=1, disk=4, reserve=1)
    blocks = sequence(1, 1)
    disk: list[TransferJob] = []

    def work() -> None:
        bed.tiers.pump()
        for job in bed.send():
            if job.tier is Tier.DISK:
                disk.append(job)  # the disk is slow
            else:
                bed.answer(job)

    def save_and_demote() -> None:
        bed.compute(blocks)
        bed.tiers.saver.can_take(4)
        work()
        work()

    save_and_demote()
    bed.cache.clear()
    bed.tiers.clear()
    save_and_demote()
    while disk or bed.outbox:
        work()
        if disk:
            bed.answer(disk.pop(0))
    assert bed.held(Tier.DISK) <= bed.stored[Tier.DISK]


def test_collisions_in_the_tiers_are_told() -> None:
    bed = Bed(host=4)
    bed.save(sequence(1, 1, OURS, lambda data: b"same"))
    bed.tiers.books.find(sequence(9, 1, OURS, lambda data: b"same"), 0, 1)
    assert bed.tiers.stats()["collisions"] == 1
