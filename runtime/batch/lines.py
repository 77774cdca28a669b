"""The lines of a batch's input, one after another: each with its number and a digest, by which its answer is known."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from headwise.workers.errors import InvalidValueError

MAX_LINE_BYTES = 32 << 20
"""A prompt has at most 4 MiB of text, which JSON may write six times as long."""
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """A line that is not blank.

    Attributes:
        number: from 1, blank lines counted.
        data: without the line break; empty if the line is longer than MAX_LINE_BYTES.
        digest: 16 hex digits, of the line and of what its answer depends on beside it.
        num_bytes: its length.
    """

    number: int
    data: bytes
    digest: str
    num_bytes: int

    @property
    def id(self) -> str:
        """The name of its answer."""
        return f"batch_req_{self.number}_{self.digest}"


def read_lines(path: Path, context: bytes = b"") -> Iterator[Line]:
    """Reads a file line by line; no more than one line is in memory.

    Args:
        context: what the answers depend on beside their lines, such as flags; it goes into the digests.

    Raises:
        InvalidValueError: the file cannot be read.
    """
    start = hashlib.sha256(hashlib.sha256(context).digest())
    try:
        with path.open("rb") as file:
            number = 0
            while data := file.readline(MAX_LINE_BYTES):
                number += 1
                digest, size, whole = start.copy(), len(data), data
                while not data.endswith(b"\n") and (data := file.readline(MAX_LINE_BYTES)):
                    digest.update(whole)
                    whole, size = data, size + len(data)
                if number == 1:
                    whole = whole.removeprefix(_BOM)
                whole = whole.strip()
                if not whole and size <= MAX_LINE_BYTES:
                    continue
                digest.update(whole)
                yield Line(number, whole if size <= MAX_LINE_BYTES else b"", digest.hexdigest()[:16], size)
    except OSError as error:
        raise InvalidValueError("--input", str(path.absolute()), f"cannot be read: {error.strerror}") from None
