"""The checker: compares what clients saw with what an undisturbed engine answers to the same questions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from headwise.runtime.chaos.history import Event
from headwise.runtime.chaos.workload import Way

_MOST_MISPLACED = 64
"""Tokens that are looked for as doubled or lost in one place."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One sample of a question's answer."""

    tokens: list[int]
    text: str | None
    finish: str | None


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that must not be.

    Attributes:
        rule: its kind, a word or two: ``doubled``, ``lost``, ``wrong``, ``hung``, ``error``, ``books``, ...
        request: whose; empty where it is of no request.
    """

    rule: str
    detail: str
    request: str = ""


@dataclass(slots=True)
class _Seen:
    """What a client saw of one request; deltas by question and sample."""

    asked: Event
    over: Event | None = None
    deltas: dict[tuple[int, int], list[Event]] = field(default_factory=lambda: defaultdict(list))


def check(events: Iterable[Event], answers: Sequence[Sequence[Answer]], deadline_s: float) -> list[Finding]:
    """
    Args:
        events: a whole history.
        answers: of each question, its samples, from an undisturbed run.
        deadline_s: a request that takes longer hangs.
    """
    seen: dict[str, _Seen] = {}
    for event in events:
        match event["event"]:
            case "asked":
                seen[event["request"]] = _Seen(event)
            case "delta":
                seen[event["request"]].deltas[event["question"], event["sample"]].append(event)
            case "left" | "done" | "failed":
                seen[event["request"]].over = event
    return [finding for one in seen.values() for finding in _check_request(one, answers, deadline_s)]


def _check_request(seen: _Seen, answers: Sequence[Sequence[Answer]], deadline_s: float) -> list[Finding]:
    request, over = seen.asked["request"], seen.over
    if over is None:
        return [Finding("hung", "has no end", request)]
    found = []
    if (seconds := over["at"] - seen.asked["at"]) > deadline_s:
        found.append(Finding("hung", f"took {seconds:.1f} s, more than {deadline_s:g} s", request))
    if over["event"] == "failed":
        found.append(Finding("error", over["error"], request))
    due = set()
    for position, question in enumerate(seen.asked["questions"]):
        for sample, answer in enumerate(answers[question]):
            due.add((position, sample))
            deltas = seen.deltas.get((position, sample), [])
            problem = _compare(deltas, answer, over["event"], seen.asked["way"])
            if problem is not None:
                rule, detail = problem
                found.append(Finding(rule, f"question {question}, sample {sample}: {detail}", request))
    for position, sample in sorted(seen.deltas.keys() - due):
        found.append(Finding("unasked", f"got something of sample {sample} of its question {position}", request))
    return found


def _compare(deltas: list[Event], answer: Answer, over: str, way: str) -> tuple[str, str] | None:
    """The rule that is broken, and how; None if none is."""
    tokens = [token for delta in deltas for token in delta["tokens"]]
    finish = deltas[-1]["finish"] if deltas else None
    text = "".join(delta["text"] or "" for delta in deltas)
    if any(delta["finish"] is not None for delta in deltas[:-1]):
        return "after the end", "more came after its last increment"
    if finish == "error":
        return "error", str(deltas[-1]["error"])
    # Who left, was aborted or got an error has seen a part.
    part = finish is None if over in ("left", "failed") else way == Way.ABORT and finish == "abort"
    if (problem := difference(tokens, answer.tokens, part)) is not None:
        return problem
    if answer.text is not None:
        # Where a request is aborted in the middle of a character, its text ends in the sign for a broken one.
        fits = answer.text.startswith(text.rstrip("\ufffd")) if part else text == answer.text
        if not fits:
            return "text", f"{text!r} where {answer.text!r} was due, of the same tokens"
    if not part and finish != answer.finish:
        return "finish", f"ended with {finish} where {answer.finish} was due"
    return None


def difference(got: list[Any], want: list[Any], part: bool) -> tuple[str, str] | None:
    """What is wrong with tokens, and how; None if nothing is.

    Args:
        part: a beginning of what was due is enough.
    """
    same = next((at for at, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))
    if same == len(got):
        whole = part or len(got) == len(want)
        return None if whole else ("lost", f"ended after {len(got)} of {len(want)} tokens")
    for count in range(1, _MOST_MISPLACED + 1):
        again = same >= count and got[same : same + count] == got[same - count : same]
        if again and _goes_on(got[same + count :], want[same:]):
            return "doubled", f"{count} tokens came twice, the second time as number {same}"
        if same + count <= len(want) and _goes_on(got[same:], want[same + count :]):
            return "lost", f"{count} tokens are missing at number {same}"
    due = f"where {want[same]} was due" if same < len(want) else "after the end"
    return "wrong", f"token {same} is {got[same]} {due}"


def _goes_on(got: list[Any], want: list[Any]) -> bool:
    """Whether both are the same as far as both go: by at least a token, or not at all."""
    length = min(len(got), len(want))
    return got[:length] == want[:length] and (length > 0 or not (got or want))
