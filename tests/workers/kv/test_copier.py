"""Jobs move the right bytes between the device and its tiers, are answered once and in order, and survive failures."""

from __future__ import annotations

import errno
import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headwise.workers.kv.cache import KVCache
from headwise.workers.kv.copier import Copier
from headwise.workers.kv.format import KvFormat, kv_format
from headwise.workers.kv.store import DiskStore, HostStore
from headwise.workers.kv.transfer import BlockKey, Op, Tier, TransferJob, TransferResult
from tests.workers.kv.kv_blocks import file_of, key_of

HOST_BLOCKS = 3
DEADLINE_S = 10.0


class Tiers:
    """A cache of 8 blocks with random content, both tiers and the copier between them."""

    def __init__(self, path: Path, transposed_keys: bool, format: KvFormat | None = None) -> None:
        self.cache = KVCache(3, 8, 2, 4, 16, torch.float32, transposed_keys=transposed_keys, format=format)
        for x in (self.cache.keys, self.cache.values):
            x.random_(256) if x.dtype == torch.uint8 else x.normal_()
        self.path = path
        self.host = HostStore(HOST_BLOCKS, self.cache.block_shape, self.cache.dtype)
        self.disk = DiskStore(path, 1, 2, b"identity", self.cache.nbytes // 8)
        self.results: queue.SimpleQueue[TransferResult] = queue.SimpleQueue()
        self.failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        self.copier = Copier(self.cache, self.host, self.disk, self.results.put, self.failures.put)
        self._jobs = 0

    def submit(self, op: Op, tier: Tier, keys: list[BlockKey], blocks: list[int] | None = None) -> int:
        self._jobs += 1
        self.copier.submit(TransferJob(self._jobs, op, tier, keys, blocks or []))
        return self._jobs

    def result(self) -> TransferResult:
        return self.results.get(timeout=DEADLINE_S)

    def run(self, op: Op, tier: Tier, keys: list[BlockKey], blocks: list[int] | None = None) -> list[bytes]:
        """The digests that failed."""
        number = self.submit(op, tier, keys, blocks)
        result = self.result()
        assert result.id == number and 0 < result.seconds < DEADLINE_S
        return result.failed

    def content(self) -> Tensor:
        content = torch.empty(8, *self.cache.block_shape, dtype=self.cache.dtype)
        self.cache.read_blocks(range(8), content)
        return content

    def close(self) -> None:
        assert self.copier.close() and self.failures.empty()
        self.disk.close()


@pytest.fixture(params=[False, True], ids=["plain", "transposed_keys"])
def tiers(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Tiers]:
    before = threading.active_count()
    made = Tiers(tmp_path, request.param)
    yield made
    made.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("tier", list(Tier))
def test_what_was_saved_is_loaded_into_any_block_and_nothing_else_changes(tiers: Tiers, tier: Tier) -> None:
    content, keys = tiers.content(), [key_of(0), key_of(1)]
    assert tiers.run(Op.SAVE, tier, keys, [5, 2]) == []
    assert torch.equal(tiers.content(), content)
    tiers.cache.keys[:, [5, 2]] = tiers.cache.values[:, [5, 2]] = float("nan")
    assert tiers.run(Op.LOAD, tier, keys[::-1], [0, 7]) == []
    left = tiers.content()
    assert torch.equal(left[[0, 7]], content[[2, 5]])
    assert torch.equal(left[[1, 3, 4, 6]], content[[1, 3, 4, 6]]) and bool(left[[2, 5]].isnan().all())


@pytest.mark.parametrize("name", ["int8", "int8/int4", "bfloat16"])
def test_every_form_of_keys_and_values_goes_through_the_tiers(tmp_path: Path, name: str) -> None:
    tiers = Tiers(tmp_path, transposed_keys=True, format=kv_format(name, 16))
    content, keys = tiers.content(), [key_of(0), key_of(1)]
    assert tiers.run(Op.SAVE, Tier.HOST, keys, [5, 2]) == []
    assert tiers.run(Op.DEMOTE, Tier.DISK, keys) == []
    for places, tier in zip(([0, 7], [1, 6]), Tier, strict=True):
        assert tiers.run(Op.LOAD, tier, keys, places) == []
        assert torch.equal(tiers.content()[places], content[[5, 2]])
    assert torch.equal(tiers.content()[2:6], content[2:6])
    tiers.close()


def test_a_demoted_block_is_in_both_tiers_until_it_is_dropped(tiers: Tiers) -> None:
    content, key = tiers.content(), key_of(0)
    assert tiers.run(Op.SAVE, Tier.HOST, [key], [4]) == []
    assert tiers.run(Op.DEMOTE, Tier.DISK, [key]) == []
    for block, tier in enumerate(Tier):
        assert tiers.run(Op.LOAD, tier, [key], [block]) == []
        assert torch.equal(tiers.content()[block], content[4])
    for tier in Tier:
        assert tiers.run(Op.DROP, tier, [key, key_of(9)]) == []
        assert tiers.run(Op.LOAD, tier, [key], [3]) == [key.digest]
    assert len(tiers.host) == len(tiers.disk) == 0
    assert tiers.run(Op.DEMOTE, Tier.DISK, [key]) == [key.digest]
    assert torch.equal(tiers.content()[3], content[3])


def test_a_key_that_fails_is_told_and_the_others_move(tiers: Tiers) -> None:
    content, keys = tiers.content(), [key_of(n) for n in range(4)]
    assert tiers.run(Op.SAVE, Tier.DISK, keys[:3], [0, 1, 2]) == []
    os.truncate(file_of(tiers.path, 1), 100)
    assert tiers.run(Op.LOAD, Tier.DISK, keys, [4, 5, 6, 7]) == [keys[1].digest, keys[3].digest]
    assert torch.equal(tiers.content()[[4, 5, 6, 7]], content[[0, 5, 2, 7]])


def test_what_the_disk_does_not_take_is_told_and_not_there(tiers: Tiers, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, real = [key_of(n) for n in range(3)], os.replace

    def replace(source: Path, target: Path) -> None:
        if keys[1].digest.hex() in str(source):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    assert tiers.run(Op.SAVE, Tier.HOST, keys, [0, 1, 2]) == []
    monkeypatch.setattr(os, "replace", replace)
    for op, blocks in ((Op.SAVE, [0, 1, 2]), (Op.DEMOTE, [])):
        assert tiers.run(op, Tier.DISK, keys, blocks) == [keys[1].digest]
        assert tiers.disk.stored_keys() == [keys[0], keys[2]] and len(tiers.host) == 3


@pytest.mark.parametrize(
    ("op", "tier", "blocks"),
    [
        (Op.SAVE, Tier.HOST, [0, 1, 8]),
        (Op.SAVE, Tier.DISK, [0, 1, -1]),
        (Op.SAVE, Tier.HOST, [0, 1]),
        (Op.LOAD, Tier.DISK, [0]),
        (Op.LOAD, Tier.HOST, []),
    ],
)
def test_an_unexpected_error_fails_the_job_and_is_logged_in_one_line(
    tiers: Tiers, caplog: pytest.LogCaptureFixture, op: Op, tier: Tier, blocks: list[int]
) -> None:
    keys = [BlockKey(key_of(n).digest, b"", b"", b"secret prompt") for n in range(3)]
    if op == Op.LOAD:
        assert tiers.run(Op.SAVE, tier, keys, [1, 2, 3]) == []
    assert tiers.run(op, tier, keys, blocks) == [key.digest for key in keys]
    assert len(caplog.records) == 1 and "\n" not in caplog.text.strip() and "secret" not in caplog.text
    assert f"({op.name}, {tier})" in caplog.text
    assert len(tiers.host) == (HOST_BLOCKS if (op, tier) == (Op.LOAD, Tier.HOST) else 0)
    assert tiers.run(Op.SAVE, tier, keys, [1, 2, 3]) == []


def test_more_than_the_host_holds_fails_and_takes_no_slot(tiers: Tiers, caplog: pytest.LogCaptureFixture) -> None:
    keys = [key_of(n) for n in range(HOST_BLOCKS + 1)]
    assert tiers.run(Op.SAVE, Tier.HOST, keys, [0, 1, 2, 3]) == [key.digest for key in keys]
    assert "host_kv_blocks=3" in caplog.text and len(tiers.host) == 0
    assert tiers.run(Op.SAVE, Tier.HOST, keys[1:], [0, 1, 2]) == []


def test_a_block_that_changed_while_it_was_demoted_is_not_on_the_disk(
    tiers: Tiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, real = key_of(0), DiskStore.put
    assert tiers.run(Op.SAVE, Tier.HOST, [key], [0]) == []

    def put(self: DiskStore, key: BlockKey, data: Tensor) -> None:
        real(self, key, data)
        tiers.host.put([key.digest], lambda slots: slots[0].fill_(1))

    monkeypatch.setattr(DiskStore, "put", put)
    assert tiers.run(Op.DEMOTE, Tier.DISK, [key]) == [key.digest]
    assert len(tiers.disk) == 0


def test_results_come_in_order_and_memory_does_not_wait_for_the_disk(
    tiers: Tiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go, real = threading.Event(), threading.Event(), DiskStore.put

    def put(self: DiskStore, key: BlockKey, data: Tensor) -> None:
        reached.set()
        assert go.wait(DEADLINE_S)
        real(self, key, data)

    monkeypatch.setattr(DiskStore, "put", put)
    on_disk = [tiers.submit(Op.SAVE, Tier.DISK, [key_of(n)], [n]) for n in range(5)]
    assert reached.wait(DEADLINE_S)
    in_host = [tiers.submit(Op.DROP, Tier.HOST, [key_of(n)]) for n in range(50)]
    assert [tiers.result().id for _ in in_host] == in_host
    go.set()
    assert [tiers.result().id for _ in on_disk] == on_disk


def test_results_are_told_one_at_a_time(tmp_path: Path) -> None:
    tiers, inside, most = Tiers(tmp_path, False), [0], [0]
    told: queue.SimpleQueue[int] = queue.SimpleQueue()

    def done(result: TransferResult) -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        told.put(result.id)
        threading.Event().wait(0.0005)  # lets the other thread come in, if it can
        inside[0] -= 1

    copier = Copier(tiers.cache, tiers.host, tiers.disk, done, tiers.failures.put)
    for number in range(60):
        copier.submit(TransferJob(number, Op.DROP, list(Tier)[number % 2], [key_of(number)]))
    assert sorted(told.get(timeout=DEADLINE_S) for _ in range(60)) == list(range(60))
    assert copier.close() and most == [1]
    tiers.close()


def test_a_result_that_cannot_be_told_is_a_failure(tiers: Tiers) -> None:
    def done(result: TransferResult) -> None:
        raise ConnectionError("nobody there")

    failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
    copier = Copier(tiers.cache, tiers.host, tiers.disk, done, failures.put)
    copier.submit(TransferJob(0, Op.DROP, Tier.HOST, [key_of(0)]))
    assert isinstance(failures.get(timeout=DEADLINE_S), ConnectionError)
    assert copier.close()


def test_a_job_that_cannot_be_cleaned_up_after_is_a_failure(tiers: Tiers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers.host, "drop", lambda digest: 1 / 0)
    tiers.submit(Op.SAVE, Tier.HOST, [key_of(0)], [99])
    assert isinstance(tiers.failures.get(timeout=DEADLINE_S), ZeroDivisionError)
    assert tiers.results.empty()


def test_without_a_tier_its_jobs_fail(tiers: Tiers) -> None:
    key, results = key_of(0), queue.SimpleQueue[TransferResult]()
    for host, disk in ((None, tiers.disk), (tiers.host, None), (None, None)):
        copier = Copier(tiers.cache, host, disk, results.put, tiers.failures.put)
        for op, tier, store in (
            (Op.SAVE, Tier.HOST, host),
            (Op.LOAD, Tier.HOST, host),
            (Op.SAVE, Tier.DISK, disk),
            (Op.LOAD, Tier.DISK, disk),
            (Op.DEMOTE, Tier.DISK, None),  # needs both
        ):
            copier.submit(TransferJob(0, op, tier, [key], [0]))
            assert results.get(timeout=DEADLINE_S).failed == ([] if store is not None else [key.digest])
        assert copier.close()


def test_closing_ends_what_is_queued(tiers: Tiers) -> None:
    jobs = [tiers.submit(Op.SAVE, Tier.DISK, [key_of(n)], [n % 8]) for n in range(20)]
    assert tiers.copier.close(DEADLINE_S) and tiers.copier.close()
    assert [tiers.result().id for _ in jobs] == jobs
    assert [key.digest for key in tiers.disk.stored_keys()] == [key_of(n).digest for n in range(20)]
    tiers.submit(Op.SAVE, Tier.DISK, [key_of(30)], [0])
    assert tiers.results.empty() and len(tiers.disk) == 20


def test_closing_abandons_what_takes_too_long(tiers: Tiers, monkeypatch: pytest.MonkeyPatch) -> None:
    reached, go, real = threading.Event(), threading.Event(), DiskStore.put
    wait: Callable[..., Any] = go.wait

    def put(self: DiskStore, key: BlockKey, data: Tensor) -> None:
        reached.set()
        assert wait(DEADLINE_S)
        real(self, key, data)

    monkeypatch.setattr(DiskStore, "put", put)
    tiers.submit(Op.SAVE, Tier.DISK, [key_of(0), key_of(1)], [0, 1])
    tiers.submit(Op.SAVE, Tier.DISK, [key_of(2)], [2])
    assert reached.wait(DEADLINE_S)
    assert not tiers.copier.close(0.05)
    go.set()
    assert tiers.copier.close()
    assert tiers.results.empty() and tiers.disk.stored_keys() == [key_of(0)]
