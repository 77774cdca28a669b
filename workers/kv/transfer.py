"""The messages by which an engine moves KV blocks between a shard's device and the tiers below it, and their codec.

Like plans they go to every rank, and each rank moves its own heads. Unlike plans they run beside the steps, in no
order with them: the engine sees to it that no step touches a block while it is moved.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from headwise.workers.kv.handoff import HandoffJob, HandoffOp, handoff_fields, handoff_job
from headwise.workers.plan import foreign_is_value_error, pack, unpack


class Tier(enum.StrEnum):
    """Where a shard keeps blocks that its device has no room for."""

    HOST = "host"
    DISK = "disk"


class Op(enum.IntEnum):
    """What a job does with each of its blocks.

    SAVE copies a device block to a tier, LOAD a tier's block to the device, DEMOTE the host's block to the disk (it
    stays in the host), DROP forgets a tier's block.
    """

    SAVE = 1
    LOAD = 2
    DEMOTE = 3
    DROP = 4


@dataclass(frozen=True, slots=True)
class BlockKey:
    """What a block holds, apart from whose heads.

    Attributes:
        digest: the block's identity, 32 bytes.
        namespace, parent: of which digest was made, 32 bytes each; see ``headwise.runtime.kv.identity``.
        tokens: the block's token ids as u32 little-endian.
    """

    digest: bytes
    namespace: bytes
    parent: bytes
    tokens: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class TransferJob:
    """Blocks to move.

    Attributes:
        id: counts up from 0 in each group.
        tier: what SAVE writes, LOAD reads and DROP forgets; DISK for DEMOTE.
        keys: what is moved.
        blocks: on the device, one for each key; empty for DEMOTE and DROP.
    """

    id: int
    op: Op
    tier: Tier
    keys: list[BlockKey]
    blocks: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class TransferResult:
    """What came of a job on one rank.

    Attributes:
        failed: the digests of the keys that were not moved: the tier does not hold them (any more), what it holds is
            damaged, or it could not be written. Whatever a LOAD put into their blocks is of no use.
        seconds: wall time of the job, without the time that it waited for its turn.
        error: why a job of a handoff failed; empty if it did not.
        num_bytes: that a job of a handoff has sent or received.
    """

    id: int
    failed: list[bytes] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""
    num_bytes: int = 0


def encode_job(job: TransferJob | HandoffJob) -> bytes:
    if isinstance(job, HandoffJob):
        return pack(handoff_fields(job))
    keys = [(key.digest, key.namespace, key.parent, key.tokens) for key in job.keys]
    return pack((job.id, int(job.op), job.tier.value, keys, job.blocks))


def decode_job(data: bytes) -> TransferJob | HandoffJob:
    """The inverse of :func:`encode_job`.

    Raises:
        ValueError: not a job, or larger than MAX_MESSAGE_BYTES.
    """
    with foreign_is_value_error():
        fields = unpack(data)
        if fields[1] in tuple(HandoffOp):
            return handoff_job(fields)
        number, op, tier, keys, blocks = fields
        return TransferJob(number, Op(op), Tier(tier), [BlockKey(*key) for key in keys], blocks)


def encode_result(result: TransferResult) -> bytes:
    return pack((result.id, result.failed, result.seconds, result.error, result.num_bytes))


def decode_result(data: bytes) -> TransferResult:
    """The inverse of :func:`encode_result`.

    Raises:
        ValueError: not a result, or larger than MAX_MESSAGE_BYTES.
    """
    with foreign_is_value_error():
        number, failed, seconds, error, num_bytes = unpack(data)
        return TransferResult(number, failed, seconds, error, num_bytes)
