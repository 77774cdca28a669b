"""A handoff meets every fault in every state: its request is slower then, or one clear error, and never different."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from headwise.runtime import LLM
from headwise.runtime.engine.request import Seat
from headwise.runtime.handoff.messages import TransferKey
from headwise.runtime.handoff.outbound import Outbound
from headwise.runtime.handoff.service import HandoffService
from headwise.runtime.output import FinishReason
from headwise.v1 import kv_transfer_pb2 as pb
from headwise.workers.kv.chunk import decode_chunk, encode_chunk
from headwise.workers.kv.fences import FenceStream
from headwise.workers.kv.handoff import Fence
from tests.effort import thorough
from tests.runtime.handoff.conftest import DEADLINE_S, wait_until
from tests.runtime.handoff.failpoints import STATES, Failpoint, stopped_at
from tests.runtime.handoff.sides import Sides, caches, content, handoff_ranks
from tests.runtime.handoff.stopped import Alone, Cell, Outcome, Wire, ask, prompt, two_sides

TABLE: dict[tuple[str, str], str] = {}
"""What came of each state and fault."""


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
        following = list(islice(rest, 1))
        if not following:  # the last of a stream, so another stream is to be damaged
            cell.wire.damage = swap
        return chain(following, [message], rest)

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


DAMAGING = (dropped, duplicated, reordered, truncated, flipped)
KILLING = (prefill_group_dies, control_is_closed, prefill_is_restarted, decode_group_dies)
HARMLESS = (
    *(nothing, dropped, duplicated, reordered, truncated, flipped, replayed, prefill_is_full, rubbish),
    calls_are_cancelled,
    *(logits_are_not_finite, client_cancels, pool_is_full, lease_runs_out),
)


def cells(faults: tuple[Callable[[Cell], None], ...]) -> list[Any]:
    """Every state with every fault; ``make test`` takes each fault once."""
    return [
        (state, fault) if (row + column) % len(STATES) == 3 else thorough(state, fault)
        for row, fault in enumerate(faults)
        for column, state in enumerate(STATES)
    ]


@pytest.fixture(scope="module")
def alone(checkpoint: Callable[..., Path]) -> Iterator[Alone]:
    with LLM(checkpoint("uneven"), executor="local", kv_memory="16MiB", max_model_len=256, quiet=True) as llm:
        yield Alone(llm)


@pytest.fixture(scope="module")
def shared(checkpoint: Callable[..., Path]) -> Iterator[tuple[Sides, Wire]]:
    with two_sides(checkpoint("uneven")) as both:
        yield both


@pytest.fixture(scope="module", autouse=True)
def print_table() -> Iterator[None]:
    """For whoever asks for it with ``-s``: by fault and state, what became of the handoff."""
    yield
    print("\n| fault | " + " | ".join(STATES) + " |\n" + "|---" * (len(STATES) + 1) + "|")
    for fault in (*HARMLESS, *KILLING):
        cells = [TABLE.get((state, fault.__name__), "-") for state in STATES]
        print(f"| {fault.__name__.replace('_', ' ')} | " + " | ".join(cells) + " |")


def run_cell(sides: Sides, wire: Wire, state: str, fault: Callable[[Cell], None], alone: Alone) -> Outcome:
    """Runs a cell of the table; returns what came of the request."""
    seed = zlib.crc32(f"{state} {fault.__name__}".encode())
    more: list[tuple[list[int], Future[Outcome]]] = []
    with ThreadPoolExecutor(8) as threads, pytest.MonkeyPatch.context() as patch:
        for name in ("answer", "_wait"):
            patch.setattr(HandoffService, name, getattr(HandoffService, name))  # and puts it back
        if not wire.seen:
            ask(sides, prompt(seed + 1), "before")
        wait_until(lambda: sides.inbound.peers[0].session)

        def others(ids: list[int]) -> Future[Outcome]:
            more.append((ids, threads.submit(ask, sides, ids, f"other {len(more)}")))
            return more[-1][1]

        with stopped_at(sides, state) as point:
            outcome = threads.submit(ask, sides, prompt(seed), "stopped")
            assert point.reached.wait(DEADLINE_S), f"no handoff comes to {state}"
            fault(Cell(sides, point, state, outcome, others, wire))
        for ids, other in more:
            assert other.result(DEADLINE_S).tokens == alone(ids)
        found = outcome.result(DEADLINE_S)
        if fault is client_cancels:
            assert found.reason is FinishReason.ABORT and alone(prompt(seed))[: len(found.tokens)] == found.tokens
        elif found.error is None:
            assert found.tokens == alone(prompt(seed))
        else:
            assert found.reason is FinishReason.ERROR and not found.tokens
        return found


def fallbacks(sides: Sides) -> dict[str, int]:
    """By cause, and those that were cancelled."""
    stats = sides.inbound.stats()
    return stats["causes"] | {"cancelled": stats["cancelled"]}


def record(state: str, fault: Callable[[Cell], None], sides: Sides, before: dict[str, int]) -> str:
    after = fallbacks(sides)
    causes = [name for name in after if after[name] > before[name]]
    TABLE[state, fault.__name__] = ", ".join(causes) or "committed"
    return TABLE[state, fault.__name__]


@pytest.mark.parametrize(("state", "fault"), cells(HARMLESS), ids=lambda value: getattr(value, "__name__", value))
def test_every_fault_in_every_state(
    shared: tuple[Sides, Wire], alone: Alone, state: str, fault: Callable[[Cell], None]
) -> None:
    sides, wire = shared
    group, before = sides.prefill_group, fallbacks(sides)
    limit = sides.outbound._transfers.limit
    try:
        found = run_cell(sides, wire, state, fault, alone)
        damaged = fault in DAMAGING and wire.damage is None
    finally:
        sides.outbound._transfers.limit, wire.damage = limit, None
        group.__dict__.pop("collect", None)
        sides.inbound.peers[0].__dict__.pop("_renewable", None)
    assert found.error is None
    sides.settle()
    assert (record(state, fault, sides, before) == "committed") <= (not damaged)
    assert not damaged or state not in ("filled", "committing"), "nothing was on its way"


@pytest.mark.parametrize(("state", "fault"), cells(KILLING), ids=lambda value: getattr(value, "__name__", value))
def test_every_death_in_every_state(
    checkpoint: Callable[..., Path], alone: Alone, state: str, fault: Callable[[Cell], None]
) -> None:
    with two_sides(checkpoint("uneven")) as (sides, wire):
        before = fallbacks(sides)
        assert run_cell(sides, wire, state, fault, alone).error is None
        dies = {decode_group_dies: sides.llm._loop, prefill_group_dies: sides.prefill.loop}.get(fault)
        if dies is not None:
            wait_until(lambda: dies.engine.stats()["recoveries"]["count"] == 1)
        record(state, fault, sides, before)
        sides.settle()
        if fault is not control_is_closed:  # what came in the place of the dead is of use
            wait_until(lambda: (now := sides.inbound.peers[0].session) and now.epoch == sides.outbound._epoch)
            committed = sides.inbound.stats()["committed"]
            assert ask(sides, prompt(77), "after").tokens == alone(prompt(77))
            assert sides.inbound.stats()["committed"] == committed + 1


HITS = [
    (flipped, "computing", "transport"),
    (prefill_is_full, "opening", "refused"),
    (rubbish, "asking", "peer"),
    (calls_are_cancelled, "asking", "unreachable"),
    (logits_are_not_finite, "between pushes", "(peer|transport)"),  # prefill says so, and ends its pushes
    (lease_runs_out, "filled", "lease"),
]


def test_where_a_handoff_must_not_fail_its_request_has_one_clear_error(
    checkpoint: Callable[..., Path], alone: Alone
) -> None:
    with two_sides(checkpoint("uneven"), on_handoff_failure="fail") as (sides, wire):
        for fault, state, cause in HITS:
            limit, group = sides.outbound._transfers.limit, sides.prefill_group
            found = run_cell(sides, wire, state, fault, alone)
            sides.outbound._transfers.limit = limit
            group.__dict__.pop("collect", None)
            sides.inbound.peers[0].__dict__.pop("_renewable", None)
            assert found is not None and found.error is not None
            assert re.fullmatch(f"another engine was to compute its prompt, and did not: {cause}", found.error)
            sides.settle()
        wait_until(lambda: sides.inbound.peers[0].session)
        assert ask(sides, prompt(5), "after").tokens == alone(prompt(5))
        sides.settle()


def test_where_a_handoff_must_not_fail_requests_wait_for_prefill_after_a_death(
    checkpoint: Callable[..., Path], alone: Alone
) -> None:
    """The next group of decode has to meet prefill first."""
    with two_sides(checkpoint("uneven"), on_handoff_failure="fail") as (sides, _):
        with ThreadPoolExecutor() as pool:
            asked = [pool.submit(ask, sides, prompt(seed), f"request {seed}") for seed in range(4)]
            sides.kill_decode_ranks()
            found = [answer.result(DEADLINE_S) for answer in asked]
        assert [one.error for one in found] == [None] * 4
        assert [one.tokens for one in found] == [alone(prompt(seed)) for seed in range(4)]
        assert sides.llm._loop.engine.stats()["recoveries"]["count"] == 1
        sides.settle()


@pytest.mark.parametrize("where", ["at the sender", "at the receiver"])
def test_what_is_late_does_not_touch_the_next_owner_of_the_blocks(
    checkpoint: Callable[..., Path], alone: Alone, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message is on its way while its handoff is cancelled, and every block of decode gets another owner."""
    with two_sides(checkpoint("uneven"), num_blocks=16) as (sides, _):
        point, receive = Failpoint(), FenceStream.receive

        def late(stream: FenceStream, message: bytes) -> None:
            if not point.reached.is_set():
                point.wait()
            receive(stream, message)

        with ThreadPoolExecutor(2) as threads, ExitStack() as undo:
            if where == "at the receiver":
                monkeypatch.setattr(FenceStream, "receive", late)
                undo.callback(point.release)
            else:
                point = undo.enter_context(stopped_at(sides, "pushing"))
            outcome = threads.submit(ask, sides, prompt(1), "stopped")
            assert point.reached.wait(DEADLINE_S)
            sides.llm.abort("stopped")
            assert outcome.result(DEADLINE_S).reason is FinishReason.ABORT
            wait_until(lambda: not sides.inbound.busy)
            monkeypatch.setattr(sides.inbound, "choose", lambda *arguments: None)
            owner = prompt(2, 240)
            assert ask(sides, owner, "owner").tokens == alone(owner)
            before, blocks = sides.decode_kv(owner), sides.llm.stats()["prefix_cache"]["cached_blocks"]
            assert blocks >= 15
            memory = [content(cache, range(16)) for _, cache in caches(sides.decode_group)]
            point.release()
            wait_until(lambda: not any(len(rank._pusher._pushes) for rank in handoff_ranks(sides.prefill_group)))
        sides.settle()
        assert sides.decode_kv(owner) == before
        for was, (_, cache) in zip(memory, caches(sides.decode_group), strict=True):
            assert torch.equal(was, content(cache, range(16)))


