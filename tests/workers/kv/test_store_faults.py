"""A disk store on a full disk, and after its process was killed: what is left is right."""

from __future__ import annotations

import errno
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from headwise.workers.errors import InvalidValueError
from headwise.workers.kv import journal
from headwise.workers.kv import store as module
from headwise.workers.kv.store import DiskStore
from tests.workers.kv.kv_blocks import PAYLOAD, block_of, file_of, files, holds, key_of, opened, put
from tests.workers.processes import FORKED

ROOT = Path(__file__).parents[3]
BIG = 1 << 20
DEADLINE_S = 60.0


class Killed(BaseException):
    """What no cleanup of the store's catches, as none runs in a process that is killed."""


@dataclass
class Calls:
    """How many were made, and the name of the one that failed first."""

    count: int = 0
    failed: str = ""


def fail_at(patch: pytest.MonkeyPatch, number: int, error: BaseException, lasting: bool) -> Calls:
    """Let the numbered call of those that change a file system fail, a write half done, and with ``lasting`` all
    after it that need space."""
    calls = Calls()

    def failing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.count += 1
            if calls.count == number or (lasting and name != "unlink" and calls.count > number):
                calls.failed = calls.failed or name
                if name == "write":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                raise error
            return real(*args, **kwargs)

        return call

    for name in ("write", "replace", "unlink", "mkdir"):
        patch.setattr(os, name, failing(name, getattr(os, name)))
    return calls


def work(store: DiskStore) -> None:
    """Every way to change a store; a put that fails leaves nothing by that digest."""
    for number in (0, 1, 2, 3, 0, 4):
        key = key_of(number)
        try:
            store.put(key, block_of(key))
        except OSError:
            assert not holds(store, key)
        store.drop(key_of(1).digest)


@pytest.mark.parametrize("lasting", [False, True])
def test_a_disk_that_is_full_at_any_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lasting: bool) -> None:
    monkeypatch.setattr(journal, "_SPARE_RECORDS", -20)  # writes it anew all the time
    number, reached, kept = 0, True, set()
    while reached:
        number += 1
        path = tmp_path / str(number)
        with monkeypatch.context() as patch:
            calls = fail_at(patch, number, OSError(errno.ENOSPC, "No space left on device"), lasting)
            try:
                store = DiskStore(path, 1, 2, b"identity", PAYLOAD)
            except InvalidValueError:
                assert calls.failed == "mkdir"  # the folder itself
                continue
            work(store)
            reached = bool(calls.failed)
        left = store.stored_keys()
        kept.add(len(left))
        assert all(holds(store, key) for key in left)
        if calls.failed != "unlink":
            assert files(path) == {file_of(path, n) for n in range(5) if key_of(n) in left}
        put(store, 8)  # there is space again
        store.close()
        with opened(path) as store:
            assert store.stored_keys() == [*left, key_of(8)] and all(holds(store, key) for key in store.stored_keys())
            assert len(files(path)) == len(left) + 1
    assert number > 30 and kept == ({0, 1, 2, 3, 4} if lasting else {3, 4})


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_process_that_ends_at_any_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_SPARE_RECORDS", -20)
    number, reached, kept = 0, True, set()
    while reached:
        number += 1
        path = tmp_path / str(number)
        store: DiskStore | None = None
        with monkeypatch.context() as patch:
            killed = Killed()
            calls = fail_at(patch, number, killed, lasting=False)
            try:
                store = DiskStore(path, 1, 2, b"identity", PAYLOAD)
                work(store)
            except Killed:
                killed.__traceback__ = None  # a half-made store ends here, and its lock with it
            reached = bool(calls.failed)
        if store is not None:
            store.close()
        with opened(path) as store:
            left = store.stored_keys()
            kept.add(len(left))
            assert all(holds(store, key) for key in left) and store.stored_keys() == left
            assert files(path) == {file_of(path, n) for n in range(5) if key_of(n) in left}
    assert number > 30 and kept == {0, 1, 2, 3, 4}


def test_a_device_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as store:
        put(store, 0)
        for number in (0, 1):
            with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
                patch.setattr(module, "private", lambda path, flags: os.open("/dev/full", flags))
                put(store, number)
            assert not holds(store, key_of(number))
        put(store, 1)
        assert store.stored_keys() == [key_of(1)] and holds(store, key_of(1))


def fill(path: Path) -> None:
    """Put blocks until the disk takes no more, which must happen; then everything is as it should be."""
    journal._SPARE_RECORDS = 10
    stored = []
    with opened(path) as store:
        for number in range(3000):
            try:
                put(store, number)
            except OSError:
                break
            stored.append(key_of(number))
        assert stored and store.stored_keys() == stored and all(holds(store, key) for key in stored)
        assert len(files(path)) == len(stored) < 3000
        for key in stored[::2]:
            store.drop(key.digest)
    with opened(path) as store:
        assert store.stored_keys() == stored[1::2] and all(holds(store, key) for key in stored[1::2])
        put(store, 5000)
        assert holds(store, key_of(5000))
    print("filled")


def filled(path: Path, *prefix: str, before: Callable[[], None] | None = None) -> bool:
    code = (
        f"from pathlib import Path; from tests.workers.kv.{Path(__file__).stem} import fill; fill(Path({str(path)!r}))"
    )
    command = [*prefix, sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, preexec_fn=before, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "filled\n", done.stderr
    return True


def test_files_that_may_not_grow(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    assert filled(tmp_path, before=limit)


def test_a_small_disk(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=100k none {tmp_path}"
    alone = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*alone, mount], capture_output=True, timeout=10, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    assert filled(tmp_path, *alone, f'{mount} && exec "$@"', "sh")


def write_forever(path: Path, told: Connection) -> None:
    """Put and drop big blocks, telling of each put."""
    store = DiskStore(path, 1, 2, b"identity", BIG)
    number = 0
    while True:
        key = key_of(number % 12)
        store.put(key, torch.full((BIG // 4,), float(number % 12)))
        store.drop(key_of((number + 5) % 12).digest)
        told.send_bytes(b"put")
        number += 1


def test_a_process_that_is_killed(tmp_path: Path) -> None:
    for _ in range(4):
        here, there = FORKED.Pipe(duplex=False)
        writer = FORKED.Process(target=write_forever, args=(tmp_path, there), daemon=True)
        writer.start()
        try:
            for _ in range(30):
                assert here.poll(DEADLINE_S) and here.recv_bytes() == b"put"
            with pytest.raises(InvalidValueError, match="another engine"):
                DiskStore(tmp_path, 1, 2, b"identity", BIG)
            time.sleep(random.random() * 0.01)  # so that it is anywhere in its work
        finally:
            writer.kill()
            writer.join(DEADLINE_S)
            here.close()
            there.close()
        store = DiskStore(tmp_path, 1, 2, b"identity", BIG)
        out = torch.zeros(BIG // 4)
        left = store.stored_keys()
        assert len(left) >= 4
        for key in left:
            assert store.get(key, out) and bool((out == int(key.tokens[: len(key.tokens) // 4])).all())
        assert len(files(tmp_path)) == len(left)
        store.close()
