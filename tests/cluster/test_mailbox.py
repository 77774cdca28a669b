"""The mailbox: what each kind's reader gets, and how a death reaches all of them."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import msgpack
import pytest

from headwise.cluster.channel import ChannelError, Kind
from headwise.cluster.group import ShardGroupDied
from headwise.cluster.mailbox import Mailbox
from headwise.cluster.queue_channel import QueueEngineChannel
from headwise.cluster.zmq_channel import ZmqEngineChannel
from headwise.workers.plan import MAX_MESSAGE_BYTES

DEADLINE_S = 10.0


@pytest.fixture
def channel() -> QueueEngineChannel:
    return QueueEngineChannel(2)


@pytest.fixture
def mailbox(channel: QueueEngineChannel) -> Mailbox:
    return Mailbox(channel, ["here", "there"])


def test_each_kind_is_read_in_its_own_order(channel: QueueEngineChannel, mailbox: Mailbox) -> None:
    channel.rank(0).send(Kind.OUTPUT, b"one")
    channel.rank(1).send(Kind.TRANSFERRED, b"job")
    channel.rank(0).send(Kind.OUTPUT, b"two")
    assert mailbox.poll(Kind.TRANSFERRED, DEADLINE_S) == (1, b"job")
    assert mailbox.poll(Kind.TRANSFERRED, 0) is None
    assert [mailbox.receive(Kind.OUTPUT) for _ in range(2)] == [(0, b"one"), (0, b"two")]


def test_a_death_is_raised_once_what_came_before_is_read(channel: QueueEngineChannel, mailbox: Mailbox) -> None:
    channel.rank(1).send(Kind.ERROR, msgpack.packb((1, "out of memory")))
    channel.rank(0).send(Kind.OUTPUT, b"one")
    channel.rank(0).send(Kind.ERROR, msgpack.packb((0, "a later one")))
    assert mailbox.receive(Kind.OUTPUT) == (0, b"one")
    for use in (lambda: mailbox.receive(Kind.OUTPUT), lambda: mailbox.send_all(Kind.STEP, b"")):
        with pytest.raises(ShardGroupDied, match="rank 1 on node there died: out of memory"):
            use()
    assert channel.rank(0).receive(0) is None


def test_a_death_that_another_thread_reports_ends_a_wait(mailbox: Mailbox) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(mailbox.poll, Kind.REPLY, DEADLINE_S)
        threading.Timer(0.05, mailbox.declare_dead, (0, "gone")).start()
        with pytest.raises(ShardGroupDied, match="rank 0 on node here died: gone"):
            waiting.result(DEADLINE_S / 2)


def test_a_rank_that_does_not_read_is_the_one_that_died(
    channel: QueueEngineChannel, mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send(rank: int, kind: Kind, payload: bytes) -> None:
        if rank == 1:
            raise ChannelError("has not read")

    monkeypatch.setattr(channel, "send", send)
    with pytest.raises(ShardGroupDied, match="rank 1 on node there died: has not read"):
        mailbox.send_all(Kind.STEP, b"")


def test_no_rank_is_blamed_for_a_message_too_large_for_any() -> None:
    channel = ZmqEngineChannel(2)
    mailbox = Mailbox(channel, ["here", "there"])
    with pytest.raises(
        ShardGroupDied, match=f"the shard group has ended: a message of {MAX_MESSAGE_BYTES + 1}"
    ) as death:
        mailbox.send_all(Kind.STEP, bytes(MAX_MESSAGE_BYTES + 1))
    assert death.value.rank is None and death.value.node is None
    assert str(copy.copy(death.value)) == str(death.value)
    channel.close()
