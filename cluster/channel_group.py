"""What all groups have in common whose ranks serve a step channel, in this process or in others."""

from __future__ import annotations

import time
from typing import Any

import msgpack

from headwise.cluster.channel import Kind
from headwise.cluster.group import ShardGroup, ShardGroupDied
from headwise.cluster.mailbox import Mailbox
from headwise.cluster.replies import decode_reply
from headwise.workers.kv.handoff import HandoffJob
from headwise.workers.kv.transfer import TransferJob, TransferResult, decode_result, encode_job
from headwise.workers.plan import StepOutput, StepPlan, decode_output, encode_plan
from headwise.workers.spec import ShardSpec

QUERY_TIMEOUT_S = 30.0
ALLOCATE_TIMEOUT_S = 600.0
"""For memory that the system has to find and clear first."""


class ChannelGroup(ShardGroup):
    """Encodes what the engine hands in and decodes what the ranks answer. A subclass loads and ends the ranks, and
    makes ``_mailbox`` when it loads."""

    def __init__(self, spec: ShardSpec) -> None:
        self._spec, self._tp = spec, spec.tensor_parallel_size
        self._mailbox: Mailbox | None = None

    def submit(self, plan: StepPlan) -> None:
        self._started().send_all(Kind.STEP, encode_plan(plan))

    def collect(self) -> StepOutput:
        return decode_output(self._started().receive(Kind.OUTPUT)[1])

    def allocate(self, num_blocks: int | None = None, in_haste: bool = False) -> int:
        affordable: int = min(self.query("affordable_blocks"))
        blocks = min(affordable, num_blocks or affordable)
        if blocks > 0:
            self._ask(Kind.ALLOCATE, msgpack.packb((blocks, in_haste)), "allocate", ALLOCATE_TIMEOUT_S)
        return blocks

    def query(self, method: str) -> list[Any]:
        return self._ask(Kind.QUERY, method.encode(), method, QUERY_TIMEOUT_S)

    def transfer(self, job: TransferJob | HandoffJob) -> None:
        self._started().send_all(Kind.TRANSFER, encode_job(job))

    def transferred(self, timeout_s: float) -> TransferResult | None:
        message = self._started().poll(Kind.TRANSFERRED, timeout_s)
        return decode_result(message[1]) if message is not None else None

    def wake(self) -> None:
        if self._mailbox is not None:
            self._mailbox.wake()

    @property
    def death(self) -> ShardGroupDied | None:
        return self._mailbox.death if self._mailbox is not None else None

    def give_up(self, cause: str) -> None:
        if self._mailbox is not None:
            self._mailbox.declare_dead(None, cause)

    def _ask(self, kind: Kind, payload: bytes, what: str, timeout_s: float) -> list[Any]:
        """What every rank replies, in rank order.

        Raises:
            ShardGroupDied: a rank is dead, or did not reply in time.
            InvalidValueError: a rank refuses.
        """
        mailbox, replies = self._started(), dict[int, bytes]()
        mailbox.send_all(kind, payload)
        deadline = time.monotonic() + timeout_s
        while missing := set(range(self._tp)) - replies.keys():
            if (reply := mailbox.poll(Kind.REPLY, max(0.0, deadline - time.monotonic()))) is not None:
                replies[reply[0]] = reply[1]
            elif time.monotonic() >= deadline:
                raise mailbox.declare_dead(min(missing), f"no answer to {what!r} within {timeout_s:g} s")
        return [decode_reply(replies[rank]) for rank in range(self._tp)]

    def _started(self) -> Mailbox:
        assert self._mailbox is not None, "load() comes first"
        return self._mailbox
