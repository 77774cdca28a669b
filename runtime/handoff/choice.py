"""Which engine should compute a prompt, this one or another, from what they promise and what handoffs took lately."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from headwise.runtime.kv.cost import running_mean

PATIENCE = 4.0
"""How much longer than here a prompt may take elsewhere where it would hold up streams here."""

FAILURE_S = 1.0
"""What a failed handoff costs beside the time it took, so that a peer that refuses at once is not asked for ever."""

MAX_FAILURES_S = 60.0
"""The most that failures add up to, so that a peer that is sound again is tried again."""

MEASURED_TOKENS = 64
"""A step here with fewer tokens of prompts, such as what is left of those that were handed over, says little of what a
token of a long one takes."""

_DOUBT = 0.98
"""With each prompt that a peer does not get, its overhead is believed a little less, so that it is tried again now and
then."""

_OWN_DOUBT = 0.995
"""The same of what computing takes here; less, since a prompt that is computed here may hold up streams."""


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine that computes prompts for others, as it is known here.

    Attributes:
        address: tells peers apart.
        queued_tokens: tokens of prompts that wait there.
        token_s: seconds it takes for a token; 0 if not known.
        digests: of the blocks it is known to hold.
    """

    address: str
    queued_tokens: int
    token_s: float
    digests: Collection[bytes] = field(default=frozenset(), repr=False)

    def held(self, digests: Sequence[bytes]) -> int:
        """How many leading blocks of a prompt it holds."""
        for count, digest in enumerate(digests):
            if digest not in self.digests:
                return count
        return len(digests)


@dataclass(frozen=True, slots=True)
class Prompt:
    """
    Attributes:
        num_tokens: all of it.
        cached_tokens: of those, the leading ones whose blocks are here already.
        digests: of its full blocks, in order.
        block_size: tokens of a block.
    """

    num_tokens: int
    cached_tokens: int
    digests: Sequence[bytes] = field(repr=False)
    block_size: int

    @property
    def uncached_tokens(self) -> int:
        return self.num_tokens - self.cached_tokens

    @property
    def travels(self) -> bool:
        """Whether a full block is missing here: nothing else is handed over."""
        return len(self.digests) * self.block_size > self.cached_tokens


class HandoffCost:
    """Running means of measured times. What was never measured of a peer counts as nothing, and so gets measured."""

    def __init__(self, min_tokens: int | None, mixed_tokens: int) -> None:
        """
        Args:
            min_tokens: a prompt is handed over if so many tokens of it are not cached here, whatever that costs;
                None has the costs decide.
            mixed_tokens: ``max_mixed_prefill_tokens``. Where costs decide, fewer uncached tokens stay here: they fit
                into a step that streams have anyway.
        """
        self._min_tokens, self._mixed_tokens = min_tokens, mixed_tokens
        self._token_s: float | None = None
        self._own_doubt = 1.0
        self._overhead_s: dict[str, float] = {}

    def saw_prefill(self, tokens: int, seconds: float) -> None:
        """A step here computed so many tokens of prompts."""
        if self._token_s is not None and tokens < MEASURED_TOKENS:
            return
        self._token_s, self._own_doubt = running_mean(self._token_s, seconds / tokens), 1.0

    def saw_handoff(self, prompt: Prompt, peer: Peer, seconds: float) -> None:
        """A prompt that was handed to ``peer``, as it was then, was readable here after so many seconds."""
        overhead_s = max(0.0, seconds - self._computing_s(prompt, peer))
        self._overhead_s[peer.address] = running_mean(self._overhead_s.get(peer.address), overhead_s)

    def saw_failure(self, prompt: Prompt, peer: Peer, seconds: float) -> None:
        """A prompt that was handed to ``peer`` is computed here after all, after so many seconds. Adds up until one
        comes through, and counts as longer than here whatever it would have held up here."""
        lost_s = seconds + PATIENCE * self.local_s(prompt, 0) + FAILURE_S
        overhead_s = self._overhead_s.get(peer.address, 0.0)
        self._overhead_s[peer.address] = max(overhead_s, min(overhead_s + lost_s, MAX_FAILURES_S))

    def is_handed_over(self, prompt: Prompt) -> bool:
        """Whether a prompt is long enough, and blocks of it are missing here."""
        return prompt.travels and prompt.uncached_tokens >= self._least_tokens

    def choose(self, prompt: Prompt, peers: Sequence[Peer], queued_tokens: int, streams: bool) -> Peer | None:
        """The peer that is to compute a prompt; None computes it here.

        Args:
            peers: those that can be reached.
            queued_tokens: tokens of prompts that wait here.
            streams: whether requests run here whose tokens are read as they come.
        """
        if not self.is_handed_over(prompt):
            return None
        chosen = min(peers, key=lambda peer: self.remote_s(prompt, peer), default=None)
        # Who has a prefill engine means it to be used: until computing was measured here, it is.
        if chosen is not None and self._min_tokens is None and self._token_s is not None:
            patience = PATIENCE if streams else 1.0
            if self.remote_s(prompt, chosen) >= patience * self.local_s(prompt, queued_tokens):
                chosen = None
        return chosen

    def pass_over(self, peers: Sequence[Peer], chosen: Peer | None) -> None:
        """A choice of :meth:`choose` is acted upon, once for each prompt. Whoever was not chosen, this engine too, is
        believed to be a little faster than what was measured."""
        if chosen is not None and self._min_tokens is None:
            self._own_doubt *= _OWN_DOUBT
        for peer in peers:
            if peer is not chosen and peer.address in self._overhead_s:
                self._overhead_s[peer.address] *= _DOUBT

    def local_s(self, prompt: Prompt, queued_tokens: int) -> float:
        """Seconds until a prompt would be computed here."""
        return (queued_tokens + prompt.uncached_tokens) * (self._token_s or 0.0) * self._own_doubt

    def remote_s(self, prompt: Prompt, peer: Peer) -> float:
        """Seconds until a prompt would be readable here that ``peer`` computes."""
        return self._computing_s(prompt, peer) + self._overhead_s.get(peer.address, 0.0)

    def stats(self) -> dict[str, float]:
        """The means in seconds, as far as they are known; the overhead by peer."""
        found = {f"overhead {address}": seconds for address, seconds in self._overhead_s.items()}
        if self._token_s is not None:
            found["computed_token"] = self._token_s
        return found

    @property
    def _least_tokens(self) -> int:
        return self._mixed_tokens if self._min_tokens is None else self._min_tokens

    def _computing_s(self, prompt: Prompt, peer: Peer) -> float:
        """Of the full blocks that the peer has not got, and at least of one token: its logits tell what is sound."""
        own = max(1, (len(prompt.digests) - peer.held(prompt.digests)) * prompt.block_size)
        return (peer.queued_tokens + own) * peer.token_s
