"""Memory that one process writes and another reads: an anonymous file, which is gone with the last process that has it
open, however that ends, and which has no name in any folder."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import stat
from pathlib import Path

FILE_BYTES = 32 << 20
"""What a SharedFile is good for: with more, what is written would no longer be in the CPU's cache when it is read."""

_NAME = "headwise-kv"
# None can make it smaller under a reader, who would then be killed by SIGBUS.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SharedFile:
    """The writer's end.

    Attributes:
        view: its bytes.
    """

    def __init__(self, size: int) -> None:
        """
        Raises:
            OSError: this host has none, or no memory for it.
        """
        self._fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(self._fd, 0, size)  # no memory is an error here, and a signal later
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
            self._map = mmap.mmap(self._fd, size)
        except BaseException:
            os.close(self._fd)
            raise
        self.view = memoryview(self._map)

    @property
    def place(self) -> tuple[int, int]:
        """(pid, fd), by which another process of this user finds it."""
        return os.getpid(), self._fd

    def close(self) -> None:
        """Idempotent. A reader that has it open keeps what is in it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            with contextlib.suppress(BufferError):  # a thread still writes: the memory goes once it does not
                self.view.release()
                self._map.close()


class SharedReader:
    """The reader's end: copies out, so that what was checked is what is used, whatever the writer does meanwhile."""

    def __init__(self, pid: int, fd: int) -> None:
        """
        Raises:
            OSError: there is no SharedFile, or none that this process may read.
        """
        self.place = pid, fd
        path = f"/proc/{pid}/fd/{fd}"
        if not os.readlink(path).startswith(
            f"/memfd:{_NAME}"
        ):  # before it is opened: opening a device may do something
            raise OSError("it is no memory of a handoff")
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self._buffer = bytearray()
        try:
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode) or fcntl.fcntl(self._fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise OSError("its size is not sealed")
        except OSError:
            self.close()
            raise

    def read(self, offset: int, size: int) -> memoryview:
        """Bytes of it, fewer where it has no more; good until the next call."""
        if len(self._buffer) < size:
            self._buffer = bytearray(size)
        view = memoryview(self._buffer)[:size]
        return view[: os.preadv(self._fd, [view], offset)]

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def host_id() -> bytes:
    """Equal for processes that can open each other's SharedFile; empty where there are none."""
    if not hasattr(os, "memfd_create"):
        return b""
    try:
        boot, namespace = Path("/proc/sys/kernel/random/boot_id").read_bytes(), os.readlink("/proc/self/ns/pid")
        SharedFile(mmap.PAGESIZE).close()
    except OSError:
        return b""
    return hashlib.sha256(boot + namespace.encode() + b"%d" % os.getuid()).digest()[:16]
