"""KV events in the form of the gateway ``smg``, which routes a prompt to the engine that holds most of its blocks.

The gateway knows a block by its tokens. So, unlike Headwise's own events, these hold the tokens, and tell only of the
blocks of one namespace.
"""

from __future__ import annotations

import struct
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from smg_grpc_proto.generated import common_pb2

from headwise.runtime.async_model import AsyncModel
from headwise.runtime.engine.engine import Engine
from headwise.runtime.kv.events import Cleared, KvEvent, Removed, Stored, decode_events, decode_snapshot
from headwise.runtime.kv.identity import ROOT, TOKEN_BYTES
from headwise.runtime.server.kv_messages import kv_messages


async def kv_batches(llm: AsyncModel[Any], namespace: bytes) -> AsyncGenerator[common_pb2.KvEventBatch]:
    """Yields the blocks of a namespace that are on the device, as one batch, and then the changes.

    A subscriber that fell behind gets another snapshot.
    """
    async with aclosing(kv_messages(llm)) as messages:
        known, numbers = (0, 0), _Numbers()
        async for kind, data in messages:
            if kind == "snapshot":
                snapshot = decode_snapshot(data)
                known = snapshot.epoch, snapshot.sequence
                yield await _snapshot(llm, namespace, numbers.of(*known), snapshot.blocks["device"])
            elif ((message := decode_events(data)).epoch, message.sequence) > known:
                number = numbers.of(message.epoch, message.sequence)
                yield await _batch(llm, namespace, number, message.events)


class _Numbers:
    """Sequence numbers for one subscriber. In ``runtime/kv/events.py`` those of each epoch start at 0. Here they start
    at 1 and only grow, or the gateway would take what it is told of a later epoch for old."""

    def __init__(self) -> None:
        self._epoch = self._before = self._last = 0

    def of(self, epoch: int, sequence: int) -> int:
        if epoch != self._epoch:
            self._epoch, self._before = epoch, self._last
        self._last = self._before + sequence + 1
        return self._last


async def _snapshot(
    llm: AsyncModel[Any], namespace: bytes, number: int, blocks: Mapping[bytes, bytes]
) -> common_pb2.KvEventBatch:
    events: list[KvEvent] = [Cleared(None)]
    events += [Stored("device", (digest,), parent) for digest, parent in blocks.items()]
    batch = await _batch(llm, namespace, number, events)
    stored = sum(len(event.stored.blocks) for event in batch.events)
    batch.snapshot.CopyFrom(common_pb2.KvSnapshotChunk(index=0, count=1, blocks=stored))
    return batch


async def _batch(
    llm: AsyncModel[Any], namespace: bytes, number: int, events: Sequence[KvEvent]
) -> common_pb2.KvEventBatch:
    digests = [digest for event in events if isinstance(event, Stored) for digest in event.digests]
    tokens = await llm.run(lambda engine: _tokens(engine, namespace, digests)) if digests else {}
    batch = common_pb2.KvEventBatch(sequence_number=number, timestamp=time.time())
    batch.events.extend(converted for event in events for converted in _convert(event, tokens))
    return batch


def _tokens(engine: Engine, namespace: bytes, digests: Sequence[bytes]) -> dict[bytes, bytes]:
    """The tokens of blocks, by digest. Blocks that have left the cache meanwhile are left out; a later event removes
    them."""
    blocks = (engine.cached_block(digest) for digest in digests)
    return {block.digest: block.tokens for block in blocks if block is not None and block.namespace == namespace}


def _convert(event: KvEvent, tokens: Mapping[bytes, bytes]) -> Iterator[common_pb2.KvCacheEvent]:
    match event:
        case Cleared(None | "device"):
            yield common_pb2.KvCacheEvent(cleared=common_pb2.KvCacheCleared())
        case Removed("device", digests):
            removed = common_pb2.KvBlocksRemoved(block_hashes=[_number(digest) for digest in digests])
            yield common_pb2.KvCacheEvent(removed=removed)
        case Stored("device", digests, parent):
            known = [digest for digest in digests if digest in tokens]  # a block is never there without those before
            stored = common_pb2.KvBlocksStored(
                blocks=[_block(digest, tokens[digest]) for digest in known],
                tier=common_pb2.KV_CACHE_TIER_DEVICE,
                parent_block_hash=None if parent == ROOT else _number(parent),
            )
            if known:
                yield common_pb2.KvCacheEvent(stored=stored)


def _block(digest: bytes, tokens: bytes) -> common_pb2.KvBlock:
    ids = struct.unpack(f"<{len(tokens) // TOKEN_BYTES}I", tokens)
    return common_pb2.KvBlock(block_hash=_number(digest), token_ids=ids, block_size=len(ids))


def _number(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little", signed=True)
