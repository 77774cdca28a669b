"""Blocks with known content and stores to put them in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise.workers.kv.store import DiskStore
from headwise.workers.kv.transfer import BlockKey

SHAPE = (2, 2, 1, 4, 8)
PAYLOAD = 4 * 2 * 2 * 1 * 4 * 8


def digest_of(*parts: bytes) -> bytes:
    return hashlib.sha256(b"|".join(parts)).digest()


def key_of(number: int) -> BlockKey:
    name = b"%d" % number
    return BlockKey(digest_of(name), digest_of(b"namespace"), digest_of(b"parent", name), name * 4)


def block_of(key: BlockKey) -> Tensor:
    """What the tests store by a key."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(int.from_bytes(key.digest[:7], "big")))


def put(store: DiskStore, *numbers: int) -> None:
    for key in map(key_of, numbers):
        store.put(key, block_of(key))


def holds(store: DiskStore, key: BlockKey) -> bool:
    """Whether a block is got; if so it must be the right one."""
    out = torch.full(SHAPE, float("nan"))
    got = store.get(key, out)
    assert not got or torch.equal(out, block_of(key))
    return got


@contextmanager
def opened(path: Path, identity: bytes = b"identity", **settings: Any) -> Iterator[DiskStore]:
    store = DiskStore(path, 1, 2, identity, PAYLOAD, **settings)
    try:
        yield store
    finally:
        store.close()


def file_of(path: Path, number: int) -> Path:
    name = key_of(number).digest.hex()
    return path / "rank-1-of-2" / name[:2] / f"{name}.kv"


def files(path: Path) -> set[Path]:
    """The files there are, but for the lock and the journal."""
    return {p for p in (path / "rank-1-of-2").rglob("*") if p.is_file() and p.name not in ("lock", "journal")}
