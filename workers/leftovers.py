"""Folders of sockets and files of shared memory, which outlive a process that is killed.

Whoever makes one keeps it locked as long as it is needed. What nobody has locked is left over, and :func:`sweep`
removes it. The lock (flock) ends with its process, however that ends, and holds in other containers that see the same
folder. No process id is needed, which another process may have by then.

A process that has folders of sockets has a *warden*, too: a process of its own, which sweeps when the other is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable
from pathlib import Path

from headwise.workers.errors import InvalidValueError
from headwise.workers.processes import ProcessId

_PREFIX = "headwise-"
_NAME = re.compile(_PREFIX + "[a-z0-9_]{8}")
"""As the module tempfile makes them."""
_MAX_SOCKET_FOLDER = 100
"""Bytes of its path. A Unix socket's path has at most 107; the file's name takes a few."""
_SWEEP_S = 5.0
"""For ranks to end once their engine is gone."""


class SocketFolder:
    """A new folder for sockets with mode 0700, where their paths fit.

    Attributes:
        path: of the folder.
    """

    def __init__(self) -> None:
        """
        Raises:
            InvalidValueError: the folder for temporary files has too long a path, and there is no /tmp.
        """
        parent = _socket_parent()
        self._lock = -1
        while self._lock < 0:  # until it is locked before somebody takes it for left over
            self.path = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
            self._lock = _lock(self.path, os.O_DIRECTORY, make=True)
        _own.add(self)
        _warden.enter()

    def close(self) -> None:
        """Removes the folder and what is in it. Idempotent."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1
            _warden.leave()


_own: weakref.WeakSet[SocketFolder] = weakref.WeakSet()


def remove_own() -> None:
    """Removes all folders of sockets of this process, which is about to end, where its warden may be killed with it."""
    for folder in [*_own]:
        if folder._lock >= 0:
            shutil.rmtree(folder.path, ignore_errors=True)


class SharedMemoryFile:
    """A new file for shared memory, readable by this user only, with every byte reserved. It is locked as long as this
    object is there; whoever has attached to it removes it.

    Attributes:
        path: of the file.
    """

    def __init__(self, size: int) -> None:
        """
        Raises:
            OSError: the folder does not have the space.
        """
        while True:
            descriptor, self.path = tempfile.mkstemp(prefix=_PREFIX, dir=shared_memory_folder())
            finalizer = weakref.finalize(self, os.close, descriptor)
            if _locked(descriptor, self.path):
                break
            finalizer()
        try:
            # A sparse file would raise SIGBUS in the middle of a step where the folder is full.
            os.posix_fallocate(descriptor, 0, size)
        except OSError:
            os.unlink(self.path)
            raise


def shared_memory_folder() -> str:
    return "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()


def sweep(folders: Iterable[str] = ()) -> list[str]:
    """Removes what killed processes of this user have left; touches nothing that a process still has, and nothing that
    is not of this module's making: regular files in the folder of shared memory, and folders that hold only sockets.

    Args:
        folders: where else sockets may be, beside this process's folders for temporary files.

    Returns:
        The paths that are gone.
    """
    swept = []
    for parent in {tempfile.gettempdir(), "/tmp", shared_memory_folder(), *folders}:
        with contextlib.suppress(OSError):
            for entry in os.scandir(parent):
                with contextlib.suppress(OSError):
                    if _NAME.fullmatch(entry.name) and _sweep_one(Path(entry), parent):
                        swept.append(entry.path)
    return swept


class _Warden:
    """Runs ``python -P -m headwise.workers.leftovers`` as long as this process has folders of sockets."""

    def __init__(self) -> None:
        self._lock, self._folders = threading.RLock(), 0
        self._process: subprocess.Popen[bytes] | None = None

    def enter(self) -> None:
        with self._lock:
            self._folders += 1
            if self._folders > 1:
                return
            command = [sys.executable, "-P", "-m", "headwise.workers.leftovers", str(os.getpid())]
            null = subprocess.DEVNULL
            # Without one, as where there is no memory for it, ranks and the next engine sweep.
            with contextlib.suppress(OSError):
                self._process = subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True)

    def leave(self) -> None:
        with self._lock:
            self._folders -= 1
            process = self._process
            if self._folders or process is None:
                return
            self._process = None
        process.kill()
        process.wait()


_warden = _Warden()


def _sweep_after(pid: int) -> None:
    """Waits for the end of the process that started this one, and sweeps while others end that it takes with it."""
    try:
        parent = ProcessId.of(pid)
        if os.getppid() == pid:
            parent.await_end()
    except ProcessLookupError:
        pass
    deadline = time.monotonic() + _SWEEP_S
    while time.monotonic() < deadline:
        sweep()
        time.sleep(0.1)


def _sweep_one(path: Path, parent: str) -> bool:
    """Whether it was left over, and is gone."""
    state = path.lstat()
    folder = stat.S_ISDIR(state.st_mode)
    if state.st_uid != os.geteuid() or not (
        folder or (stat.S_ISREG(state.st_mode) and parent == shared_memory_folder())
    ):
        return False
    lock = _lock(path, os.O_DIRECTORY if folder else 0, make=False)
    if lock < 0:
        return False
    try:
        if not folder:
            path.unlink()
            return True
        if all(stat.S_ISSOCK(entry.lstat().st_mode) for entry in path.iterdir()):
            shutil.rmtree(path)
            return True
        return False
    finally:
        os.close(lock)


def _socket_parent() -> str:
    for parent in (tempfile.gettempdir(), "/tmp"):
        if len(os.path.join(parent, f"{_PREFIX}12345678")) < _MAX_SOCKET_FOLDER and os.path.isdir(parent):
            return parent
    limit = f"is too long a path for sockets; at most {_MAX_SOCKET_FOLDER} bytes"
    raise InvalidValueError("TMPDIR", tempfile.gettempdir(), limit)


def _lock(path: str | Path, flags: int, make: bool) -> int:
    """Opens and locks it, as :func:`_locked`; -1 if that fails."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    except FileNotFoundError:
        return -1
    if _locked(descriptor, path, make):
        return descriptor
    os.close(descriptor)
    return -1


def _locked(descriptor: int, path: str | Path, make: bool = True) -> bool:
    """Locks a file; False if another process has it locked, or has removed it.

    Args:
        make: True also where files cannot be locked: nobody can, so nobody sweeps there.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:  # such as EBADF of NFS, which locks nothing that is open for reading alone
        return make


if __name__ == "__main__":
    _sweep_after(int(sys.argv[1]))
