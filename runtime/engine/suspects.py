"""Suspects: requests in whose steps a shard group died, and that may be why.

A death says nothing of which of the requests in its steps caused it, or whether any did: as a rule somebody killed a
process. So everybody is tried again together, and after a second death each alone. Who is alone when the group dies
for the third time is *poisonous*, if a rank has met an error. If a process was killed or hangs, which may be no fault
of the request, only who is alone at the fourth death is. Whoever gets past the token at which the group died is free
of suspicion.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from headwise.runtime.engine.request import Request

ALONE_AFTER = 2
"""Deaths after which a request is computed alone."""
POISONOUS_AFTER = {True: 3, False: 4}
"""Deaths, the last of them alone, after which a request is poisonous; by whether a rank has met an error of its own."""


@dataclass(slots=True)
class _Suspicion:
    """
    Attributes:
        deaths: groups that have died in steps of the request.
        num_tokens: with more tokens than that, a request has got past the steps that were in flight at the last death.
    """

    deaths: int
    num_tokens: int


class Suspects:
    """Counts deaths. Used by the scheduler only."""

    def __init__(self) -> None:
        self._suspicions: dict[Request, _Suspicion] = {}

    def __len__(self) -> int:
        """Requests that are not free of suspicion."""
        return len(self._suspicions)

    def died(self, in_flight: Collection[Request], own_error: bool) -> Request | None:
        """A group has died with steps in flight that compute these requests, which still have their seats. Returns the
        poisonous one, if it is found.

        Args:
            own_error: whether it has died of an error that one of its ranks has met.
        """
        for request in in_flight:
            before = self._suspicions.get(request)
            deaths = before.deaths if before is not None else 0
            self._suspicions[request] = _Suspicion(deaths + 1, request.num_tokens)
        if len(in_flight) == 1:
            [request] = in_flight
            if self._suspicions[request].deaths >= POISONOUS_AFTER[own_error]:
                return request
        return None

    def forget(self, request: Request) -> None:
        """A request has ended."""
        self._suspicions.pop(request, None)

    def alone(self) -> Request | None:
        """Who is to be computed alone now; None: nobody. Whose tokens nobody takes waits, and holds nobody up."""
        if not self._suspicions:
            return None
        for request in [request for request in self._suspicions if self._is_past(request)]:
            del self._suspicions[request]
        for request, suspicion in self._suspicions.items():
            if suspicion.deaths >= ALONE_AFTER and not request.paused:
                return request
        return None

    def _is_past(self, request: Request) -> bool:
        known = len(request.prompt_token_ids) + len(request.generated)
        return known > self._suspicions[request].num_tokens
