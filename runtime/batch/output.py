"""A batch's output file: each answer is appended once, one job writes at a time, and a job that comes later goes on."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

from headwise.runtime.batch.lines import Line
from headwise.runtime.batch.render import is_failure, model_of
from headwise.workers.errors import HeadwiseError, InvalidValueError

SYNC_S = 5.0
"""So much of what was written may be lost when the machine, not the job alone, dies."""
_ID = re.compile(r"batch_req_(\d{1,18})_([0-9a-f]{16})")
_BEGINNING = b'{"id": "batch_req_'
_FLAG = "--output"


class OutputBusyError(HeadwiseError):
    """Another job writes the same output."""


class Output:
    """The output file, open and locked. Close it, or use it as a context manager.

    Attributes:
        finished: the digest of each line of the input that has its answer, by the line's number, from before.
        num_failed: how many of them could not be answered.
        models: the names of the models that answered.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            OutputBusyError: another job has it open.
            InvalidValueError: it cannot be written or locked, is no file, or holds something else than answers.
        """
        self._path = path.absolute()
        self.finished: dict[int, int] = {}
        self.num_failed = 0
        self.models: set[str] = set()
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        except OSError as error:
            raise InvalidValueError(_FLAG, str(self._path), f"cannot be written: {error.strerror}") from None
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                limit = "must be a file on a disk: answers are read from it when the same command is run again"
                raise InvalidValueError(_FLAG, str(self._path), limit)
            self._lock()
            self._read()
        except OSError as error:
            os.close(self._file)
            raise InvalidValueError(_FLAG, str(self._path), f"cannot be read: {error.strerror}") from None
        except BaseException:
            os.close(self._file)
            raise
        self._synced, self._broken = time.monotonic(), 0

    def check(self, line: Line) -> bool:
        """Whether a line of the input has its answer.

        Raises:
            InvalidValueError: it has the answer to another question.
        """
        digest = self.finished.get(line.number)
        if digest is None:
            return False
        if digest != int(line.digest, 16):
            limit = f"holds the answer to another question for line {line.number} of the input"
            fix = "the input or a flag was changed since: give another file, or move this one away"
            raise InvalidValueError(_FLAG, str(self._path), limit, fix)
        return True

    def check_length(self, last: int) -> None:
        """
        Args:
            last: the number of the input's last line.

        Raises:
            InvalidValueError: there are answers to lines after that one.
        """
        if (most := max(self.finished, default=0)) > last:
            limit = f"holds an answer to line {most}, and the input ends with line {last}"
            raise InvalidValueError(_FLAG, str(self._path), limit, "give another file, or move this one away")

    def check_model(self, name: str) -> None:
        """
        Raises:
            InvalidValueError: another model gave answers that are there.
        """
        if others := self.models - {name}:
            limit = f"holds answers of the model {min(others)}, not of {name}"
            raise InvalidValueError(_FLAG, str(self._path), limit, "give another file, or move this one away")

    def append(self, data: bytes) -> None:
        """Writes one line, and makes sure now and then that what was written outlives the machine.

        Raises:
            HeadwiseError: the disk is full or gone.
        """
        whole = len(data)
        try:
            if self._broken:
                raise OSError(self._broken, os.strerror(self._broken))
            while data:
                data = data[os.write(self._file, data) :]
            self._size += whole
            if time.monotonic() - self._synced >= SYNC_S:
                self._sync()
        except OSError as error:
            self._broken = error.errno or errno.EIO
            with suppress(OSError):
                os.ftruncate(self._file, self._size)  # no half of a line: another could come after it
            raise self._lost(error) from error

    def close(self) -> None:
        """Idempotent.

        Raises:
            HeadwiseError: the last of what was written did not reach the disk.
        """
        if self._file >= 0:
            try:
                self._sync()
            except OSError as error:
                raise self._lost(error) from error
            finally:
                os.close(self._file)
                self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except HeadwiseError:
            if error is None:  # else it says what came first
                raise

    def _sync(self) -> None:
        os.fsync(self._file)
        self._synced = time.monotonic()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = f"{_FLAG}={self._path}: another job writes this file now; wait for its end, or give another file"
            raise OutputBusyError(text) from None
        except OSError as error:  # of a network file system, say
            fix = "give a file on another file system"
            raise InvalidValueError(_FLAG, str(self._path), f"cannot be locked: {error.strerror}", fix) from None

    def _read(self) -> None:
        """Takes what is there, and cuts a last line off that was not written to its end."""
        self._size = 0
        with open(os.dup(self._file), "rb") as file:
            file.seek(0)
            if file.peek(1)[:1] not in (b"", b"{"):
                raise self._foreign(1)  # without its first line, which may be gigabytes
            for number, data in enumerate(file, 1):
                if not data.endswith(b"\n"):
                    if not (data.startswith(_BEGINNING) or _BEGINNING.startswith(data)):
                        raise self._foreign(number)
                    os.ftruncate(self._file, self._size)
                    return
                self._take(number, data)
                self._size += len(data)

    def _take(self, number: int, data: bytes) -> None:
        try:
            value = json.loads(data)
            found = _ID.fullmatch(value["id"])
        except (ValueError, RecursionError, TypeError, KeyError):
            raise self._foreign(number) from None
        if found is None:
            raise self._foreign(number)
        line = int(found[1])
        if line in self.finished:
            limit = f"has two answers to line {line} of the input, the second in its line {number}"
            raise InvalidValueError(_FLAG, str(self._path), limit, "give another file, or move this one away")
        self.finished[line] = int(found[2], 16)
        self.num_failed += is_failure(value)
        if (model := model_of(value)) is not None:
            self.models.add(model)

    def _lost(self, error: OSError) -> HeadwiseError:
        text = f"{_FLAG}={self._path}: cannot be written: {error.strerror}"
        return HeadwiseError(f"{text}; make room, and run the same command again")

    def _foreign(self, number: int) -> InvalidValueError:
        limit = f"its line {number} is no answer of a batch"
        return InvalidValueError(_FLAG, str(self._path), limit, "give another file, which need not be there")
