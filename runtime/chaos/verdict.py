"""The verdict: what was done to an engine, how long its streams paused, and what was found."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from headwise.runtime.bench import report
from headwise.runtime.chaos.checker import Finding
from headwise.runtime.chaos.history import Event

PERCENTILES = (50, 90, 99)
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Verdict:
    """
    Attributes:
        seconds: for which faults came.
        faults: how many of each kind happened.
        kills: processes that were killed.
        requests, tokens: that clients asked for, and got.
        recoveries: groups that took the place of one that died.
        pauses: from a fault to a stream's next token, for each stream and each recovery, in seconds, in order.
        findings: what must not be; none, if all is well.
    """

    seed: int
    seconds: float
    faults: dict[str, int]
    kills: int
    requests: int
    tokens: int
    recoveries: int
    pauses: list[float]
    findings: list[Finding] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "requests": self.requests,
            "tokens": self.tokens,
            "faults": self.faults,
            "kills": self.kills,
            "recoveries": self.recoveries,
            "streams_paused": len(self.pauses),
            **{f"pause_p{p}_s": _rounded(percentile(self.pauses, p)) for p in PERCENTILES},
            "findings": [{"rule": one.rule, "request": one.request, "detail": one.detail} for one in self.findings],
        }


def judge(
    seed: int, seconds: float, events: Sequence[Event], recoveries: int, findings: list[Finding]
) -> Verdict:  # fmt: skip
    """Args: ``seconds``: for which faults came."""
    events = sorted(events, key=lambda event: event["at"])
    struck = [event for event in events if event["event"] in ("fault", "fired")]
    return Verdict(
        seed,
        seconds,
        dict(sorted(Counter(event["fault"] for event in struck).items())),
        sum(event["kills"] for event in struck),
        sum(event["event"] == "asked" for event in events),
        sum(len(event["tokens"]) for event in events if event["event"] == "delta"),
        recoveries,
        sorted(pauses(events)),
        findings,
    )


def pauses(events: Sequence[Event]) -> list[float]:
    """For each recovery, and each stream that had a token before: seconds from the fault to its next token.

    Args:
        events: in order of time.
    """
    increments: dict[tuple[str, int], list[float]] = defaultdict(list)
    for event in events:
        if event["event"] == "delta" and event["tokens"]:
            increments[event["request"], event["sample"]].append(event["at"])
    found, down, fault = [], None, 0.0
    for event in events:
        match event["event"]:
            case "fault" | "fired" if down is None:
                fault = event["at"]
            case "down":
                down = event["at"]
            case "up" if down is not None:
                # A token that was on its way when the group died is seen soon after that, one of the next group not
                # before that one is up.
                between = (down + event["at"]) / 2
                for times in increments.values():
                    following = next((at for at in times if at > between), None)
                    if times[0] < fault and following is not None:
                        found.append(following - fault)
                down = None
    return found


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The least of the values that so many percent are not above (nearest rank); None of no values."""
    return values[max(0, math.ceil(percent / 100 * len(values)) - 1)] if values else None


def show(verdict: Verdict) -> None:
    """Prints it on stdout, for people."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    faults = [(name, str(count)) for name, count in verdict.faults.items()]
    console.print(report.table("Faults", ("fault", "times"), faults or [("none", "0")]))
    said = ", ".join(f"p{p} {_seconds(percentile(verdict.pauses, p))}" for p in PERCENTILES)
    console.print(
        f"{verdict.requests} requests got {verdict.tokens} tokens in {verdict.seconds:.0f} s of faults; "
        f"{verdict.kills} processes were killed, and {verdict.recoveries} groups took the place of others"
    )
    console.print(f"from a fault to a stream's next token, of {len(verdict.pauses)} streams: {said}")
    for finding in verdict.findings[:_SHOWN]:
        request = f" request {finding.request}:" if finding.request else ""
        console.print(f"FOUND {finding.rule}:{request} {finding.detail}", markup=False)
    if len(verdict.findings) > _SHOWN:
        console.print(f"and {len(verdict.findings) - _SHOWN} more")
    console.print(f"seed {verdict.seed}: {len(verdict.findings) or 'nothing'} found")


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
