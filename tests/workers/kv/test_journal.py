"""The journal of a disk store tells what is stored, and is believed as far as it is whole."""

from __future__ import annotations

import os
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from headwise.workers.kv import journal
from tests.workers.kv.kv_blocks import file_of, files, holds, key_of, opened, put


def test_the_journal_does_not_grow_with_what_was_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_SPARE_RECORDS", 20)
    path = tmp_path / "rank-1-of-2" / "journal"
    with opened(tmp_path) as store:
        put(store, 0, 1)
        sizes = []
        for number in range(2, 100):
            put(store, number)
            store.drop(key_of(number).digest)
            sizes.append(path.stat().st_size)
        assert max(sizes) < 40 * 200
        assert any(after < before for before, after in pairwise(sizes))
        assert store.stored_keys() == [key_of(0), key_of(1)]
    with opened(tmp_path) as store:
        assert store.stored_keys() == [key_of(0), key_of(1)]


@pytest.mark.parametrize("content", [None, b"", b"\0" * 100, os.urandom(1000), b"\xdf\xff\xff\xff\xff", b"\x91" * 5000])
def test_without_a_journal_nothing_is_stored(tmp_path: Path, content: bytes | None) -> None:
    with opened(tmp_path) as store:
        put(store, 0, 1)
    path = tmp_path / "rank-1-of-2" / "journal"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with opened(tmp_path) as store:
        assert store.stored_keys() == [] and files(tmp_path) == set()
        put(store, 1)
    with opened(tmp_path) as store:
        assert store.stored_keys() == [key_of(1)] and holds(store, key_of(1))


def test_what_comes_before_damage_in_the_journal_counts(tmp_path: Path) -> None:
    with opened(tmp_path / "made") as store:
        put(store, 0, 1)
        store.drop(key_of(0).digest)
        put(store, 2)
        whole = (tmp_path / "made" / "rank-1-of-2" / "journal").read_bytes()
    seen = set()
    for at in range(0, len(whole), 3):
        cut, flipped = whole[:at], bytearray(whole)
        flipped[at] ^= 0x40
        for content in (cut, bytes(flipped), cut + os.urandom(50), cut + b"\0" * 50):
            path = tmp_path / "damaged"
            shutil.copytree(tmp_path / "made", path)
            (path / "rank-1-of-2" / "journal").write_bytes(content)
            with opened(path) as store:
                left = store.stored_keys()
                assert left in ([], [key_of(1)], [key_of(1), key_of(2)])
                assert all(holds(store, key) for key in left)
                put(store, 5)
            with opened(path) as store:
                assert store.stored_keys() == [*left, key_of(5)] and files(path) >= {file_of(path, 5)}
                assert len(files(path)) == len(left) + 1
            seen.add(len(left))
            shutil.rmtree(path)
    assert seen == {0, 1}  # the last record is never whole here


def test_a_record_of_another_form_ends_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "rank-1-of-2" / "journal"
    for fields in ((), (1,), (b"x", 1, b"", b"", b""), (b"x", b"y"), 5, [[[[1]]]], None):
        with opened(tmp_path) as store:
            put(store, 0)
        with path.open("ab") as file:
            file.write(journal._record(fields))  # type: ignore[arg-type]
        with opened(tmp_path) as store:
            assert store.stored_keys() == [key_of(0)] and holds(store, key_of(0))
