"""The step channel: order, sizes, who may come in, and what is left behind."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import zmq

from headwise.cluster.channel import ChannelError, EngineChannel, Kind, ShardChannel
from headwise.cluster.queue_channel import QueueEngineChannel
from headwise.cluster.zmq_channel import ShardEndpoint, ZmqEngineChannel, ZmqShardChannel
from headwise.workers.errors import InvalidValueError
from headwise.workers.plan import MAX_MESSAGE_BYTES

DEADLINE_S = 10.0


@pytest.fixture(params=["ipc", "tcp", "queues"])
def channel(request: pytest.FixtureRequest) -> Iterator[EngineChannel]:
    if request.param == "queues":
        yield QueueEngineChannel(2)
        return
    engine = ZmqEngineChannel(2, request.param)
    yield engine
    engine.close()


@pytest.fixture
def ranks(channel: EngineChannel) -> Iterator[Sequence[ShardChannel]]:
    if isinstance(channel, QueueEngineChannel):
        yield [channel.rank(rank) for rank in range(2)]
        return
    assert isinstance(channel, ZmqEngineChannel)
    shards = [ZmqShardChannel(channel.endpoint(rank)) for rank in range(2)]
    yield shards
    for shard in shards:
        shard.close(linger_s=0)


def test_messages_arrive_in_order_at_their_rank(channel: EngineChannel, ranks: Sequence[ShardChannel]) -> None:
    for i in range(200):
        channel.send_all(Kind.STEP, b"all %d" % i)
    channel.send(1, Kind.QUERY, b"one")
    for rank in ranks:
        assert [rank.receive(DEADLINE_S) for _ in range(200)] == [(Kind.STEP, b"all %d" % i) for i in range(200)]
    assert ranks[1].receive(DEADLINE_S) == (Kind.QUERY, b"one")
    assert ranks[0].receive(0.05) is None


def test_replies_say_whose_they_are(channel: EngineChannel, ranks: Sequence[ShardChannel]) -> None:
    ranks[1].send(Kind.OUTPUT, b"x" * 10_000_000)
    assert channel.receive(DEADLINE_S) == (Kind.OUTPUT, 1, b"x" * 10_000_000)
    ranks[0].send(Kind.ERROR, b"")
    assert channel.receive(DEADLINE_S) == (Kind.ERROR, 0, b"")
    assert channel.receive(0) is None


def test_wake_ends_a_wait(channel: EngineChannel) -> None:
    answers: list[object] = []
    waiter = threading.Thread(target=lambda: answers.append(channel.receive(DEADLINE_S)))
    waiter.start()
    channel.wake()
    waiter.join(DEADLINE_S)
    assert answers == [None]


def is_held(lock: Any) -> bool:
    """Whether another thread has it."""
    if free := lock.acquire(blocking=False):
        lock.release()
    return not free


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_closing_ends_what_another_thread_does_with_the_sockets(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headwise.cluster.zmq_channel.SEND_TIMEOUT_S", 0.5)
    channel = ZmqEngineChannel(1, transport)

    def send_for_ever() -> None:
        while True:
            channel.send(0, Kind.STEP, b"")

    with ThreadPoolExecutor(2) as pool:
        receiving, sending = pool.submit(channel.receive, DEADLINE_S), pool.submit(send_for_ever)
        started = time.monotonic()
        while not all(is_held(lock) for lock in (channel._receiving, channel._sending)):  # both are in the midst of it
            assert time.monotonic() - started < DEADLINE_S
        started = time.monotonic()
        channel.close()
        assert receiving.result(DEADLINE_S) is None
        with pytest.raises(ChannelError, match=r"closed|has not read"):
            sending.result(DEADLINE_S)
        assert time.monotonic() - started < DEADLINE_S / 2
    assert channel.receive(DEADLINE_S) is None


@pytest.mark.parametrize("waits", [True, False])
def test_a_rank_that_fails_on_another_thread_hears_of_it_where_it_receives(
    channel: EngineChannel, ranks: Sequence[ShardChannel], waits: bool
) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ranks[0].receive, DEADLINE_S) if waits else None
        ranks[0].fail(OSError("no result"))
        with pytest.raises(OSError, match="no result"):
            (waiting or pool.submit(ranks[0].receive, DEADLINE_S)).result(DEADLINE_S)


def test_a_closed_end_of_a_rank_sends_nothing() -> None:
    channel = ZmqEngineChannel(1)
    rank = ZmqShardChannel(channel.endpoint(0))
    for _ in range(2):
        rank.close(linger_s=0)
    rank.fail(OSError("too late"))
    with pytest.raises(ChannelError, match="closed"):
        rank.send(Kind.TRANSFERRED, b"")
    channel.close()


def test_waking_over_and_over_neither_blocks_nor_hides_a_message(
    channel: EngineChannel, ranks: Sequence[ShardChannel]
) -> None:
    for _ in range(5000):
        channel.wake()
    ranks[0].send(Kind.OUTPUT, b"seen")
    assert any(channel.receive(DEADLINE_S) == (Kind.OUTPUT, 0, b"seen") for _ in range(5001))


def test_waiting_costs_no_processor_time(channel: EngineChannel, ranks: Sequence[ShardChannel]) -> None:
    start = time.process_time()
    assert channel.receive(0.5) is None
    assert ranks[0].receive(0.5) is None
    assert time.process_time() - start < 0.05


@pytest.mark.parametrize("channel", ["ipc", "tcp"], indirect=True)
def test_too_large_a_message_is_refused_by_its_sender(channel: EngineChannel, ranks: Sequence[ShardChannel]) -> None:
    too_large = bytes(MAX_MESSAGE_BYTES + 1)
    with pytest.raises(ChannelError, match=f"{MAX_MESSAGE_BYTES + 1} bytes to rank 1"):
        channel.send(1, Kind.STEP, too_large)
    with pytest.raises(ChannelError, match="to the engine is over the limit"):
        ranks[1].send(Kind.OUTPUT, too_large)
    channel.send(1, Kind.STEP, b"small")
    assert ranks[1].receive(DEADLINE_S) == (Kind.STEP, b"small")


def test_an_endpoint_does_not_print_its_secret_key() -> None:
    channel = ZmqEngineChannel(1, "tcp")
    endpoint = channel.endpoint(0)
    assert endpoint.secret_key and endpoint.secret_key.decode() not in repr(endpoint)
    channel.close()


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_waking_a_closed_channel_is_harmless(transport: str) -> None:
    channel = ZmqEngineChannel(2, transport)
    channel.close()
    channel.wake()
    channel.close()


def test_sockets_live_in_a_private_folder_that_goes_with_the_channel() -> None:
    channel = ZmqEngineChannel(1, "ipc")
    folder = Path(channel.endpoint(0).plans.removeprefix("ipc://")).parent
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    channel.close()
    assert not folder.exists()


def test_a_long_temporary_path_falls_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("long" * 30)))
    channel = ZmqEngineChannel(1, "ipc")
    assert channel.endpoint(0).plans.startswith("ipc:///tmp/")
    channel.close()


@pytest.mark.parametrize("stranger", ["no keys", "keys of its own"])
def test_strangers_are_kept_out(stranger: str) -> None:
    channel = ZmqEngineChannel(1, "tcp")
    mine = channel.endpoint(0)
    public, secret = zmq.curve_keypair()
    keys = (mine.server_key, public, secret) if stranger == "keys of its own" else (b"", b"", b"")
    intruder = ZmqShardChannel(ShardEndpoint(0, mine.plans, mine.transfers, mine.replies, *keys))
    rank = ZmqShardChannel(mine)
    try:
        with contextlib.suppress(ChannelError):  # its connection may have been refused already
            intruder.send(Kind.OUTPUT, b"wrong text")
        rank.send(Kind.OUTPUT, b"right")
        assert channel.receive(DEADLINE_S) == (Kind.OUTPUT, 0, b"right")
        assert channel.receive(0.3) is None
        channel.send(0, Kind.STEP, b"plan")
        assert rank.receive(DEADLINE_S) == (Kind.STEP, b"plan")
        assert intruder.receive(0.1) is None
    finally:
        intruder.close(linger_s=0)
        rank.close(linger_s=0)
        channel.close()


def test_a_full_queue_is_an_error_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwise.cluster.zmq_channel.SEND_TIMEOUT_S", 0.05)
    channel = ZmqEngineChannel(1, "ipc")
    sent = 0
    with pytest.raises(ChannelError, match="rank 0 has not read"):
        while sent < 100_000:
            channel.send(0, Kind.STEP, sent.to_bytes(4, "big"))
            sent += 1
    rank = ZmqShardChannel(channel.endpoint(0))
    received = [rank.receive(DEADLINE_S) for _ in range(sent)]
    assert [int.from_bytes(message[1], "big") for message in received if message] == list(range(sent))
    rank.close(linger_s=0)
    channel.close()


def test_who_may_wait_for_longer_loses_nothing_while_the_engine_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwise.cluster.zmq_channel.SEND_TIMEOUT_S", 0.05)
    channel, count = ZmqEngineChannel(1, "ipc"), 5000
    rank = ZmqShardChannel(channel.endpoint(0), DEADLINE_S)

    def send() -> None:
        for number in range(count):
            rank.send(Kind.OUTPUT, number.to_bytes(4, "big"))

    thread = threading.Thread(target=send)
    thread.start()
    thread.join(1.0)
    assert thread.is_alive(), "the queue is full"
    received = [channel.receive(DEADLINE_S) for _ in range(count)]
    assert [int.from_bytes(message[2], "big") for message in received if message] == list(range(count))
    thread.join(DEADLINE_S)
    rank.close(linger_s=0)
    channel.close()


def test_unknown_transport() -> None:
    with pytest.raises(InvalidValueError, match="transport='udp'"):
        ZmqEngineChannel(1, "udp")
