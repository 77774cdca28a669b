"""Blame: requests that replicas died of, as far as is known. (suspects.py does this for the shards of one engine.)

When a replica dies, each of its requests may be why; as a rule none is, and somebody killed a process. All go on at
once. A request that has seen two deaths goes on alone: no other that has seen two is beside it. When a third replica
dies, the one of its requests that had seen two is *poisonous*. A request is free of blame once it has got past the
tokens at which the replica died.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from headwise.runtime.engine.request import Request

ALONE_AFTER = 2
"""Deaths after which a request goes on alone."""
PAST_TOKENS = 8
"""With so many more tokens than at the death a request is past it: the replica may have had some that were not told."""


@dataclass(slots=True)
class _Blame:
    deaths: int
    num_tokens: int


class Blame:
    """Counts deaths."""

    def __init__(self) -> None:
        self._blames: dict[Request, _Blame] = {}

    def __len__(self) -> int:
        """Requests that are not free of blame."""
        return len(self._blames)

    def died(self, requests: Collection[Request]) -> Request | None:
        """A replica that had these requests has died. Returns the poisonous one, if it is found."""
        before = {request: blame for request in requests if (blame := self._blames.get(request)) is not None}
        alone = [request for request, blame in before.items() if blame.deaths >= ALONE_AFTER]
        for request in requests:
            deaths = before[request].deaths if request in before else 0
            self._blames[request] = _Blame(deaths + 1, len(request.generated))
        return alone[0] if len(alone) == 1 else None

    def got_token(self, request: Request) -> None:
        """A request has another token."""
        blame = self._blames.get(request) if self._blames else None
        if blame is not None and len(request.generated) >= blame.num_tokens + PAST_TOKENS:
            del self._blames[request]

    def forget(self, request: Request) -> None:
        """A request has ended."""
        self._blames.pop(request, None)

    def is_alone(self, request: Request) -> bool:
        """Whether none like it may be computed beside it."""
        blame = self._blames.get(request)
        return blame is not None and blame.deaths >= ALONE_AFTER
