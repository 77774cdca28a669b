"""Processes of this host, told apart from those that have their ids later."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from dataclasses import dataclass
from pathlib import Path

_LOOK_S = 0.5
"""How often it is looked for a process of whose end the system does not tell."""


@dataclass(frozen=True, slots=True)
class ProcessId:
    """Names one process for good.

    Attributes:
        born: when it was started, in the kernel's ticks.
        place: equal for processes that see each other under the same ids.
    """

    pid: int
    born: int
    place: str

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """
        Raises:
            ProcessLookupError: there is no such process.
        """
        born = _born(pid)
        if born is None:
            raise ProcessLookupError(pid)
        return cls(pid, born, _place())

    def is_here(self) -> bool:
        """Whether this process could see it, were it alive."""
        return self.place == _place()

    def is_alive(self) -> bool:
        """Of a process that :meth:`is_here`.

        Raises:
            OSError: it cannot be told now, as where this process has too many files open.
        """
        return _born(self.pid) == self.born

    def open(self) -> int:
        """A pidfd, which can be polled once the process is gone.

        Raises:
            ProcessLookupError: it is gone.
            OSError: this host has no pidfds.
        """
        with contextlib.ExitStack() as undo:
            descriptor = os.pidfd_open(self.pid)
            undo.callback(os.close, descriptor)
            if not self.is_alive():
                raise ProcessLookupError(self.pid)
            undo.pop_all()
            return descriptor

    def await_end(self) -> None:
        """Returns once it is gone, of a process that :meth:`is_here`."""
        try:
            descriptor = self.open()
        except ProcessLookupError:
            return
        except OSError:  # an old kernel, or a container that forbids it
            self._look_for_end()
            return
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while not poll.poll():
            pass
        os.close(descriptor)

    def kill(self) -> None:
        """Ends it by force, wherever it hangs, if it is here."""
        self.send(signal.SIGKILL)

    def send(self, number: int) -> None:
        """Sends it a signal, if it is here. Whoever has its id by now gets none."""
        with contextlib.suppress(OSError):
            if not self.is_here():
                return
            try:
                descriptor = self.open()
            except ProcessLookupError:
                return
            except OSError:  # an old kernel, or a container that forbids it
                if self.is_alive():
                    os.kill(self.pid, number)
                return
            try:
                signal.pidfd_send_signal(descriptor, number)
            finally:
                os.close(descriptor)

    def _look_for_end(self) -> None:
        alive = True
        while alive:
            time.sleep(_LOOK_S)
            with contextlib.suppress(OSError):
                alive = self.is_alive()


def _born(pid: int) -> int | None:
    """None if there is no such process, or only what its parent has not asked for yet."""
    try:
        # The name, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _place() -> str:
    try:
        parts = [Path("/proc/sys/kernel/random/boot_id").read_text().strip()]
    except (FileNotFoundError, PermissionError):  # a sandbox that hides it
        parts = [os.uname().nodename]
    for kind in ("pid", "time"):
        with contextlib.suppress(FileNotFoundError):  # of kernels that have none of a kind
            parts.append(os.readlink(f"/proc/self/ns/{kind}"))
    return " ".join(parts)
