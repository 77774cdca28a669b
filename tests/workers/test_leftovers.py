"""What a killed process leaves is removed, and nothing else is."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headwise.workers import leftovers
from headwise.workers.leftovers import SharedMemoryFile, SocketFolder, remove_own, sweep
from tests.effort import thorough

DEADLINE_S = 30.0
OWNER = """
import socket, sys, time
from headwise.workers import leftovers
leftovers._socket_parent = leftovers.shared_memory_folder = lambda: sys.argv[1]
folder, file = leftovers.SocketFolder(), leftovers.SharedMemoryFile(4096)
one = socket.socket(socket.AF_UNIX)
one.bind(f"{folder.path}/one")
print(folder.path, file.path, flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of the test's own for sockets and for shared memory."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(leftovers, "_socket_parent", lambda: str(tmp_path))
    monkeypatch.setattr(leftovers, "shared_memory_folder", lambda: str(tmp_path))
    return tmp_path


@pytest.fixture
def owner(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A process and the paths of what it has."""
    command = [*getattr(request, "param", []), sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            paths = process.stdout.readline().split()
            if not paths and command[0] != sys.executable:
                pytest.skip(f"{command[0]} is not allowed here")
            yield process, paths
        finally:
            process.kill()


@pytest.mark.parametrize("owner", [[], thorough(["unshare", "--pid", "--fork", "--kill-child"])], indirect=True)
def test_of_a_process_that_lives_and_is_then_killed(owner: tuple[subprocess.Popen[str], list[str]]) -> None:
    """In other namespaces too, where its process id means nothing here."""
    process, paths = owner
    assert len(paths) == 2 and not set(sweep()) & set(paths)
    assert all(map(os.path.exists, paths))
    process.kill()
    process.wait(DEADLINE_S)
    deadline = time.monotonic() + DEADLINE_S
    while any(map(os.path.exists, paths)):  # a child of unshare's may take a moment to end
        assert time.monotonic() < deadline
        sweep()


def test_nothing_of_this_process_is_swept_while_it_needs_it(temporary: Path) -> None:
    folder, file = SocketFolder(), SharedMemoryFile(4096)
    assert stat.S_IMODE(os.stat(folder.path).st_mode) == 0o700 and os.stat(file.path).st_size == 4096
    assert sweep() == []
    folder.close()
    folder.close()
    path = file.path
    del file  # whoever attaches removes it before
    assert sweep() == [path]
    assert list(temporary.iterdir()) == []


def test_a_process_that_ends_removes_its_own_without_its_warden(temporary: Path) -> None:
    folder, closed = SocketFolder(), SocketFolder()
    closed.close()
    Path(closed.path).mkdir()  # another's by now
    remove_own()
    assert not Path(folder.path).exists() and Path(closed.path).exists()
    folder.close()


def test_what_is_not_ours_stays(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as two:
        (temporary / "headwise-12345678").mkdir()  # has more than sockets
        one.bind(str(temporary / "headwise-12345678" / "one"))
        (temporary / "headwise-12345678" / "notes").touch()
        (temporary / "headwise-warm-up-12345678").mkdir()
        (temporary / "headwise-abcdefgh").symlink_to(elsewhere)
        two.bind(str(temporary / "headwise-11111111"))
        before = set(temporary.rglob("*"))
        assert sweep() == []
        monkeypatch.setattr(leftovers, "shared_memory_folder", lambda: str(elsewhere))
        (temporary / "headwise-22222222").touch()  # a file, and not in the folder of shared memory
        assert sweep() == [] and set(temporary.rglob("*")) == before | {temporary / "headwise-22222222"}


def test_what_is_another_users_stays(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (temporary / "headwise-12345678").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert sweep() == []


def test_one_that_is_swept_before_it_is_locked_is_made_again(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def make(make_one: Any) -> Any:
        def hurried(*args: Any, **options: Any) -> Any:
            one = make_one(*args, **options)
            made.append(one if isinstance(one, str) else one[1])
            if len(made) % 2:
                assert sweep() == made[-1:]
            return one

        return hurried

    monkeypatch.setattr(tempfile, "mkdtemp", make(tempfile.mkdtemp))
    monkeypatch.setattr(tempfile, "mkstemp", make(tempfile.mkstemp))
    folder, file = SocketFolder(), SharedMemoryFile(1)
    assert made[1::2] == [folder.path, file.path] and len(made) == 4
    assert all(map(os.path.exists, made[1::2]))
    folder.close()
    os.unlink(file.path)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EBADF])  # the latter is what NFS says
def test_where_nothing_can_be_locked_nothing_is_swept(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refusals: list[int] = []

    def refuse(*_: Any) -> None:
        refusals.append(number)
        assert len(refusals) < 10, "folders are made without end"
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    folder = SocketFolder()
    assert sweep() == [] and os.path.exists(folder.path)
    folder.close()
    assert not os.path.exists(folder.path)


def test_a_folder_without_space_leaves_no_file(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="no space"):
        SharedMemoryFile(4096)
    assert list(temporary.iterdir()) == []


def test_a_warden_sweeps_when_its_process_is_killed(tmp_path: Path) -> None:
    """And ends with the last folder of a process that lives."""
    one, two = SocketFolder(), SocketFolder()
    warden = leftovers._warden._process
    assert warden is not None
    one.close()
    assert warden.poll() is None
    two.close()
    assert warden.poll() is not None
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        folder, _ = process.stdout.readline().split()
        process.kill()
    deadline = time.monotonic() + DEADLINE_S
    while os.path.exists(folder):
        assert time.monotonic() < deadline
        time.sleep(0.01)
