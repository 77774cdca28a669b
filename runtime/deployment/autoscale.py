"""Autoscaler: how many replicas there are to be, from how long requests wait and how full the KV memory is.

No I/O, no clock. One replica more, when requests have waited for too long or memory was too full at UP_LOOKS looks in a
row. One less, when for DOWN_S all that runs would have fitted the others with room to spare.

It is remembered for how much *demand* (tokens a second that come and go) so many replicas were too few. They are tried
again only once the demand is clearly less. So the number settles where the load does.
"""

from __future__ import annotations

from dataclasses import dataclass

UP_WAIT_S = 2.0
"""Waiting for a first token that is too long, without the time that the prompt itself takes."""
UP_KV_USE = 0.9
"""Of the KV memory that is too much."""
UP_LOOKS = 5
DOWN_S = 60.0
DOWN_WAIT_S = UP_WAIT_S / 4
DOWN_USE = 0.6
"""Most of the rows, and of the KV memory, of the replicas that would be left."""
LESS_DEMAND = 0.8
"""Of the demand that was too much for so many replicas: what they may be tried with again."""


@dataclass(frozen=True, slots=True)
class Look:
    """
    Attributes:
        now: seconds of a clock that only goes forward.
        wanted, serving: replicas.
        wait_s: how long the request waits that waits for longest, but for the time that its own prompt takes.
        kv_use: the part of the KV memory of all replicas that requests hold.
        requests: that run or wait.
        rows: requests that a replica computes at a time.
        demand: tokens of prompts and outputs a second, over the last half minute or so.
    """

    now: float
    wanted: int
    serving: int
    wait_s: float
    kv_use: float
    requests: int
    rows: int
    demand: float


class Autoscaler:
    """Between ``least`` and ``most`` replicas."""

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = least, most
        self._pressed = 0  # looks in a row at which there were too few
        self._easy_since: float | None = None  # since when one less would do
        self._too_much: dict[int, float] = {}  # the demand that so many replicas were too few for

    def wanted(self, look: Look) -> int:
        """How many there are to be from now on. Call it about once a second."""
        wanted = min(max(look.wanted, self._least), self._most)
        if wanted != look.wanted:
            return self._changed(wanted)
        pressed = look.wait_s > UP_WAIT_S or look.kv_use > UP_KV_USE
        # While what was asked for is not there, nobody knows whether it is enough.
        self._pressed = self._pressed + 1 if pressed and look.serving >= wanted else 0
        if self._pressed >= UP_LOOKS and wanted < self._most:
            if look.demand > 0:  # else nothing came through, and nothing is known
                self._too_much[wanted] = look.demand
            return self._changed(wanted + 1)
        if wanted == self._least or not self._is_easy(look):
            self._easy_since = None
            return wanted
        if self._easy_since is None:
            self._easy_since = look.now
        return self._changed(wanted - 1) if look.now - self._easy_since >= DOWN_S else wanted

    def _changed(self, wanted: int) -> int:
        self._pressed, self._easy_since = 0, None
        return wanted

    def _is_easy(self, look: Look) -> bool:
        """Whether one less would do; or those that serve, where that are even less."""
        if not look.serving:
            return False
        left = min(look.wanted - 1, look.serving)
        fits = look.requests <= DOWN_USE * left * look.rows and look.kv_use * look.serving <= DOWN_USE * left
        too_much = self._too_much.get(left)
        return fits and look.wait_s <= DOWN_WAIT_S and (too_much is None or look.demand < LESS_DEMAND * too_much)
