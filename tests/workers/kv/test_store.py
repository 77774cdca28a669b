"""Blocks in the tiers come back as they went in or not at all, whatever happens to their files."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.store import DiskStore, HostStore, disk_block_bytes
from headwise.workers.kv.transfer import BlockKey
from tests.workers.kv.kv_blocks import PAYLOAD, SHAPE, file_of, files, holds, key_of, opened, put


def test_the_host_store_keeps_what_is_put_and_gives_slots_away_again() -> None:
    store = HostStore(2, SHAPE, torch.float32)
    a, b, c = (torch.randn(SHAPE) for _ in range(3))
    store.put([b"a"], lambda slots: slots[0].copy_(a))
    store.put([b"b"], lambda slots: slots[0].copy_(b))
    with pytest.raises(InvalidValueError, match=r"^host_kv_blocks=2"):
        store.put([b"c"], lambda slots: slots[0].copy_(c))
    store.drop(b"a")
    store.drop(b"a")
    store.put([b"c"], lambda slots: slots[0].copy_(c))
    for digest, x in ((b"b", b), (b"c", c)):
        held = store.get(digest)
        assert held is not None and torch.equal(held, x) and held is store.get(digest)
    assert store.get(b"a") is None and b"a" not in store and b"b" in store
    assert len(store) == 2 and store.nbytes == 2 * PAYLOAD


def test_a_slot_that_could_not_be_filled_is_free_and_a_block_put_anew_is_another() -> None:
    store = HostStore(1, SHAPE, torch.bfloat16)

    def fail(slots: list[Tensor]) -> None:
        assert b"a" not in store
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.put([b"a"], fail)
    assert len(store) == 0
    store.put([b"a"], lambda slots: slots[0].fill_(1))
    first = store.get(b"a")
    store.put([b"a"], lambda slots: slots[0].fill_(2))
    second = store.get(b"a")
    assert second is not None and second is not first and bool((second == 2).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_bit_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    bits = torch.randint(-(1 << 31), 1 << 31, (PAYLOAD // 4,), dtype=torch.int64).to(torch.int32)
    data = bits.view(dtype)
    with opened(tmp_path) as store:
        store.put(key_of(0), data)
        out = torch.zeros_like(data)
        assert store.get(key_of(0), out)
        assert torch.equal(out.view(torch.int32), bits)
        for wrong in (data[1:], torch.zeros(2 * len(data), dtype=dtype)[::2]):
            with pytest.raises(InvalidValueError, match=r"^data="):
                store.put(key_of(0), wrong)
            with pytest.raises(InvalidValueError, match=r"^out="):
                store.get(key_of(0), wrong)


def test_a_store_finds_its_blocks_again_oldest_first(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        put(store, 3, 1, 2, 0)
        put(store, 1)
        store.drop(key_of(2).digest)
        store.drop(key_of(9).digest)
        expected = [key_of(n) for n in (3, 0, 1)]
        assert store.stored_keys() == expected
    for _ in range(2):
        with opened(tmp_path) as store:
            assert store.stored_keys() == expected and len(store) == 3
            assert all(holds(store, key) for key in expected) and not holds(store, key_of(2))
    with opened(tmp_path, max_blocks=2) as store:
        assert store.stored_keys() == expected[1:]
    assert files(tmp_path) == {file_of(tmp_path, 0), file_of(tmp_path, 1)}


def test_a_second_engine_is_refused_by_name_until_the_first_is_gone(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        put(store, 0)
        with pytest.raises(InvalidValueError, match=r"^disk_kv_path=.*another engine"):
            DiskStore(tmp_path, 1, 2, b"other", PAYLOAD)
        with pytest.raises(InvalidValueError, match=r"^disk_kv_path=.*another engine"):
            DiskStore(tmp_path, 1, 2, b"identity", PAYLOAD)
        other = DiskStore(tmp_path, 0, 2, b"other", PAYLOAD)
        assert holds(store, key_of(0))
        other.close()
        store.close()
        with opened(tmp_path) as again:
            assert len(again) == 1


@pytest.mark.parametrize("path", ["/proc/nothing", "/dev/null", "/dev/null/folder"])
def test_a_folder_that_cannot_be_used_is_refused_by_name(path: str) -> None:
    with pytest.raises(InvalidValueError, match=r"^disk_kv_path=.*cannot be used"):
        DiskStore(path, 0, 1, b"", PAYLOAD)


def test_a_prompt_can_be_read_by_its_owner_only(tmp_path: Path) -> None:
    with opened(tmp_path):
        assert (tmp_path / "rank-1-of-2").stat().st_mode & 0o077 == 0


def test_the_size_on_disk_has_a_bound(tmp_path: Path) -> None:
    for block_size, payload in ((16, PAYLOAD), (64, 4096 - 400), (16, 8192)):
        store = DiskStore(tmp_path / f"{block_size}-{payload}", 0, 1, b"", payload)
        for number in range(64):
            key = key_of(number)
            store.put(BlockKey(key.digest, key.namespace, key.parent, b"t" * 4 * block_size), torch.zeros(payload // 4))
        folder = tmp_path / f"{block_size}-{payload}" / "rank-0-of-1"
        used = sum(file.stat().st_blocks * 512 for file in folder.rglob("*.kv"))
        used += (folder / "journal").stat().st_size * 4  # it may grow so much before it is written anew
        store.close()
        assert 0.4 * 64 * disk_block_bytes(payload, block_size) < used <= 64 * disk_block_bytes(payload, block_size)


def truncate(path: Path) -> None:
    os.truncate(file_of(path, 1), file_of(path, 1).stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(file_of(path, 1), 0)


def lengthen(path: Path) -> None:
    with file_of(path, 1).open("ab") as file:
        file.write(b"x")


def delete(path: Path) -> None:
    file_of(path, 1).unlink()


def replace_by_another(path: Path) -> None:
    shutil.copy(file_of(path, 2), file_of(path, 1))


def make_it_a_folder(path: Path) -> None:
    file_of(path, 1).unlink()
    file_of(path, 1).mkdir()


@pytest.mark.parametrize("reopen", [False, True])
@pytest.mark.parametrize("damage", [truncate, empty, lengthen, delete, replace_by_another, make_it_a_folder])
def test_a_damaged_file_is_a_miss_and_goes(tmp_path: Path, damage: Callable[[Path], None], reopen: bool) -> None:
    with opened(tmp_path) as store:
        put(store, 0, 1, 2)
        damage(tmp_path)
        if reopen:
            store.close()
            store = DiskStore(tmp_path, 1, 2, b"identity", PAYLOAD)
        assert not holds(store, key_of(1))
        assert store.stored_keys() == [key_of(0), key_of(2)] and all(holds(store, key) for key in store.stored_keys())
        assert not file_of(tmp_path, 1).is_file()
        if damage is not make_it_a_folder:
            put(store, 1)
            assert holds(store, key_of(1))
        store.close()


def test_two_files_that_changed_places_are_misses(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        put(store, 1, 2)
        one, two = file_of(tmp_path, 1), file_of(tmp_path, 2)
        kept = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(kept)
        assert not holds(store, key_of(1)) and not holds(store, key_of(2)) and files(tmp_path) == set()


def test_a_flipped_byte_anywhere_is_a_miss(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        put(store, 0)
        whole = file_of(tmp_path, 0).read_bytes()
        for at in range(0, len(whole)):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << at % 8
            file_of(tmp_path, 0).write_bytes(damaged)
            assert not holds(store, key_of(0)), at
            assert len(store) == 0 and files(tmp_path) == set()
            put(store, 0)


def test_another_key_by_the_same_digest_is_a_miss(tmp_path: Path) -> None:
    key = key_of(0)
    for field in ("namespace", "parent", "tokens"):
        fields = {name: getattr(key, name) for name in ("digest", "namespace", "parent", "tokens")}
        forged = BlockKey(**fields | {field: b"\0" * len(fields[field])})
        with opened(tmp_path) as store:
            put(store, 0)
            assert not store.get(forged, torch.zeros(SHAPE))
            assert len(store) == 0 and files(tmp_path) == set()


def test_a_file_of_another_identity_is_a_miss(tmp_path: Path) -> None:
    with opened(tmp_path / "theirs", b"other") as theirs, opened(tmp_path / "ours") as ours:
        put(theirs, 0)
        put(ours, 0)
        shutil.copy(file_of(tmp_path / "theirs", 0), file_of(tmp_path / "ours", 0))
        assert not holds(ours, key_of(0)) and holds(theirs, key_of(0))


def test_an_older_file_of_the_same_key_is_a_miss(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.put(key_of(0), torch.zeros(SHAPE))
        older = file_of(tmp_path, 0).read_bytes()
        put(store, 0)
        file_of(tmp_path, 0).write_bytes(older)
        assert not store.get(key_of(0), torch.zeros(SHAPE))


def test_a_read_error_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "broken")

    with opened(tmp_path) as store:
        put(store, 0, 1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", fail)
            assert not holds(store, key_of(0))
        assert store.stored_keys() == [key_of(1)] and holds(store, key_of(1))


def test_another_identity_deletes_what_is_ours_and_nothing_else(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        put(store, *range(5))
    folder = tmp_path / "rank-1-of-2"
    name = "ab" + "0" * 62
    foreign = [folder / "notes.txt", folder / "ab" / "notes.kv", folder / "cd" / f"{name}.kv", folder / f"{name}.kv"]
    foreign += [folder / "AB" / f"{name}.kv", tmp_path / "ab" / f"{name}.kv", folder / "ab" / f"{name}.kv.bak"]
    elsewhere = tmp_path / "elsewhere" / f"ef{'0' * 62}.kv"
    ours = [folder / "ab" / f"{name}.kv", folder / "ab" / f"{name}.tmp", folder / "journal.tmp"]
    for file in (*foreign, *ours, elsewhere):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"x")
    shutil.rmtree(folder / "ef", ignore_errors=True)
    (folder / "ef").symlink_to(elsewhere.parent)
    with opened(tmp_path, b"other") as store:
        assert len(store) == 0 and not any(file.exists() for file in ours)
        assert files(tmp_path) == {file for file in foreign if folder in file.parents}
        assert all(file.read_bytes() == b"x" for file in (*foreign, elsewhere))
        put(store, 7)
    with opened(tmp_path) as store:
        assert len(store) == 0
    with opened(tmp_path, b"other") as store:
        assert len(store) == 0
