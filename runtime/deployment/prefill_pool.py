"""PrefillPool: the replicas of a deployment that compute prompts for the others. No request goes to them by the front:
decode replicas are told of them, and ask them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from headwise.runtime.deployment.fleet import Fleet, Member
from headwise.runtime.deployment.instructions import Instruction, Send
from headwise.runtime.deployment.messages import Peers, Report


class PrefillPool:
    """Attributes: ``fleet``: which of them there are."""

    def __init__(self, out: list[Instruction], drain_timeout_s: float, names: Iterator[int]) -> None:
        """Args: ``out``, ``names``: as of :class:`~headwise.runtime.deployment.fleet.Fleet`."""
        self._out = out
        self._told: dict[str, Peers] = {}  # by decode replica
        self.fleet = Fleet(self, out, drain_timeout_s, "prefill", names)

    def report(self, name: str, report: Report, now: float) -> None:
        """One of them says how it is."""
        member = self.fleet.report(name, report, now)
        if member is not None and member.stats is not None and member.stats["num_steps"]:
            member.proven = True

    def tell(self, decode: list[Member]) -> None:
        """Has decode replicas told which of these they can ask, where that has changed. Call it after each event."""
        serving = [m for m in self.fleet.members.values() if m.state in ("serving", "rebuilding")]
        now = Peers(tuple((member.name, member.about["handoff_address"]) for member in serving))
        before, self._told = self._told, {}
        for member in decode:
            if member.about and member.state != "ended":
                self._told[member.name] = now
                if before.get(member.name) != now:
                    self._out.append(Send(member.name, now))

    # What a fleet asks of who sends requests to its replicas.

    def joined(self, name: str, most_tokens: int) -> None:
        pass

    def draining(self, name: str) -> None:
        pass

    def rebuilding(self, name: str) -> None:
        pass

    def left(self, name: str, died: bool) -> None:
        pass

    def num_requests(self, name: str) -> int:
        """The prompts that one of them computes or sends; it is not known before it has reported since it drains."""
        member = self.fleet.members.get(name)
        if member is None or member.report is None:
            return 0
        if member.state == "draining" and member.heard <= member.since:
            return 1
        handoff: dict[str, Any] = member.stats["handoff"] if member.stats is not None else {}
        return member.report.running + member.report.waiting + int(handoff.get("in_flight", 0))
