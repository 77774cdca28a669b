"""Whatever happens to a push on its way, nothing wrong is written, both ends hear of it soon, and nothing is left."""

from __future__ import annotations

import gc
import itertools
import os
import queue
import socket
import threading
import time
from typing import Any

import pytest
import torch

from headwise.workers.kv import kv_transport, pusher
from headwise.workers.kv.fences import FenceStream
from headwise.workers.kv.handoff import HandoffJob, HandoffOp, HandoffSpec, KvEndpoint
from headwise.workers.kv.pusher import Pusher, connect
from headwise.workers.kv.transfer import TransferResult
from tests.workers.kv.handoff_ranks import DEADLINE_S, Rank, cut_chunks, fence_of, groups, ok
from tests.workers.kv.handoff_wire import BLOCKS, PLACES, SHARED, Fault, Gate, Handover, Messages, Wire


def drop(messages: Messages) -> Messages:
    yield next(messages)
    next(messages)
    yield from messages


def duplicate(messages: Messages) -> Messages:
    first = next(messages)
    yield from (first, first)
    yield from messages


def reorder(messages: Messages) -> Messages:
    first, second, *rest = messages
    yield from (second, first, *rest)


def reorder_later(messages: Messages) -> Messages:
    first, second, third, *rest = messages
    yield from (first, third, second, *rest)


def truncate(messages: Messages) -> Messages:
    yield next(messages)
    yield next(messages)[:-5]


def flip_the_payload(messages: Messages) -> Messages:
    yield next(messages)
    yield flipped(next(messages), -3)


def flip_the_header(messages: Messages) -> Messages:
    yield next(messages)
    yield flipped(next(messages), 90)


def cut(messages: Messages) -> Messages:
    yield next(messages)


def flipped(message: bytes, place: int) -> bytes:
    changed = bytearray(message)
    changed[place] ^= 8
    return bytes(changed)


@SHARED
@pytest.mark.parametrize(
    "fault", [drop, duplicate, reorder, reorder_later, truncate, flip_the_payload, flip_the_header, cut]
)
def test_a_fault_on_the_way_fails_both_ends_and_writes_nothing_wrong(
    wire: Wire, fault: Fault, shared_memory: bool
) -> None:
    with groups(shared_memory=shared_memory) as (prefill, decode):
        handover, before = Handover(prefill, decode), decode.ranks[0].content()
        wire.fault = fault
        (sent,) = handover.push()()
        (received,) = handover.filled()
        assert decode.endpoints[0].address in sent.error and received.error.startswith("source rank 0: ")
        after = decode.ranks[0].content()
        for block, place in zip(BLOCKS, PLACES, strict=True):
            assert torch.equal(after[place], prefill.content[block]) or torch.equal(after[place], before[place])
        handover.reuse()
        wire.fault = iter
        assert not ok(handover.push()())  # the same again
        handover.check_reused()
        again = Handover(prefill, decode, 2)
        assert ok(again.push()()) and ok(again.filled())
        again.check_arrived()


@SHARED
def test_chunks_that_come_after_an_abort_do_not_touch_the_new_owner(wire: Wire, shared_memory: bool) -> None:
    with groups((9, 3), (1, 2), shared_memory) as (prefill, decode):
        handover, gate = Handover(prefill, decode), Gate()
        wire.fault = gate
        sent = handover.push()
        assert gate.reached.wait(DEADLINE_S)
        handover.reuse()
        assert all(result.error == "the fence was closed" for result in handover.filled())
        gate.go.set()
        assert not ok(sent())
        handover.check_reused()


