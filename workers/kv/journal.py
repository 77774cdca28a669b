"""The journal of a folder of KV blocks: a record in msgpack for each block that was stored there or dropped again.

Nothing is forced to the medium (no fsync): a kill loses nothing that was written, and after a power cut sizes and
checksums tell what is left.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import msgpack

from headwise.workers.kv.transfer import BlockKey
from headwise.workers.private_files import private

FORMAT = ("headwise-kv", 1)
"""What a journal begins with; the number changes with the form of the journal or of the block files."""

MAX_RECORD_BYTES = 1 << 16
"""The largest record that is read; a block of 4,096 tokens makes one of 16 KiB."""

_SPARE_RECORDS = 1024


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """What the journal says of one block file; ``checksum`` is the file's SHA-256."""

    key: BlockKey
    checksum: bytes


class Journal:
    """One record to announce format and identity, then one for each block stored or dropped.

    A record is (body, CRC-32 of the body); a body is (digest, namespace, parent, tokens, checksum) or (digest,).
    """

    def __init__(self, path: Path, identity: bytes) -> None:
        self._path, self._identity = path, identity
        self._file: FileIO | None = None
        self._size = 0  # bytes up to the end of the last whole record
        self._num_records = 0
        self._rewrite_at = 0

    def read(self) -> dict[bytes, StoredBlock]:
        """What is stored by digest, oldest first; of a damaged journal, what comes before the damage.

        Empty if there is no journal, or none of this format and identity: then the first append begins a new one.
        """
        blocks: dict[bytes, StoredBlock] = {}
        with suppress(OSError, ValueError, TypeError, msgpack.UnpackException):
            self._file = FileIO(self._path, "r+", opener=private)
            for fields in self._records(self._file):
                if self._num_records == 1:
                    continue
                digest = fields[0]
                blocks.pop(digest, None)
                if len(fields) > 1:
                    *key, checksum = fields
                    blocks[digest] = StoredBlock(BlockKey(*key), checksum)
        if self._num_records == 0:
            self.close()
        elif self._file is not None:
            with suppress(OSError):
                self._file.truncate(self._size)
        return blocks

    def append_stored(self, block: StoredBlock) -> None:
        """
        Raises:
            OSError: it cannot be written; the journal is as it was.
        """
        self._append(_stored(block))

    def append_dropped(self, digest: bytes) -> None:
        """Raises as :meth:`append_stored`."""
        self._append((digest,))

    def should_rewrite(self, num_blocks: int) -> bool:
        """Whether most records are of no use any more, where so many blocks are stored."""
        return self._num_records > max(4 * num_blocks + _SPARE_RECORDS, self._rewrite_at)

    def rewrite(self, blocks: Iterable[StoredBlock]) -> None:
        """Replace the journal by one that holds just these blocks, at once or not at all.

        Raises:
            OSError: it cannot be written; the journal is as it was.
        """
        temporary = self._path.with_suffix(".tmp")
        records = [_record((*FORMAT, self._identity)), *(_record(_stored(block)) for block in blocks)]
        self._rewrite_at = 2 * self._num_records  # not again at once, should it fail
        try:
            file = FileIO(temporary, "w", opener=private)
            try:
                write_all(file, b"".join(records))
                os.replace(temporary, self._path)
            except OSError:
                file.close()
                raise
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise
        self.close()
        self._file, self._size, self._num_records, self._rewrite_at = file, file.tell(), len(records), 0

    def close(self) -> None:
        """Idempotent."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _append(self, fields: tuple[bytes, ...]) -> None:
        if self._file is None:
            self.rewrite([])
        assert self._file is not None
        record = _record(fields)
        try:
            # Over what may be left of a record that did not fit.
            self._file.seek(self._size)
            write_all(self._file, record)
        except OSError:
            with suppress(OSError):
                self._file.truncate(self._size)
            raise
        self._size += len(record)
        self._num_records += 1

    def _records(self, file: FileIO) -> Iterator[tuple[bytes, ...]]:
        """All records, checked, up to the first that is not whole; ``_size`` and ``_num_records`` follow.

        Raises:
            OSError, ValueError, TypeError, msgpack.UnpackException: what comes next is no record.
        """
        limits = {"max_buffer_size": 4 * MAX_RECORD_BYTES, "max_bin_len": MAX_RECORD_BYTES, "max_array_len": 2}
        unpacker = msgpack.Unpacker(file, max_str_len=0, max_map_len=0, max_ext_len=0, **limits)
        for body, crc in unpacker:
            if not isinstance(body, bytes) or zlib.crc32(body) != crc:
                return
            fields = msgpack.unpackb(body, use_list=False, max_array_len=5)
            if self._num_records == 0:
                if fields != (*FORMAT, self._identity):
                    return
            elif len(fields) not in (1, 5) or not all(isinstance(field, bytes) for field in fields):
                return
            self._size = unpacker.tell()
            self._num_records += 1
            yield fields


def write_all(file: FileIO, data: bytes | memoryview) -> None:
    """
    Raises:
        OSError: not all of it could be written.
    """
    left = memoryview(data)
    while left:
        written = os.write(file.fileno(), left)
        if written == 0:
            raise OSError(errno.EIO, "nothing was written")
        left = left[written:]


def _stored(block: StoredBlock) -> tuple[bytes, ...]:
    key = block.key
    return key.digest, key.namespace, key.parent, key.tokens, block.checksum


def _record(fields: tuple[Any, ...]) -> bytes:
    body: bytes = msgpack.packb(fields)
    record: bytes = msgpack.packb((body, zlib.crc32(body)))
    return record
