"""The messages by which an engine has its ranks hand over KV blocks to the ranks of another engine, and their codec.

A *transfer* is one prompt's way from the engine that computes it (prefill) to the engine that goes on from it (decode);
an *attempt* is one try at it. A *fence* is the right to write into the device blocks that decode has reserved for an
attempt: every rank of decode opens it before prefill is asked, and closes it before the blocks can be used for anything
else. Like the jobs of tiers these go to every rank of a group and run beside its steps.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

Range = tuple[int, int]
"""(start, stop), half open."""

TRANSFER_BYTES, TICKET_BYTES = 16, 32


class HandoffOp(enum.IntEnum):
    """What a job has a rank do.

    On decode's ranks: OPEN lets the fence's blocks be written by whoever has the ticket. FILL's result comes once every
    byte for this rank is written, or once none can come any more. CLOSE ends the fence: after its result nothing is
    written there, and a FILL that waits has failed.

    On prefill's ranks: PUSH sends blocks; its result comes once the ranks of decode have written them. STOP ends the
    pushes of an attempt that run or wait; each of them has failed.
    """

    OPEN = 16
    FILL = 17
    CLOSE = 18
    PUSH = 19
    STOP = 20


@dataclass(frozen=True, slots=True)
class Fence:
    """An attempt of a transfer, and the right to write its blocks.

    Attributes:
        transfer: 16 bytes, made at random by decode.
        attempt: counts up from 1.
        epoch: of the decode generation that has the blocks.
        number: counts up in that generation.
        ticket: 32 bytes, made at random for this fence; whoever writes must know them.
    """

    transfer: bytes
    attempt: int
    epoch: int
    number: int
    ticket: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class KvEndpoint:
    """A rank of decode that takes KV.

    Attributes:
        heads: its KV heads, a half-open range of the model's.
        address: ``host:port`` of its KvTransferService.
        host_id: equal for two processes that can share memory; empty if this rank takes nothing in shared memory.
    """

    heads: Range
    address: str
    host_id: bytes = b""


@dataclass(frozen=True, slots=True)
class HandoffJob:
    """
    Attributes:
        id: counts up in each group, together with those of the tiers' jobs.
        blocks: on this rank's device. OPEN: where the transfer's blocks go, in their order. PUSH: what is sent.
        first: PUSH: the place of ``blocks[0]`` in the transfer, whose first block is 0.
        sources: OPEN: the KV heads of each rank of prefill.
        destinations: PUSH: the ranks of decode.
        timeout_s: PUSH: how long it may take, the waiting for its turn included.
    """

    id: int
    op: HandoffOp
    fence: Fence
    blocks: list[int] = field(default_factory=list)
    first: int = 0
    sources: list[Range] = field(default_factory=list)
    destinations: list[KvEndpoint] = field(default_factory=list)
    timeout_s: float = 0.0


@dataclass(frozen=True, slots=True)
class HandoffSpec:
    """How the ranks of a group hand over KV.

    Attributes:
        receives: whether they take KV, each on a port of its own.
        host: the address to bind that port on.
        shared_memory: whether blocks go through shared memory where both ends are on one host.
        tls_cert, tls_key: PEM files of this side's certificate: with them the port is encrypted, which is needed where
            ``host`` is not loopback; who sends shows it.
        ca: PEM file of whoever signed the certificates of the other side. None sends in clear text; who receives then
            asks no sender for a certificate.
    """

    receives: bool = False
    host: str = "127.0.0.1"
    shared_memory: bool = True
    tls_cert: str | None = None
    tls_key: str | None = None
    ca: str | None = None


def handoff_fields(job: HandoffJob) -> tuple[object, ...]:
    """The job as a tuple that msgpack can carry: its number and op first, as those of the tiers' jobs."""
    fence = job.fence
    destinations = [(*end.heads, end.address, end.host_id) for end in job.destinations]
    key = (fence.transfer, fence.attempt, fence.epoch, fence.number, fence.ticket)
    return (job.id, int(job.op), key, job.blocks, job.first, job.sources, destinations, job.timeout_s)


def handoff_job(fields: list[object]) -> HandoffJob:
    """The inverse of :func:`handoff_fields`.

    Raises:
        TypeError, ValueError: it is of another form.
    """
    number, op, key, blocks, first, sources, destinations, timeout_s = fields
    ranges = [(start, stop) for start, stop in sources]  # type: ignore[attr-defined]
    ends = [KvEndpoint((a, b), address, host) for a, b, address, host in destinations]  # type: ignore[attr-defined]
    fence = Fence(*key)  # type: ignore[misc]
    return HandoffJob(number, HandoffOp(op), fence, blocks, first, ranges, ends, timeout_s)  # type: ignore[arg-type]
