"""Decode's side of a handoff: what every event leads to in every state."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest

from headwise.runtime.handoff.receiving import (
    RETRY_S,
    Abort,
    Ask,
    Cause,
    Close,
    Commit,
    Fallback,
    Free,
    Instruction,
    Open,
    Publish,
    Receiving,
    State,
)

LEASE_S, DEADLINE = 30.0, 100.0
NOW = 10.0  # of every event that a test is about; what led there was at 0

Cell = tuple[list[Instruction], State]


def opening() -> Receiving:
    return Receiving(LEASE_S, DEADLINE)


def started() -> Receiving:
    receiving = opening()
    assert receiving.start(0) == [Open()]
    return receiving


def asking() -> Receiving:
    receiving = started()
    assert receiving.opened(0) == [Ask()]
    return receiving


def asking_filled() -> Receiving:
    receiving = asking()
    assert receiving.filled(0) == []
    return receiving


def filling() -> Receiving:
    receiving = asking()
    assert receiving.answered(0) == []
    return receiving


def committing() -> Receiving:
    receiving = filling()
    assert receiving.filled(0) == [Commit()]
    return receiving


def unanswered() -> Receiving:
    receiving = committing()
    assert receiving.committed(NOW - RETRY_S, None) == []
    return receiving


def closing() -> Receiving:
    receiving = filling()
    assert receiving.filled(0, "gone") == [Abort("gone"), Close(), Fallback(Cause.TRANSPORT, "gone")]
    return receiving


def freed() -> Receiving:
    receiving = closing()
    assert receiving.closed(0) == [Free()]
    return receiving


def published() -> Receiving:
    receiving = committing()
    assert receiving.committed(0, True) == [Publish()]
    return receiving


STAGES: dict[str, tuple[Callable[[], Receiving], State]] = {
    "opening": (opening, State.OPENING),
    "started": (started, State.OPENING),
    "asking": (asking, State.ASKING),
    "asking, filled": (asking_filled, State.ASKING),
    "filling": (filling, State.FILLING),
    "committing": (committing, State.COMMITTING),
    "unanswered": (unanswered, State.COMMITTING),
    "closing": (closing, State.CLOSING),
    "freed": (freed, State.ENDED),
    "published": (published, State.ENDED),
}
EVENTS: dict[str, Callable[[Receiving], list[Instruction]]] = {
    "start": lambda receiving: receiving.start(NOW),
    "opened": lambda receiving: receiving.opened(NOW),
    "not opened": lambda receiving: receiving.opened(NOW, "rank 1"),
    "accepted": lambda receiving: receiving.answered(NOW),
    "refused": lambda receiving: receiving.answered(NOW, Cause.REFUSED, "full"),
    "unreachable": lambda receiving: receiving.answered(NOW, Cause.UNREACHABLE, "no route"),
    "filled": lambda receiving: receiving.filled(NOW),
    "not filled": lambda receiving: receiving.filled(NOW, "checksum"),
    "sound": lambda receiving: receiving.committed(NOW, True),
    "not sound": lambda receiving: receiving.committed(NOW, False, "NaN"),
    "no answer": lambda receiving: receiving.committed(NOW, None),
    "stands": lambda receiving: receiving.renewed(NOW, True),
    "lost": lambda receiving: receiving.renewed(NOW, False, "unknown"),
    "tick": lambda receiving: receiving.tick(NOW),
    "lease over": lambda receiving: receiving.tick(LEASE_S),
    "deadline": lambda receiving: receiving.tick(DEADLINE),
    "cancel": lambda receiving: receiving.cancel(NOW),
    "closed": lambda receiving: receiving.closed(NOW),
}
LEASE_OVER, DEADLINE_OVER = "the lease of 30 s ran out", "the deadline has passed"


def fails(cause: Cause, reason: str, *, told: bool = True) -> Cell:
    found: list[Instruction] = [Abort(reason)] if told else []
    found.append(Close())
    if cause is not Cause.CANCELLED:
        found.append(Fallback(cause, reason))
    return found, State.CLOSING


BEFORE_ASK: dict[str, Cell] = {
    "opened": ([Ask()], State.ASKING),
    "not opened": fails(Cause.TRANSPORT, "rank 1", told=False),
    "filled": ([], State.OPENING),
    "not filled": fails(Cause.TRANSPORT, "checksum", told=False),
    "deadline": fails(Cause.DEADLINE, DEADLINE_OVER, told=False),
    "cancel": fails(Cause.CANCELLED, "cancelled", told=False),
}
AFTER_ASK: dict[str, Cell] = {
    "lease over": fails(Cause.LEASE, LEASE_OVER),
    "deadline": fails(Cause.DEADLINE, DEADLINE_OVER),
    "cancel": fails(Cause.CANCELLED, "cancelled"),
}
ASKING: dict[str, Cell] = AFTER_ASK | {
    "accepted": ([], State.FILLING),
    "refused": fails(Cause.REFUSED, "full", told=False),
    "unreachable": fails(Cause.UNREACHABLE, "no route"),
    "not filled": fails(Cause.TRANSPORT, "checksum"),
}
COMMITTING: dict[str, Cell] = AFTER_ASK | {
    "sound": ([Publish()], State.ENDED),
    "not sound": fails(Cause.PEER, "NaN"),
    "lost": fails(Cause.PEER, "unknown"),
}
TABLE: dict[str, dict[str, Cell]] = {
    "opening": BEFORE_ASK | {"start": ([Open()], State.OPENING)},
    "started": BEFORE_ASK,
    "asking": ASKING,
    "asking, filled": ASKING | {"accepted": ([Commit()], State.COMMITTING)},
    "filling": AFTER_ASK
    | {
        "filled": ([Commit()], State.COMMITTING),
        "not filled": fails(Cause.TRANSPORT, "checksum"),
        "lost": fails(Cause.PEER, "unknown"),
    },
    "committing": COMMITTING,
    "unanswered": COMMITTING | {"tick": ([Commit()], State.COMMITTING)},
    "closing": {"closed": ([Free()], State.ENDED)},
    "freed": {},
    "published": {},
}
"""What is not in it gives no instruction and leaves the state."""


@pytest.mark.parametrize(("stage", "event"), list(product(STAGES, EVENTS)))
def test_every_event_in_every_state(stage: str, event: str) -> None:
    make, state = STAGES[stage]
    receiving = make()
    assert receiving.state is state
    instructions, after = TABLE[stage].get(event, ([], state))
    assert EVENTS[event](receiving) == instructions
    assert receiving.state is after
    falls_back = [instruction for instruction in instructions if isinstance(instruction, Fallback)]
    if falls_back:
        assert (receiving.cause, receiving.reason) == (falls_back[0].cause, falls_back[0].reason)


@pytest.mark.parametrize(("stage", "event"), list(product(STAGES, EVENTS)))
def test_an_event_that_comes_twice_does_nothing_the_second_time(stage: str, event: str) -> None:
    receiving = STAGES[stage][0]()
    EVENTS[event](receiving)
    state = receiving.state
    assert EVENTS[event](receiving) == []
    assert receiving.state is state


@pytest.mark.parametrize("stage", STAGES)
def test_renew_asks_only_for_what_the_peer_knows(stage: str) -> None:
    assert STAGES[stage][0]().renewable == (stage in ("filling", "committing", "unanswered"))


@pytest.mark.parametrize("make", [filling, committing])
def test_a_renewed_lease_counts_from_the_answer(make: Callable[[], Receiving]) -> None:
    receiving = make()
    assert receiving.lease_until == LEASE_S
    assert receiving.renewed(20, True) == []
    assert receiving.lease_until == 20 + LEASE_S
    assert receiving.tick(20 + LEASE_S - 0.1) == []
    assert receiving.tick(20 + LEASE_S) == fails(Cause.LEASE, LEASE_OVER)[0]


def test_there_is_no_lease_before_the_peer_is_asked() -> None:
    receiving = started()
    assert receiving.lease_until is None
    assert receiving.tick(DEADLINE - 1) == []


def test_without_a_deadline_only_the_lease_counts() -> None:
    receiving = Receiving(LEASE_S, None)
    receiving.start(0)
    assert receiving.tick(1e9) == []
    assert receiving.opened(1e9) == [Ask()]
    assert receiving.tick(1e9 + LEASE_S) == fails(Cause.LEASE, LEASE_OVER)[0]


def test_a_commit_is_asked_again_as_long_as_the_lease_holds() -> None:
    receiving = committing()
    for now in (1.0, 2.0, 3.0):
        assert receiving.committed(now, None) == []
        assert receiving.tick(now + RETRY_S - 0.1) == []
        assert receiving.tick(now + RETRY_S) == [Commit()]
        assert receiving.tick(now + RETRY_S) == []
    assert receiving.tick(LEASE_S) == fails(Cause.LEASE, LEASE_OVER)[0]
    assert receiving.committed(LEASE_S, True) == []


def test_one_that_was_cancelled_frees_its_blocks_without_falling_back() -> None:
    receiving = filling()
    assert receiving.cancel(1) == [Abort("cancelled"), Close()]
    assert receiving.cause is Cause.CANCELLED
    assert receiving.filled(2) == []
    assert receiving.closed(3) == [Free()]
