"""A link keeps leases alive, and notices when its peer does not answer, has restarted, or was stopped."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from headwise.runtime.handoff import link as link_module
from headwise.runtime.handoff.link import Answer, PrefillLink
from headwise.runtime.handoff.local import LocalServer
from headwise.runtime.handoff.messages import Load, State, Status
from headwise.runtime.handoff.receiving import Cause
from headwise.runtime.handoff.service import HandoffService
from tests.runtime.handoff.conftest import (
    DEADLINE_S,
    EPOCH,
    HELLO,
    FakeEngine,
    Renewals,
    TcpServer,
    about,
    ask,
    ask_of,
    connected,
    key_of,
    wait_until,
)

MakeLink = Callable[..., PrefillLink]
Serve = Callable[..., TcpServer]
ROOT = Path(__file__).parents[3]


def test_a_short_lease_is_renewed_before_it_runs_out(local: LocalServer, engine: FakeEngine) -> None:
    one = PrefillLink(local.address, HELLO, None, None, lambda: None, lease_s=0.5)
    try:
        connected(one)
        assert ask(one, ask_of(key_of(1))).cause is None
        renewals, begun = Renewals(), time.monotonic()
        one.track(key_of(1), renewals)
        renewals.until(key_of(1), Status(State.COMPUTING))
        renewals.until(key_of(1), Status(State.COMPUTING))
        assert time.monotonic() - begun < link_module.RENEW_S / 2
    finally:
        one.close()


@pytest.mark.usefixtures("quick")
def test_leases_are_renewed_in_one_batch(local: LocalServer, engine: FakeEngine, link: MakeLink) -> None:
    one = connected(link(local.address))
    keys, renewals = [key_of(number) for number in range(1, 4)], Renewals()
    for key in keys:
        assert ask(one, ask_of(key)).cause is None
    for key in keys:
        one.track(key, renewals)
    wait_until(lambda: keys in engine.batches)
    for key in keys:
        renewals.until(key, Status(State.COMPUTING))
    engine.statuses_of[keys[0]] = Status(State.PUSHED)
    renewals.until(keys[0], Status(State.PUSHED))
    one.untrack(keys[0])
    wait_until(lambda: engine.batches[-1] == keys[1:])
    del engine.statuses_of[keys[1]]
    renewals.until(keys[1], Status(State.UNKNOWN))
    one.untrack(keys[1])
    wait_until(lambda: engine.batches[-1] == keys[2:])


def iter_now(told: queue.SimpleQueue[Any]) -> Iterator[Any]:
    while not told.empty():
        yield told.get_nowait()


@pytest.mark.usefixtures("quick")
def test_more_leases_than_a_message_holds_are_renewed(
    local: LocalServer, engine: FakeEngine, link: MakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "MAX_KEYS", 2)
    one = connected(link(local.address))
    keys = [key_of(number) for number in range(1, 6)]
    engine.statuses_of = {key: Status(State.COMPUTING) for key in keys}
    for key in keys:
        one.track(key, lambda key, status: None)
    wait_until(lambda: {key for batch in engine.batches[-3:] for key in batch} == {*keys})
    assert all(len(batch) <= 2 for batch in engine.batches)


@pytest.mark.usefixtures("quick", "impatient")
def test_a_peer_that_does_not_answer_is_given_up_and_met_again(
    local: LocalServer, engine: FakeEngine, link: MakeLink
) -> None:
    one, renewals, key = connected(link(local.address)), Renewals(), key_of(1)
    engine.statuses_of[key] = Status(State.COMPUTING)
    one.track(key, renewals)
    renewals.until(key, Status(State.COMPUTING))
    engine.going.clear()
    renewals.until(key, None)
    assert one.session is None and "DEADLINE_EXCEEDED" in str(one.problem)
    engine.going.set()
    connected(one)
    renewals.until(key, Status(State.COMPUTING))


@pytest.mark.usefixtures("quick", "impatient")
def test_a_peer_without_transfers_is_watched_too(local: LocalServer, engine: FakeEngine, link: MakeLink) -> None:
    one = connected(link(local.address))
    engine.asks[key_of(9)] = ask_of(key_of(9))
    wait_until(lambda: one.load == Load(8, 0.25, 100))
    engine.going.clear()
    wait_until(lambda: one.session is None)


@pytest.mark.usefixtures("quick")
def test_a_peer_that_has_restarted_does_not_know_its_old_transfers(
    serve: Serve, service: HandoffService, engine: FakeEngine, link: MakeLink
) -> None:
    server = serve(service)
    one, renewals, old = connected(link(server.address)), Renewals(), key_of(1)
    assert ask(one, ask_of(old)).cause is None
    one.track(old, renewals)
    renewals.until(old, Status(State.COMPUTING))
    server.close()
    renewals.until(old, None)
    wait_until(lambda: one.session is None)
    assert ask(one, ask_of(old)).cause == Cause.UNREACHABLE
    again = FakeEngine()
    try:
        serve(HandoffService(about(epoch=EPOCH + 1), again.run), server.port)
        connected(one)
        told = renewals.next()
        while told[1] is None:
            told = renewals.next()
        assert told[1].state is State.UNKNOWN and "epoch" in told[1].reason
        assert one.session is not None and one.session.epoch == EPOCH + 1
        assert ask(one, ask_of(old)).cause == Cause.PEER
        connected(one)
        assert ask(one, ask_of(key_of(1, prefill_epoch=EPOCH + 1))).cause is None
    finally:
        again.close()


@pytest.mark.usefixtures("quick")
def test_a_new_epoch_of_the_same_server_is_noticed(local: LocalServer, service: HandoffService, link: MakeLink) -> None:
    one = connected(link(local.address))
    service.about = about(epoch=EPOCH + 1)
    wait_until(lambda: one.session is not None and one.session.epoch == EPOCH + 1)


@pytest.mark.usefixtures("quick")
def test_an_engine_that_was_forgotten_says_hello_again(
    local: LocalServer, service: HandoffService, engine: FakeEngine, link: MakeLink
) -> None:
    one, renewals, key = connected(link(local.address)), Renewals(), key_of(1)
    assert ask(one, ask_of(key)).cause is None
    one.track(key, renewals)
    renewals.until(key, Status(State.COMPUTING))
    engine.run(lambda outbound: service._decodes.clear()).result(DEADLINE_S)
    wait_until(lambda: engine.calls["hello"] == 2)
    renewals.until(key, None)
    renewals.until(key, Status(State.COMPUTING))


@contextmanager
def another_process() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A peer that can be stopped and killed, and its address."""
    command = [sys.executable, "-m", "tests.runtime.handoff.stopped_peer"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


@pytest.mark.usefixtures("quick", "impatient")
def test_a_stopped_peer_holds_up_nobody(link: MakeLink) -> None:
    with another_process() as (process, address):
        one, renewals, key = connected(link(address)), Renewals(), key_of(1)
        assert ask(one, ask_of(key)).cause is None
        one.track(key, renewals)
        renewals.until(key, Status(State.COMPUTING))
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
        assert ask(one, ask_of(key_of(2))).cause == Cause.UNREACHABLE
        renewals.until(key, None)
        process.send_signal(signal.SIGCONT)
        renewals.until(key, Status(State.COMPUTING))
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
        answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        one.commit(key, answers.put)
        started = time.monotonic()
        one.close()
        assert time.monotonic() - started < 1.0
        assert answers.get(timeout=DEADLINE_S).cause in (Cause.CANCELLED, Cause.UNREACHABLE)
