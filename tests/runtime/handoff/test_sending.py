"""Prefill's side of a handoff: what every event leads to in every state."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest

from headwise.runtime.handoff.sending import Answer, End, Instruction, Push, Sending, State, Stop

BLOCKS, FIRST = 8, 2
LEASE_S, DEADLINE = 30.0, 100.0
NOW = 10.0

Cell = tuple[list[Instruction], State]


def computing() -> Sending:
    return Sending(BLOCKS, FIRST, 0, LEASE_S, DEADLINE)


def pushing() -> Sending:
    """Some blocks are on their way, and others are not computed."""
    sending = computing()
    assert sending.computed(5) == [Push(2, 3)]
    return sending


def arrived() -> Sending:
    """All blocks are there; the request has not ended."""
    sending = pushing()
    assert sending.computed(BLOCKS) == [Push(5, 3)]
    assert sending.pushed(3) == sending.pushed(3) == []
    return sending


def verified() -> Sending:
    """The request has ended; the last blocks are on their way."""
    sending = pushing()
    assert sending.pushed(3) == []
    assert sending.computed(BLOCKS) == [Push(5, 3)]
    assert sending.verified() == []
    return sending


def waited_for() -> Sending:
    """As before, and Commit has come."""
    sending = verified()
    assert sending.commit(0) == []
    return sending


def pushed() -> Sending:
    sending = arrived()
    assert sending.verified() == []
    return sending


def committed() -> Sending:
    sending = pushed()
    assert sending.commit(0) == [Answer()]
    return sending


def failed() -> Sending:
    sending = computing()
    assert sending.failed("NaN") == [End("NaN")]
    return sending


STAGES: dict[str, tuple[Callable[[], Sending], State]] = {
    "computing": (computing, State.COMPUTING),
    "pushing": (pushing, State.COMPUTING),
    "arrived": (arrived, State.COMPUTING),
    "verified": (verified, State.COMPUTING),
    "waited for": (waited_for, State.COMPUTING),
    "pushed": (pushed, State.PUSHED),
    "committed": (committed, State.COMMITTED),
    "failed": (failed, State.FAILED),
}


def renew(sending: Sending) -> list[Instruction]:
    sending.renew(NOW, LEASE_S)
    return []


EVENTS: dict[str, Callable[[Sending], list[Instruction]]] = {
    "computed a block": lambda sending: sending.computed(3),
    "computed all": lambda sending: sending.computed(BLOCKS),
    "pushed": lambda sending: sending.pushed(3),
    "not pushed": lambda sending: sending.pushed(3, "reset"),
    "verified": lambda sending: sending.verified(),
    "failed": lambda sending: sending.failed("reset"),
    "commit": lambda sending: sending.commit(NOW),
    "renew": renew,
    "tick": lambda sending: sending.tick(NOW),
    "lease over": lambda sending: sending.tick(LEASE_S),
    "deadline": lambda sending: sending.tick(DEADLINE),
    "abort": lambda sending: sending.abort("reset"),
}


def fails(*instructions: Instruction) -> dict[str, Cell]:
    """Each way to fail; these instructions, with the reason of each in the End among them."""
    reasons = {
        "failed": "reset",
        "abort": "reset",
        "lease over": "the lease ran out",
        "deadline": "the deadline has passed",
    }
    return {
        event: ([End(reason) if isinstance(one, End) else one for one in instructions], State.FAILED)
        for event, reason in reasons.items()
    }


ANY = End("")
TABLE: dict[str, dict[str, Cell]] = {
    "computing": fails(ANY)
    | {
        "computed a block": ([Push(2, 1)], State.COMPUTING),
        "computed all": ([Push(2, 6)], State.COMPUTING),
    },
    "pushing": fails(Stop(), ANY)
    | {"computed all": ([Push(5, 3)], State.COMPUTING), "not pushed": ([End("reset")], State.FAILED)},
    "arrived": fails(ANY) | {"verified": ([], State.PUSHED)},
    "verified": fails(Stop()) | {"pushed": ([], State.PUSHED), "not pushed": ([], State.FAILED)},
    "waited for": fails(Stop(), Answer())
    | {"pushed": ([Answer()], State.COMMITTED), "not pushed": ([Answer()], State.FAILED)},
    "pushed": fails() | {"commit": ([Answer()], State.COMMITTED)},
    "committed": {"commit": ([Answer()], State.COMMITTED)},
    "failed": {"commit": ([Answer()], State.FAILED)},
}
"""What is not in it gives no instruction and leaves the state."""
IMPOSSIBLE = set(product(("computing", "arrived", "pushed"), ("pushed", "not pushed")))
"""No block is under way."""


@pytest.mark.parametrize(("stage", "event"), sorted(set(product(STAGES, EVENTS)) - IMPOSSIBLE))
def test_every_event_in_every_state(stage: str, event: str) -> None:
    make, state = STAGES[stage]
    sending = make()
    assert sending.state is state
    instructions, after = TABLE[stage].get(event, ([], state))
    assert EVENTS[event](sending) == instructions
    assert sending.state is after
    assert sending.over == (after in (State.COMMITTED, State.FAILED))
    assert bool(sending.reason) == (after is State.FAILED)


@pytest.mark.parametrize(("stage", "event"), sorted(IMPOSSIBLE))
def test_more_pushed_than_was_to_be_pushed_is_an_error(stage: str, event: str) -> None:
    with pytest.raises(ValueError, match="only 0 blocks are under way"):
        EVENTS[event](STAGES[stage][0]())


REPEATABLE = sorted(set(EVENTS) - {"pushed", "not pushed", "commit"})


@pytest.mark.parametrize(("stage", "event"), list(product(STAGES, REPEATABLE)))
def test_an_event_that_comes_twice_does_nothing_the_second_time(stage: str, event: str) -> None:
    sending = STAGES[stage][0]()
    EVENTS[event](sending)
    state = sending.state
    assert EVENTS[event](sending) == []
    assert sending.state is state


def test_blocks_are_pushed_once_and_none_that_the_peer_has() -> None:
    sending = computing()
    assert sending.computed(1) == sending.computed(2) == []
    assert sending.computed(3) == [Push(2, 1)]
    assert sending.computed(2) == sending.computed(3) == []
    assert sending.computed(99) == [Push(3, 5)]
    assert sending.computed(99) == []


def test_a_commit_is_answered_once_the_last_push_has_ended_and_the_request_too() -> None:
    sending = arrived()
    assert sending.commit(1) == sending.commit(2) == []
    assert sending.verified() == [Answer()]
    assert sending.state is State.COMMITTED
    assert sending.commit(3) == [Answer()]


def test_a_lease_never_becomes_shorter() -> None:
    sending = computing()
    sending.renew(5, 1)
    assert sending.lease_until == LEASE_S
    sending.renew(5, LEASE_S)
    assert sending.lease_until == 5 + LEASE_S
    assert sending.tick(LEASE_S) == []
    assert sending.tick(5 + LEASE_S) == [End("the lease ran out")]


def test_without_a_deadline_only_the_lease_counts() -> None:
    sending = Sending(BLOCKS, 0, 0, LEASE_S, None)
    sending.renew(1e9, LEASE_S)
    assert sending.tick(1e9) == []


@pytest.mark.parametrize("first_block", [-1, BLOCKS, BLOCKS + 1])
def test_there_is_something_to_send(first_block: int) -> None:
    with pytest.raises(ValueError, match=f"first_block={first_block}"):
        Sending(BLOCKS, first_block, 0, LEASE_S, None)
