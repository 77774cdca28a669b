"""What prefill remembers of transfers: keys, epochs, attempts, leases, and how many may run."""

from __future__ import annotations

import pytest

from headwise.runtime.handoff import transfers as module
from headwise.runtime.handoff.messages import TransferKey
from headwise.runtime.handoff.sending import Answer, End, Push, Sending, State, Stop
from headwise.runtime.handoff.transfers import (
    Accepted,
    AttemptOverError,
    OtherPromptError,
    Status,
    TooManyTransfersError,
    Transfers,
    UnknownEpochError,
)

EPOCH, LIMIT, MEMORY_S, LEASE_S = 7, 3, 60.0, 30.0


def key(transfer: int = 1, attempt: int = 1, epoch: int = EPOCH) -> TransferKey:
    return TransferKey(bytes([transfer]) * 16, attempt, 5, epoch)


def make() -> Transfers:
    return Transfers(EPOCH, LIMIT, MEMORY_S)


def accept(
    transfers: Transfers, key: TransferKey, now: float = 0, prompt: bytes = b"prompt", blocks: int = 4
) -> Accepted:
    return transfers.accept(key, prompt, blocks, 0, now, LEASE_S, None)


def start(transfers: Transfers, key: TransferKey, now: float = 0) -> Sending:
    sending, new, orders = accept(transfers, key, now)
    assert sending is not None and new and not orders
    return sending


def commit(transfers: Transfers, key: TransferKey) -> None:
    sending = transfers.get(key)
    assert sending is not None
    sending.computed(4)
    sending.pushed(4)
    sending.verified()
    assert transfers.commit(key, 1) == [(key, Answer())]
    assert transfers.status(key) == Status(State.COMMITTED)


def test_a_repeated_prefill_starts_nothing_and_is_accepted_again() -> None:
    transfers = make()
    sending = start(transfers, key())
    assert accept(transfers, key()) == Accepted(sending, False, [])
    sending.failed("NaN")
    assert accept(transfers, key()) == Accepted(sending, False, [])
    assert transfers.sweep(1) == []
    assert accept(transfers, key()) == Accepted(None, False, [])
    assert transfers.status(key()) == Status(State.FAILED, "NaN")


def test_a_key_that_comes_with_another_prompt_is_refused() -> None:
    transfers = make()
    sending = start(transfers, key())
    for over in (False, True):
        with pytest.raises(OtherPromptError, match="attempt=1"):
            accept(transfers, key(), prompt=b"another")
        if not over:
            sending.failed("NaN")
            transfers.sweep(1)


def test_keys_of_another_epoch_are_not_known() -> None:
    transfers, other = make(), key(epoch=EPOCH - 1)
    with pytest.raises(UnknownEpochError, match="prefill_epoch=6: this engine is in epoch 7"):
        accept(transfers, other)
    assert transfers.abort(other, "cancelled", 0) == []
    assert transfers.commit(other, 0) == [(other, Answer())]
    assert transfers.status(other) == transfers.renew(other, 0, LEASE_S) == Status(None)
    assert len(transfers) == 0


def test_as_many_run_as_may_and_a_refusal_is_remembered() -> None:
    transfers = make()
    sendings = [start(transfers, key(number)) for number in range(LIMIT)]
    with pytest.raises(TooManyTransfersError, match="running=3: at most 3 transfers") as raised:
        accept(transfers, key(9))
    assert (raised.value.running, raised.value.limit) == (LIMIT, LIMIT)
    assert not accept(transfers, key(0)).new, "a repetition is not one more"
    sendings[0].failed("NaN")
    assert transfers.running == LIMIT - 1
    with pytest.raises(TooManyTransfersError, match="at most 3 transfers"):
        accept(transfers, key(9))
    start(transfers, key(9, attempt=2))


def test_a_newer_attempt_ends_the_older_which_does_not_come_back() -> None:
    transfers = make()
    older = start(transfers, key(attempt=2))
    older.computed(1)
    reason = "attempt 3 came"
    sending, new, orders = accept(transfers, key(attempt=3))
    assert new and sending is not older
    assert orders == [(key(attempt=2), Stop()), (key(attempt=2), End(reason))]
    assert transfers.status(key(attempt=2)) == Status(State.FAILED, reason)
    with pytest.raises(AttemptOverError, match="attempt=1: attempt 3 of this transfer has come"):
        accept(transfers, key(attempt=1))
    assert transfers.status(key(attempt=3)) == Status(State.COMPUTING)