def test_keys_and_values_that_are_not_finite_are_never_read_at_decode(
    checkpoint: Callable[..., Path], alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a block that prefill pushes become what is no number, as by a fault of its memory."""
    with two_sides(checkpoint("uneven")) as (sides, _):
        ids, computed, poisoned = prompt(3), Outbound.computed, list[int]()

        def poison(self: Outbound, key: TransferKey, seat: Seat, num_tokens: int) -> None:
            """Before the first of four steps is pushed, and the third is submitted."""
            for _, cache in caches(sides.prefill_group) if not poisoned else []:
                size = cache.range_bytes(1, cache.num_kv_heads, 2)
                nan = torch.full((size // 4,), float("nan")).numpy().tobytes()
                cache.write_range(seat.block_ids[:1], (0, cache.num_kv_heads), (0, 2), nan)
            poisoned.append(num_tokens)
            computed(self, key, seat, num_tokens)

        monkeypatch.setattr(Outbound, "computed", poison)
        assert ask(sides, ids, "poisoned").tokens == alone(ids)
        assert poisoned[0] == 32
        causes = fallbacks(sides)  # prefill says so, and ends its pushes: either may come first
        assert causes["peer"] + causes["transport"] == 1
        sides.settle()
        assert not sides.prefill_kv(ids)
