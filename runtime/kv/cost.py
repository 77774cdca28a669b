"""Whether restoring blocks from a tier is faster than computing them again, from what both took lately."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from headwise.workers.kv.transfer import Tier

_WEIGHT = 0.3
"""Of a new reading in the running means: the last few count."""

_DOUBT = 0.98
"""Each time restoring is declined its costs are believed a little less, so that it is tried again now and then."""


class RestoreCost:
    """Running means of measured times. What was never measured counts as nothing, and so gets measured."""

    def __init__(self) -> None:
        self._token_s: float | None = None
        self._block_s: dict[Tier, float] = {}
        self._latency_s: float | None = None

    def saw_prefill(self, tokens: int, seconds: float) -> None:
        """A step computed so many tokens."""
        self._token_s = running_mean(self._token_s, seconds / tokens)

    def saw_restore(self, tier: Tier, blocks: int, seconds: float, latency_s: float) -> None:
        """A tier's blocks were copied in ``seconds``; from asking to knowing it took ``latency_s`` more."""
        self._block_s[tier] = running_mean(self._block_s.get(tier), seconds / blocks)
        self._latency_s = running_mean(self._latency_s, latency_s)

    def worth(self, blocks: Mapping[Tier, int], tokens: int) -> bool:
        """Whether to restore so many blocks of each tier rather than to compute their ``tokens``."""
        if self._token_s is None:
            return True
        restore_s = (self._latency_s or 0.0) + sum(
            count * self._block_s.get(tier, 0.0) for tier, count in blocks.items()
        )
        return restore_s < tokens * self._token_s

    def declined(self, tiers: Iterable[Tier]) -> None:
        """Blocks of these tiers were computed, since restoring them was not worth it."""
        for tier in set(tiers) & self._block_s.keys():
            self._block_s[tier] *= _DOUBT
        if self._latency_s is not None:
            self._latency_s *= _DOUBT

    def stats(self) -> dict[str, float]:
        """The means in seconds, as far as they are known."""
        found = {f"{tier.value}_block": seconds for tier, seconds in self._block_s.items()}
        if self._token_s is not None:
            found["computed_token"] = self._token_s
        if self._latency_s is not None:
            found["restore_latency"] = self._latency_s
        return found


def running_mean(old: float | None, new: float) -> float:
    """The mean once a new value has come: that of the last few."""
    return new if old is None else old + _WEIGHT * (new - old)