def test_a_newer_attempt_takes_the_place_of_the_older_where_the_limit_is_reached() -> None:
    transfers = make()
    for number in range(LIMIT):
        start(transfers, key(number))
    assert accept(transfers, key(0, attempt=2)).orders == [(key(0), End("attempt 2 came"))]
    assert transfers.running == LIMIT


def test_an_abort_that_overtakes_its_prefill_has_it_refused() -> None:
    transfers = make()
    assert transfers.abort(key(), "cancelled", 0) == []
    for _ in range(2):
        with pytest.raises(AttemptOverError, match="cancelled"):
            accept(transfers, key())
    assert transfers.status(key()) == Status(State.FAILED, "cancelled")
    assert transfers.running == 0


def test_an_abort_of_a_newer_attempt_ends_the_older_too() -> None:
    transfers = make()
    start(transfers, key(attempt=1))
    assert transfers.abort(key(attempt=2), "cancelled", 0) == [(key(attempt=1), End("attempt 2 came"))]
    with pytest.raises(AttemptOverError, match="cancelled"):
        accept(transfers, key(attempt=2))


def test_repeated_aborts_and_commits_get_the_same_answer() -> None:
    transfers = make()
    start(transfers, key(1)).computed(1)
    assert transfers.abort(key(1), "cancelled", 0) == [(key(1), Stop()), (key(1), End("cancelled"))]
    start(transfers, key(2))
    commit(transfers, key(2))
    for now in (1, 2, MEMORY_S):
        assert transfers.abort(key(1), "again", now) == transfers.abort(key(2), "again", now) == []
        assert transfers.commit(key(1), now) == [(key(1), Answer())]
        assert transfers.commit(key(2), now) == [(key(2), Answer())]
        assert transfers.status(key(1)) == Status(State.FAILED, "cancelled")
        assert transfers.status(key(2)) == Status(State.COMMITTED)
        assert transfers.sweep(now) == []


def test_a_commit_of_a_running_attempt_is_answered_later() -> None:
    transfers = make()
    sending = start(transfers, key())
    assert sending.computed(4) == [Push(0, 4)]
    assert transfers.commit(key(), 1) == []
    assert sending.pushed(4) == []
    assert sending.verified() == [Answer()]


def test_every_lease_that_has_run_out_ends_not_only_the_oldest() -> None:
    transfers = make()
    start(transfers, key(1), now=0)
    start(transfers, key(2), now=1)
    start(transfers, key(3), now=2)
    transfers.renew(key(1), 20, LEASE_S)
    assert transfers.sweep(LEASE_S) == []
    reason = "the lease ran out"
    assert transfers.sweep(2 + LEASE_S) == [(key(2), End(reason)), (key(3), End(reason))]
    assert transfers.running == 1
    assert transfers.sweep(20 + LEASE_S) == [(key(1), End(reason))]


def test_what_is_over_is_forgotten_after_a_while() -> None:
    transfers = make()
    start(transfers, key(1))
    commit(transfers, key(1))
    transfers.abort(key(2), "cancelled", 5)
    transfers.sweep(10)
    transfers.sweep(5 + MEMORY_S)
    assert (transfers.status(key(1)).state, transfers.status(key(2)).state) == (State.COMMITTED, None)
    transfers.sweep(10 + MEMORY_S)
    assert len(transfers) == 0
    start(transfers, key(1), now=80)


def test_no_more_are_remembered_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REMEMBERED", 2)
    transfers = make()
    start(transfers, key(9)).computed(1)
    for number in range(4):
        transfers.abort(key(number), "cancelled", number)
    assert [transfers.status(key(number)).state for number in range(4)] == [None, None, State.FAILED, State.FAILED]
    assert transfers.status(key(9)) == Status(State.COMPUTING), "what runs does not count"
    assert len(transfers) == 3
    start(transfers, key(0))


def test_a_renewal_says_how_an_attempt_stands() -> None:
    transfers = make()
    sending = start(transfers, key())
    assert transfers.renew(key(), 10, LEASE_S) == Status(State.COMPUTING)
    assert sending.lease_until == 10 + LEASE_S
    assert transfers.renew(key(2), 10, LEASE_S) == Status(None)


def test_a_prompt_with_nothing_to_send_leaves_nothing() -> None:
    transfers = make()
    start(transfers, key(attempt=1))
    with pytest.raises(ValueError, match="first_block"):
        transfers.accept(key(attempt=2), b"prompt", 4, 4, 0, LEASE_S, None)
    assert transfers.status(key(attempt=1)) == Status(State.COMPUTING)
    assert len(transfers) == 1
