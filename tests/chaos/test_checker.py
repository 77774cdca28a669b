"""The checker itself: each way in which a history may be wrong is found, and one that is right is not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.runtime.chaos.checker import Answer, check, difference
from headwise.runtime.chaos.history import Event
from headwise.runtime.chaos.workload import Way
from tests.effort import examples

WANT = [11, 12, 13, 14, 15, 16]
ANSWERS = [[Answer(WANT, "abcdef", "length")], [Answer([1, 2], None, "stop"), Answer([3], None, "length")]]


def asked(way: Way = Way.STREAM, questions: tuple[int, ...] = (0,)) -> Event:
    return {"at": 0.0, "event": "asked", "request": "r", "client": 0, "way": way, "questions": list(questions)}


def deltas(tokens: list[int], finish: str | None = "length", text: str | None = "", **changes: Any) -> list[Event]:
    """A token each, with the letters that WANT has for them if there is no text."""
    made = []
    for at, token in enumerate(tokens):
        letter = None if text is None else chr(ord("a") + token - 11)
        last = at == len(tokens) - 1
        made.append({"at": 0.1 * at, "event": "delta", "request": "r", "question": 0, "sample": 0, "tokens": [token],
                     "text": letter, "finish": finish if last else None, "error": None} | changes)  # fmt: skip
    return made


def over(event: str = "done", at: float = 1.0, **more: Any) -> Event:
    return {"at": at, "event": event, "request": "r", **more}


def rules(*events: Event) -> list[str]:
    return [finding.rule for finding in check(events, ANSWERS, deadline_s=10)]


def test_nothing_is_found_where_all_is_well() -> None:
    assert rules(asked(), *deltas(WANT), over()) == []
    assert rules(asked(Way.LEAVE), *deltas(WANT[:3], None), over("left")) == []
    assert rules(asked(Way.LEAVE), over("left")) == []
    assert rules(asked(Way.ABORT), *deltas(WANT[:3], "abort"), over()) == []
    assert rules(asked(Way.ABORT), *deltas(WANT), over()) == []  # it was over before
    broken = deltas(WANT[:3], "abort")
    broken[-1]["text"] = "\ufffd"
    assert rules(asked(Way.ABORT), *broken, over()) == []
    both = [
        *deltas([1, 2], "stop", None, question=0),
        *deltas([3], "length", None, question=0, sample=1),
        *deltas(WANT, question=1),
    ]
    assert rules(asked(Way.WHOLE, (1, 0)), *both, over()) == []


@pytest.mark.parametrize(
    ("tokens", "rule"),
    [
        (WANT[:3] + WANT[2:], "doubled"),
        (WANT[:4] + WANT[2:], "doubled"),
        (WANT + WANT[-1:], "doubled"),
        (WANT[:2] + WANT[3:], "lost"),
        (WANT[1:], "lost"),
        (WANT[:-1], "lost"),
        ([*WANT[:2], 17, *WANT[3:]], "wrong"),
        ([*WANT, 17], "wrong"),
        ([], "lost"),
    ],
)
def test_a_token_that_is_doubled_lost_or_wrong_is_found(tokens: list[int], rule: str) -> None:
    assert rules(asked(), *deltas(tokens), over()) == [rule]


def test_a_part_that_is_no_beginning_is_found() -> None:
    assert rules(asked(Way.LEAVE), *deltas([11, 11, 12], None), over("left")) == ["doubled"]
    assert rules(asked(Way.ABORT), *deltas([11, 13], "abort"), over()) == ["lost"]
    assert rules(asked(), *deltas([11, 12], "abort"), over()) == ["lost"]  # nobody aborted it


def test_a_wrong_text_an_end_and_what_comes_after_it_are_found() -> None:
    assert rules(asked(), *deltas(WANT, text="abcdef")[:-1], *deltas(WANT)[-1:], over()) == []
    spoiled = deltas(WANT)
    spoiled[2]["text"] = "x"
    assert rules(asked(), *spoiled, over()) == ["text"]
    assert rules(asked(), *deltas(WANT, "stop"), over()) == ["finish"]
    assert rules(asked(), *deltas(WANT), *deltas([11]), over()) == ["after the end"]


def test_a_text_that_is_lost_is_found() -> None:
    assert rules(asked(), *deltas(WANT, text=None), over()) == ["text"]


def test_what_nobody_asked_for_is_found() -> None:
    assert rules(asked(), *deltas(WANT), *deltas(WANT, sample=1), over()) == ["unasked"]
    assert rules(asked(), *deltas(WANT), *deltas(WANT, question=1), over()) == ["unasked"]


def test_errors_and_requests_without_an_end_are_found() -> None:
    assert rules(asked(), *deltas(WANT[:2], None), over("failed", error="ShardGroupDied: rank 1")) == ["error"]
    assert rules(asked(), *deltas(WANT[:2], "error", error="the shard group died"), over()) == ["error"]
    assert rules(asked(), *deltas(WANT[:2], None)) == ["hung"]
    assert rules(asked(), *deltas(WANT), over(at=10.5)) == ["hung"]


TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=12)


@examples(300)
@given(TOKENS, st.data())
def test_every_other_list_of_tokens_is_different(want: list[int], data: st.DataObject) -> None:
    got = data.draw(TOKENS)
    assert (difference(got, want, False) is None) == (got == want)
    assert (difference(got, want, True) is None) == (got == want[: len(got)])