@SHARED
def test_chunks_that_come_while_the_fence_is_closed(shared_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_chunks(monkeypatch, 300)
    with groups((9, 3), (2, 2), shared_memory) as (prefill, decode):
        for number in range(5):
            handover = Handover(prefill, decode, number)
            sent = handover.push()
            handover.reuse()
            sent(), handover.filled()
            handover.check_reused()


@SHARED
def test_stop_ends_what_runs_and_what_waits_of_its_attempt_alone(wire: Wire, shared_memory: bool) -> None:
    with groups((9, 3), (1, 2), shared_memory) as (prefill, decode):
        handover, gate = Handover(prefill, decode), Gate()
        wire.fault = gate
        pushes = [handover.push(), handover.push(), handover.push()]
        assert gate.reached.wait(DEADLINE_S)
        wire.fault = iter
        other = prefill.begin(
            HandoffOp.PUSH, fence_of(2), blocks=[0], destinations=decode.endpoints, timeout_s=DEADLINE_S
        )
        results: queue.SimpleQueue[TransferResult] = queue.SimpleQueue()
        rank, sent = prefill.ranks[0], len(wire.sent)
        note_results(rank, results)
        assert ok([rank.run(HandoffOp.STOP, fence_of(9))])
        assert ok([rank.run(HandoffOp.STOP, handover.fence)])
        told = [results.get_nowait().error for _ in range(5)]
        assert told[0] == "" and told[1:4] == ["it was stopped"] * 3 and told[4] == ""
        assert [wait()[0].error for wait in pushes] == ["it was stopped"] * 3
        assert "is open to this ticket" in other()[0].error
        gate.go.set()
        assert ok(decode.run(HandoffOp.CLOSE, handover.fence)) and not ok(handover.filled())
        assert len(wire.sent) <= sent + 4  # two of the other, and two that gRPC had asked for and did not send


def note_results(rank: Rank, results: queue.SimpleQueue[TransferResult]) -> None:
    """Every result goes to ``results`` too."""
    real = rank.handoff._done

    def done(result: TransferResult) -> None:
        results.put(result)
        real(result)

    rank.handoff._done = done


def test_time_is_over_for_what_runs_and_what_waits(wire: Wire) -> None:
    with groups() as (prefill, decode):
        handover, gate = Handover(prefill, decode), Gate()
        wire.fault = gate
        begun = time.monotonic()
        long = handover.push(timeout_s=0.3)
        assert gate.reached.wait(DEADLINE_S)
        short = handover.push(timeout_s=0.1)
        assert short()[0].error == "it was not through after timeout_s=0.1" and time.monotonic() - begun < 0.29
        assert "0.3" in long()[0].error or "DEADLINE" in long()[0].error
        assert handover.push(timeout_s=0.0)()[0].error
        assert time.monotonic() - begun < 5
        gate.go.set()
        assert ok(decode.run(HandoffOp.CLOSE, handover.fence)) and not ok(handover.filled())


def test_a_peer_that_accepts_and_says_nothing_costs_no_more_than_the_timeout() -> None:
    with groups() as (prefill, _), socket.create_server(("127.0.0.1", 0)) as deaf:
        ends = [KvEndpoint((0, 3), f"127.0.0.1:{deaf.getsockname()[1]}")]
        begun = time.monotonic()
        (result,) = prefill.run(HandoffOp.PUSH, fence_of(), blocks=BLOCKS, destinations=ends, timeout_s=0.2)
        assert result.error and time.monotonic() - begun < 5


def test_nobody_there_is_told_at_once() -> None:
    with groups() as (prefill, decode):
        with socket.create_server(("127.0.0.1", 0)) as closed:
            address = f"127.0.0.1:{closed.getsockname()[1]}"
        ends = [KvEndpoint((0, 3), address)]
        (result,) = prefill.run(HandoffOp.PUSH, fence_of(), blocks=BLOCKS, destinations=ends, timeout_s=DEADLINE_S)
        assert address in result.error and "UNAVAILABLE" in result.error
        handover = Handover(prefill, decode)
        assert ok(handover.push()()) and ok(handover.filled())


def test_a_slow_rank_holds_up_nobody_else(wire: Wire) -> None:
    with groups((9, 3), (1, 2)) as (prefill, decode):
        handover, gate = Handover(prefill, decode), Gate()
        wire.fault = gate
        end = {"destinations": decode.endpoints[:1], "timeout_s": DEADLINE_S}
        slow = prefill.begin(HandoffOp.PUSH, handover.fence, blocks=BLOCKS, **end)
        assert gate.reached.wait(DEADLINE_S)
        wire.fault = iter
        end["destinations"] = [KvEndpoint((0, 0), ""), decode.endpoints[1]]
        assert ok(prefill.run(HandoffOp.PUSH, handover.fence, blocks=BLOCKS, **end))
        assert ok([decode.ranks[1].run(HandoffOp.CLOSE, handover.fence)])
        gate.go.set()
        assert ok(slow())
        assert ok(handover.filled())
        handover.check_arrived()


def test_a_receiver_that_does_not_read_is_not_sent_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    go, taken = threading.Event(), itertools.count()
    real_receive, real_encode = FenceStream.receive, kv_transport.encode_chunk

    def receive(self: FenceStream, message: bytes) -> None:
        go.wait(DEADLINE_S)
        real_receive(self, message)

    def encode(*arguments: Any) -> bytes:
        next(taken)
        return real_encode(*arguments)

    monkeypatch.setattr(FenceStream, "receive", receive)
    monkeypatch.setattr(kv_transport, "encode_chunk", encode)
    form = {"num_layers": 12, "block_size": 64, "head_dim": 128}
    with groups((8, 8), **form) as (prefill, decode):  # 75 MB, in 2 MiB messages
        fence, blocks = fence_of(), list(range(12))
        assert ok(decode.run(HandoffOp.OPEN, fence, blocks=blocks, sources=prefill.heads))
        push = prefill.run(HandoffOp.PUSH, fence, blocks=blocks, destinations=decode.endpoints, timeout_s=1.0)
        assert not ok(push)
        go.set()
        assert next(taken) <= 6
        assert not ok(decode.run(HandoffOp.FILL, fence))


@SHARED
def test_what_cannot_be_read_from_the_cache_fails_the_push(wire: Wire, shared_memory: bool) -> None:
    with groups(shared_memory=shared_memory) as (prefill, decode):
        handover = Handover(prefill, decode)
        ends = {"destinations": decode.endpoints, "timeout_s": DEADLINE_S}
        (sent,) = prefill.run(HandoffOp.PUSH, handover.fence, blocks=[1, 2, 99, 3], **ends)
        assert "block=99" in sent.error
        assert "before its last message" in handover.filled()[0].error


def test_heads_that_nobody_has_and_too_many_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with groups((9, 3), (2, 1)) as (prefill, decode):
        fence, job = fence_of(), {"blocks": [0], "timeout_s": DEADLINE_S}
        for result in prefill.run(HandoffOp.PUSH, fence, destinations=[KvEndpoint((0, 4), "127.0.0.1:1")], **job):
            assert "no rank holds KV head 3" in result.error
        (opened,) = decode.run(HandoffOp.OPEN, fence, blocks=[0], sources=[(0, 2)])
        assert "no rank holds KV head 2" in opened.error
        (opened,) = decode.run(HandoffOp.OPEN, fence, blocks=[12], sources=[(0, 3)])
        assert opened.error.startswith("block=12")
        assert prefill.run(HandoffOp.OPEN, fence, blocks=[0], sources=[(0, 3)])[0].error == "this rank takes no KV"
        monkeypatch.setattr(pusher, "MAX_DESTINATIONS", 0)
        assert prefill.run(HandoffOp.PUSH, fence, destinations=decode.endpoints, **job)[0].error.startswith("destin")
        assert decode.run(HandoffOp.FILL, fence)[0].error == "there is no fence 1"
        assert ok(decode.run(HandoffOp.CLOSE, fence))


def test_a_destination_that_is_idle_costs_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    with groups() as (prefill, decode):
        results: queue.SimpleQueue[TransferResult] = queue.SimpleQueue()
        cache = prefill.ranks[0].cache
        idle = Pusher(cache, prefill.heads, 0, connect(HandoffSpec()), results.put, idle_s=0.01)
        for number in range(2):
            handover = Handover(prefill, decode, number)
            ends = {"destinations": decode.endpoints, "timeout_s": DEADLINE_S}
            idle.push(HandoffJob(number, HandoffOp.PUSH, handover.fence, BLOCKS, **ends))
            assert ok([results.get(timeout=DEADLINE_S)]) and ok(handover.filled())
            with idle._changed:
                threads = [destination.thread for destination in idle._destinations.values()]
            for thread in threads:
                thread.join(DEADLINE_S)
            assert not any(thread.is_alive() for thread in threads) and not idle._destinations
        assert idle.close()


@SHARED
def test_nothing_is_left_of_many_transfers(wire: Wire, shared_memory: bool) -> None:
    faults: list[Fault] = [iter, flip_the_payload, iter, cut]
    counts: list[int] = []
    with groups((9, 3), (2, 2), shared_memory) as (prefill, decode):
        for number in range(40):
            wire.fault = faults[number % 4]
            handover = Handover(prefill, decode, number)
            sent = ok(handover.push()())
            assert sent == ok(handover.filled()) == (wire.fault is iter)
            assert ok(decode.run(HandoffOp.CLOSE, handover.fence))
            if number % 20 == 19:
                gc.collect()
                counts.append(len(os.listdir("/proc/self/fd")))
        assert all(len(rank.handoff._fences) == 0 for rank in decode.ranks)
    assert counts[1] <= counts[0] + 2
