"""What a user gets back, and the text side of a request: detokenizing and stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from headwise.runtime.engine.request import FinishReason, RequestMetrics
from headwise.runtime.inputs.tokenizer import IncrementalDetokenizer


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural-log probability of a token, and its rank (1 is the most likely)."""

    logprob: float
    rank: int
    decoded_token: str | None


@dataclass(slots=True)
class CompletionOutput:
    """One of a prompt's ``n`` samples.

    Attributes:
        text: None where the model has no tokenizer.
        logprobs: for each token, the chosen and the most likely tokens by id; None when not asked for.
        finish_reason: ``stop``, ``length``, ``abort`` or ``error``; None while it runs.
        stop_reason: the stop token id or stop string that ended it; None for end-of-sequence.
    """

    index: int
    text: str | None
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its samples, in order of their index.

    Attributes:
        num_cached_tokens: prompt tokens whose KV was not computed but found in the prefix cache.
        metrics: of the first sample.
        error: why, where a finish_reason is ``error``.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    num_cached_tokens: int = 0
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    error: str | None = None


class TextStream:
    """Turns one sample's tokens into text, piece by piece, and finds its stop strings.

    A piece never splits a character, and never holds what may still turn out to be the start of a stop string.
    """

    def __init__(self, detokenizer: IncrementalDetokenizer, stop: Sequence[str], include_stop: bool) -> None:
        self._detokenizer, self._stop, self._include_stop = detokenizer, stop, include_stop
        self._held = ""

    def add(self, token_ids: Sequence[int], searching: bool = True) -> tuple[str, str | None]:
        """Returns the new text and the stop string that ends it, if one is complete now.

        ``searching``: whether a stop string may end it yet; text let through before is not searched again.
        """
        return self._search(self._detokenizer.add(token_ids), searching)

    def flush(self, searching: bool = True) -> tuple[str, str | None]:
        """The rest, once no token will follow; what was held back may still complete a stop string."""
        piece, stop = self._search(self._detokenizer.flush(), searching)
        if stop is None:
            piece, self._held = piece + self._held, ""
        return piece, stop

    def _search(self, new: str, searching: bool) -> tuple[str, str | None]:
        if not self._stop:
            return new, None
        text = self._held + new
        if not searching:
            return text, None
        found = min(((text.find(stop), -len(stop), stop) for stop in self._stop if stop in text), default=None)
        if found is not None:
            at, _, stop = found
            self._held = ""
            return text[: at + len(stop) if self._include_stop else at], stop
        keep = _partial_stop(text, self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None


def _partial_stop(text: str, stops: Sequence[str]) -> int:
    """The length of the longest end of ``text`` that is the start of a stop string."""
    longest = max(map(len, stops), default=0) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
