"""What can go wrong while a handoff is on its way."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import grpc
import pytest

from headwise.runtime.handoff.service import HandoffService
from headwise.runtime.output import FinishReason
from headwise.v1 import kv_transfer_pb2 as pb
from headwise.workers.kv import kv_transport
from headwise.workers.kv.chunk import decode_chunk, encode_chunk
from headwise.workers.kv.handoff import Fence
from tests.runtime.handoff.conftest import DEADLINE_S, wait_until
from tests.runtime.handoff.failpoints import Failpoint
from tests.runtime.handoff.sides import Sides, handoff_ranks


def prompt(seed: int, length: int = 101) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(3, 256) for _ in range(length)]


@dataclass(frozen=True, slots=True)
class Outcome:
    tokens: list[int]
    reason: FinishReason | None
    error: str | None


@dataclass(slots=True)
class Cell:
    """A handoff that was stopped.

    Attributes:
        outcome: what becomes of its request.
        messages: what was pushed for an earlier handoff.
    """

    sides: Sides
    point: Failpoint
    state: str
    outcome: Future[Outcome]
    others: Callable[[list[int]], Future[Outcome]]
    wire: Wire


class Wire:
    """What goes from the ranks of prefill to those of decode.

    Attributes:
        damage: what becomes of the next message, once; None is nothing.
        seen: the messages that were to go through.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.damage: Callable[[bytes, Iterable[bytes]], Iterable[bytes]] | None = None
        self.seen: list[bytes] = []
        push = kv_transport._PushCalls.push

        def pushed(calls: Any, messages: Iterator[bytes], *arguments: Any) -> int:
            return push(calls, self._through(messages), *arguments)

        patch.setattr(kv_transport._PushCalls, "push", pushed)
        patch.setattr(kv_transport.GrpcTransport, "chunk_bytes", 1)  # a layer of a block in each message

    def _through(self, messages: Iterator[bytes]) -> Iterator[bytes]:
        for message in messages:
            self.seen.append(message)
            if (damage := self.damage) is None:
                yield message
            else:
                self.damage = None
                yield from damage(message, messages)


# Faults: what is done while the handoff is stopped.


def nothing(cell: Cell) -> None: ...


def prefill_group_dies(cell: Cell) -> None:
    cell.sides.kill_prefill_ranks()


def control_is_closed(cell: Cell) -> None:
    cell.sides.prefill._server.close()


def prefill_is_restarted(cell: Cell) -> None:
    cell.sides.restart_prefill()


def decode_group_dies(cell: Cell) -> None:
    cell.sides.kill_decode_ranks()


def dropped(cell: Cell) -> None:
    cell.wire.damage = lambda message, rest: rest


def duplicated(cell: Cell) -> None:
    cell.wire.damage = lambda message, rest: chain([message, message], rest)


def reordered(cell: Cell) -> None:
    def swap(message: bytes, rest: Iterable[bytes]) -> Iterable[bytes]:
        return chain(list(islice(rest, 1)), [message], rest)

    cell.wire.damage = swap


def truncated(cell: Cell) -> None:
    cell.wire.damage = lambda message, rest: chain([message[:-7]], rest)


def flipped(cell: Cell) -> None:
    def flip(message: bytes, rest: Iterable[bytes]) -> Iterable[bytes]:
        damaged = bytearray(message)
        damaged[-100] ^= 4
        return chain([bytes(damaged)], rest)

    cell.wire.damage = flip


def replayed(cell: Cell) -> None:
    """An earlier stream, as it was and with what may be known of this handoff's fence, but for its ticket."""
    now = [handoff.fence for handoff in cell.sides.inbound._running.values()]
    received = decode_chunk(cell.wire.seen[0])
    old, data = received.chunk, received.payload
    fences = [old.fence, replace(old.fence, epoch=old.fence.epoch + 1)]
    for fence in now:
        fences += [
            replace(fence, ticket=old.fence.ticket),
            replace(old.fence, ticket=fence.ticket),
            replace(fence, epoch=fence.epoch - 1),
            replace(fence, number=fence.number + 1),
            replace(fence, attempt=2),
            Fence(fence.transfer, fence.attempt, fence.epoch, fence.number, bytes(32)),
        ]
    for rank in handoff_ranks(cell.sides.decode_group):
        (*_, address, _) = rank.endpoint() or ("", b"")
        with grpc.insecure_channel(address) as channel:
            push = channel.stream_unary("/headwise.v1.KvTransferService/Push", None, pb.PushResponse.FromString)
            for fence in fences:
                with pytest.raises(grpc.RpcError) as error:
                    push(iter([encode_chunk(replace(old, fence=fence), data)]), timeout=DEADLINE_S)
                assert error.value.code() is grpc.StatusCode.NOT_FOUND


def prefill_is_full(cell: Cell) -> None:
    cell.sides.outbound._transfers.limit = 0


def rubbish(cell: Cell) -> None:
    """Whatever prefill is asked, it answers something that is no answer."""

    def answer(service: HandoffService, method: str, request: Any, peer: str) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(_RUBBISH[method])
        return future

    HandoffService.answer = answer  # type: ignore[method-assign]


def calls_are_cancelled(cell: Cell) -> None:
    """As a server does with what it is asked while it ends."""

    def cancelled(service: HandoffService, method: str, request: Any, context: grpc.ServicerContext) -> None:
        context.abort(grpc.StatusCode.CANCELLED, "the server ends")

    HandoffService._wait = cancelled  # type: ignore[method-assign,assignment]


_RUBBISH = {
    "Hello": pb.HelloResponse(epoch=3),
    "Prefill": pb.PrefillResponse(expected_s=float("nan"), load=pb.Load(token_s=-1)),
    "Renew": pb.RenewResponse(statuses=[pb.TransferStatus(state=pb.TransferStatus.STATE_UNSPECIFIED)] * 7),
    "Commit": pb.CommitResponse(),
    "AbortTransfer": pb.AbortTransferResponse(),
    "Query": pb.QueryResponse(epoch=4),
}


def logits_are_not_finite(cell: Cell) -> None:
    group = cell.sides.prefill_group
    collect = group.collect

    def poisoned() -> Any:
        output = collect()
        output.failed += [(row, "the logits are not finite") for row, _ in output.tokens]
        output.tokens.clear()
        return output

    group.collect = poisoned  # type: ignore[method-assign]


def client_cancels(cell: Cell) -> None:
    cell.sides.llm.abort("stopped")


def pool_is_full(cell: Cell) -> None:
    """Others want more blocks than decode has."""
    for seed in range(3):
        cell.others(prompt(1000 + seed, 240))


def lease_runs_out(cell: Cell) -> None:
    inbound = cell.sides.inbound
    inbound.peers[0]._renewable = dict  # type: ignore[attr-defined]
    if cell.state != "opening":  # the lease begins after that
        wait_until(lambda: not inbound._running or all(h.machine.cause for h in inbound._running.values()))


KILLING = (prefill_group_dies, control_is_closed, prefill_is_restarted, decode_group_dies)
HARMLESS = (
    *(nothing, dropped, duplicated, reordered, truncated, flipped, replayed, prefill_is_full, rubbish),
    calls_are_cancelled,
    *(logits_are_not_finite, client_cancels, pool_is_full, lease_runs_out),
)
