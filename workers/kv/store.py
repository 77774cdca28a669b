"""Where a shard keeps blocks that its device has no room for: slots of host memory, files of a folder.

A block here is a tensor of ``KVCache.block_shape``, the rank's heads only. Who asks, and how much is kept, is up to
the engine: nothing is evicted here.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

import msgpack
import numpy as np
import torch
from torch import Tensor

from headwise.workers import failpoints
from headwise.workers.errors import InvalidValueError
from headwise.workers.failpoints import Point
from headwise.workers.kv.journal import FORMAT, Journal, StoredBlock, write_all
from headwise.workers.kv.transfer import BlockKey
from headwise.workers.private_files import make_private_folder, make_shared_parent, own_size, private

if TYPE_CHECKING:
    from headwise.workers.cuda.gpu import Gpu

MAX_STORED_BLOCKS = 300_000
"""The most a disk store takes over from its last run; older ones are deleted."""

_logger = logging.getLogger(__name__)

_PAGE = 4096
_FOLDER = re.compile(r"[0-9a-f]{2}")
_FILE = re.compile(r"([0-9a-f]{2})([0-9a-f]{62})\.(kv|tmp)")


class HostStore:
    """Blocks in host memory, by digest. No digest comes twice in a call.

    One thread may put and drop while others get: a slot is filled before it can be found. What was got must not be
    dropped while it is read; whoever cannot be sure finds out by getting it again, see :meth:`get`.
    """

    def __init__(
        self, num_blocks: int, block_shape: tuple[int, ...], dtype: torch.dtype, gpu: Gpu | None = None
    ) -> None:
        """The memory is reserved, but its pages are taken one by one as blocks are put there.

        Args:
            gpu: where the blocks come from; all pages are taken and locked then, so that its copies go straight there.
        """
        self.num_blocks, self.nbytes = num_blocks, num_blocks * math.prod(block_shape) * dtype.itemsize
        self._memory = torch.from_numpy(np.empty(self.nbytes, dtype=np.uint8))
        self._gpu = gpu if gpu is not None and _page_lock(gpu, self._memory) else None
        self._slots = self._memory.view(dtype).view(num_blocks, *block_shape)
        self._free = list(range(num_blocks - 1, -1, -1))
        self._held: dict[bytes, tuple[int, Tensor]] = {}

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._held

    def __len__(self) -> int:
        return len(self._held)

    def put(self, digests: Sequence[bytes], fill: Callable[[list[Tensor]], object]) -> None:
        """Let ``fill`` write blocks into slots, one for each digest, in place of what was held by it. If it raises, the
        store holds none of them.

        Raises:
            InvalidValueError: there are not so many free slots.
        """
        for digest in digests:
            self.drop(digest)
        if len(digests) > len(self._free):
            raise InvalidValueError("host_kv_blocks", self.num_blocks, "all are taken", "drop some first")
        slots = [self._free.pop() for _ in digests]
        try:
            blocks = [self._slots[slot] for slot in slots]
            fill(blocks)
            self._held.update(zip(digests, zip(slots, blocks, strict=True), strict=True))
        except BaseException:
            self._free += reversed(slots)
            raise

    def get(self, digest: bytes) -> Tensor | None:
        """A view of a block, the same object each time until it is dropped or put anew; None if it is not held."""
        held = self._held.get(digest)
        return held[1] if held else None

    def drop(self, digest: bytes) -> None:
        """Forget a block, if it is held."""
        held = self._held.pop(digest, None)
        if held is not None:
            self._free.append(held[0])

    def close(self) -> None:
        """Lets the pages go that were locked; no copy may be under way. Idempotent."""
        gpu, self._gpu = self._gpu, None
        if gpu is not None:
            with suppress(RuntimeError):  # a GPU that has failed does nothing any more
                gpu.unpin(self._memory)


class DiskStore:
    """One rank's blocks as files ``<path>/rank-<r>-of-<n>/<ab>/<digest in hex, ab...>.kv``.

    A file is what it has to begin with (format, identity, key, payload length), the payload, and the SHA-256 of both.
    It is written under another name and renamed. Then the journal (see :mod:`~headwise.workers.kv.journal`) gets a
    record of the file; at the next start a file without a record, or of another size, is deleted. One thread at a
    time; :meth:`stored_keys` and ``len`` may be called from any.
    """

    def __init__(
        self,
        path: str | Path,
        rank: int,
        ranks: int,
        identity: bytes,
        payload_bytes: int,
        max_blocks: int = MAX_STORED_BLOCKS,
    ) -> None:
        """Takes over what an earlier run left of this identity, and deletes what it left of another.

        Args:
            path: the ``disk_kv_path`` setting.
            identity: everything that makes blocks of the same digest different.
            payload_bytes: of a block.
            max_blocks: how many to take over, the newest ones.

        Raises:
            InvalidValueError: the folder cannot be used, another user could use it, or another engine uses it.
        """
        self._identity = hashlib.sha256(identity).digest()
        self._payload_bytes, self._rank = payload_bytes, rank
        self._mutex = threading.Lock()
        try:
            parent = Path(path).expanduser()
            self._folder = parent / f"rank-{rank}-of-{ranks}"
            make_shared_parent(parent, "disk_kv_path")
            make_private_folder(self._folder, "disk_kv_path")
            self._lock = FileIO(self._folder / "lock", "w", opener=private)
        except InvalidValueError:
            raise
        except (OSError, ValueError, RuntimeError) as error:  # the latter two of paths that cannot be one
            raise _unusable(path, error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._journal = Journal(self._folder / "journal", self._identity)
            listed = self._journal.read()
            if len(listed) > max_blocks:
                too_many = "%d of %d blocks in %s, the oldest, are deleted: at most %d are taken over"
                _logger.warning(too_many, len(listed) - max_blocks, len(listed), self._folder, max_blocks)
            self._blocks = self._keep(dict(list(listed.items())[-max_blocks:]))
        except BlockingIOError as error:
            self._lock.close()
            limit = f"another engine uses {self._folder}"
            raise InvalidValueError("disk_kv_path", str(path), limit, "give each engine a folder of its own") from error
        except OSError as error:
            self._lock.close()
            raise _unusable(path, error) from error
        try:
            self._journal.rewrite(self._blocks.values())
        except OSError as error:
            _logger.warning("disk_kv_path=%r: the journal cannot be written: %s", str(path), error)

    def __len__(self) -> int:
        return len(self._blocks)

    def stored_keys(self) -> list[BlockKey]:
        """The keys of the stored blocks, oldest first."""
        with self._mutex:
            return [block.key for block in self._blocks.values()]

    def put(self, key: BlockKey, data: Tensor) -> None:
        """Write a block, in place of what was stored by its digest.

        Raises:
            OSError: it cannot be written; the store then holds no such block.
        """
        header, payload = self._header(key), self._raw("data", data)
        checksum = hashlib.sha256(header)
        checksum.update(payload)
        block = StoredBlock(key, checksum.digest())
        path = self._path(key.digest)
        temporary = path.with_suffix(".tmp")
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            with FileIO(temporary, "w", opener=private) as file:
                for part in (header, payload, block.checksum):
                    write_all(file, part)
                    if failpoints.ENABLED and part is header:
                        failpoints.hit(Point.KV_WRITE, self._rank)
            os.replace(temporary, path)
            if failpoints.ENABLED:
                failpoints.hit(Point.KV_JOURNAL, self._rank)
            self._journal.append_stored(block)
        except OSError:
            _unlink(temporary)
            self.drop(key.digest)
            raise
        with self._mutex:
            self._blocks.pop(key.digest, None)
            self._blocks[key.digest] = block
        self._compact()

    def get(self, key: BlockKey, out: Tensor) -> bool:
        """Read a block into ``out``; False if it is not stored or cannot be read, if its file is damaged, or if it
        is of another identity or key. Then the store holds it no longer, and ``out`` may be half written."""
        payload = self._raw("out", out)
        block = self._blocks.get(key.digest)
        if block is not None and block.key == key and self._read(block, payload):
            return True
        self.drop(key.digest)
        return False

    def drop(self, digest: bytes) -> None:
        """Delete a block, if it is stored."""
        _unlink(self._path(digest))
        with self._mutex:
            known = self._blocks.pop(digest, None)
        if known is not None:
            # Should this fail, the next run finds a record without a file, and drops it then.
            with suppress(OSError):
                self._journal.append_dropped(digest)
            self._compact()

    def close(self) -> None:
        """Lets another engine have the folder; what is stored stays. Idempotent. No other call may be running."""
        self._journal.close()
        self._lock.close()

    def _read(self, block: StoredBlock, payload: memoryview) -> bool:
        header, path = self._header(block.key), self._path(block.key.digest)
        if not self._has_size(path, block.key):
            return False
        try:
            with open(path, "rb", opener=private) as file:
                if file.read(len(header)) != header or file.readinto(payload) != len(payload):
                    return False
                read = file.read()
        except OSError:
            return False
        checksum = hashlib.sha256(header)
        checksum.update(payload)
        return checksum.digest() == read == block.checksum

    def _compact(self) -> None:
        if self._journal.should_rewrite(len(self._blocks)):
            with suppress(OSError):
                self._journal.rewrite(self._blocks.values())

    def _keep(self, listed: dict[bytes, StoredBlock]) -> dict[bytes, StoredBlock]:
        """Those of the listed blocks whose file is there, in order. Deletes every other file of ours, no others."""
        _unlink(self._folder / "journal.tmp")
        found: set[bytes] = set()
        for path in self._files():
            match = _FILE.fullmatch(path.name)
            assert match is not None
            digest = bytes.fromhex(match[1] + match[2])
            block = listed.get(digest) if match[3] == "kv" else None
            if block is not None and self._has_size(path, block.key):
                found.add(digest)
            else:
                _unlink(path)
        return {digest: block for digest, block in listed.items() if digest in found}

    def _files(self) -> Iterator[Path]:
        """Everything in the folder that has a name as this class gives them. Deletes links in the place of folders."""
        for name in os.listdir(self._folder):
            folder = self._folder / name
            if not _FOLDER.fullmatch(name):
                continue
            if folder.is_symlink():
                _unlink(folder)
            elif folder.is_dir():
                yield from (folder / file for file in os.listdir(folder) if _FILE.fullmatch(file) and file[:2] == name)

    def _path(self, digest: bytes) -> Path:
        name = digest.hex()
        return self._folder / name[:2] / f"{name}.kv"

    def _header(self, key: BlockKey) -> bytes:
        fields = (*FORMAT, self._identity, key.digest, key.namespace, key.parent, key.tokens, self._payload_bytes)
        header: bytes = msgpack.packb(fields)
        return header

    def _has_size(self, path: Path, key: BlockKey) -> bool:
        size = len(self._header(key)) + self._payload_bytes + hashlib.sha256().digest_size
        return own_size(path) == size

    def _raw(self, name: str, x: Tensor) -> memoryview:
        if x.nbytes != self._payload_bytes or not x.is_contiguous():
            limit = f"must be {self._payload_bytes} contiguous bytes"
            raise InvalidValueError(name, (x.dtype, tuple(x.shape)), limit)
        return x.view(-1).view(torch.uint8).numpy().data


def _page_lock(gpu: Gpu, memory: Tensor) -> bool:
    """Whether it could be done; if not, copies are slower, for the GPU copies to memory of another kind in between."""
    try:
        gpu.pin(memory)
    except RuntimeError as error:
        _logger.warning("%d bytes for KV blocks cannot be page-locked, so copies are slower: %s", memory.nbytes, error)
        return False
    return True


def disk_block_bytes(payload_bytes: int, block_size: int) -> int:
    """The most that one block takes up on disk, in bytes: its file in whole pages, and its share of the journal.

    Args:
        payload_bytes: of the block's keys and values, see :func:`~headwise.workers.kv.sizes.block_bytes`.
    """
    tokens = 4 * block_size
    file = -(-(payload_bytes + tokens + 256) // _PAGE) * _PAGE
    return file + 5 * (tokens + 256)


def _unlink(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _unusable(path: str | Path, error: Exception) -> InvalidValueError:
    return InvalidValueError("disk_kv_path", str(path), f"cannot be used: {error}", "give a folder that can be written")
