"""From one request's sampled tokens to what its user gets: stop tokens, limits, stop strings, text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from headwise.runtime.engine.request import Request
from headwise.runtime.output import FinishReason
from headwise.workers.plan import TokenLogprobs


@dataclass(slots=True, eq=False)
class Delta:
    """What is new of a request since its last delta.

    Attributes:
        text: None where there is no tokenizer. It may lag behind the tokens, by an unfinished character or by what may
            become a stop string.
        finished: this is the request's last delta; the request holds why it ended.
    """

    request: Request
    token_ids: list[int]
    text: str | None
    logprobs: TokenLogprobs | None
    finished: bool


def take_token(request: Request, text: TextStream | None, token: int, logprobs: TokenLogprobs | None) -> Delta:
    """Appends a sampled token to its request, and says what is new; sets why the request ended if the token ends it."""
    generated, reason = request.generated, None
    generated.append(token)
    if logprobs is not None and not request.streamed:
        request.logprobs.append(logprobs)
    if len(generated) == 1:
        request.metrics.first_token = time.monotonic()
    if token in request.sampling.stop_token_ids:
        reason = _stop_token(request, token)
    if reason is None and len(generated) >= request.max_tokens:
        reason = FinishReason.LENGTH
    if text is None and reason is None:  # as of most tokens where there is no tokenizer
        return Delta(request, [token], None, logprobs, False)
    return _delta(request, text, [token], logprobs, reason)


def end(request: Request, text: TextStream | None, reason: FinishReason) -> Delta:
    """The last delta of a request that ends without another token."""
    return _delta(request, text, [], None, reason)


class Detokenizer(Protocol):
    """Turns one sequence's tokens into text as they come."""

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now and was not before."""

    def flush(self) -> str:
        """The rest of the text, once no token will follow."""


class TextStream:
    """Turns the tokens of one sample into text, piece by piece, and looks for stop strings.

    A piece holds whole characters only. Text that may turn out to be the start of a stop string is held back.
    """

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str], include_stop: bool) -> None:
        self._detokenizer, self._stop, self._include_stop = detokenizer, stop, include_stop
        self._held = ""

    def add(self, token_ids: Sequence[int], searching: bool = True) -> tuple[str, str | None]:
        """Takes new tokens; returns the new text, and the stop string that ends the output, if one is complete now.

        Args:
            searching: whether a stop string may end the output already. Text that was returned while it might not is
                not searched later.
        """
        return self._search(self._detokenizer.add(token_ids), searching)

    def flush(self, searching: bool = True) -> tuple[str, str | None]:
        """Returns the text that was held back, once no token will follow. The last bytes may still complete a stop
        string, which is then returned too."""
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


def _delta(
    request: Request,
    text: TextStream | None,
    token_ids: list[int],
    logprobs: TokenLogprobs | None,
    reason: FinishReason | None,
) -> Delta:
    """Turns tokens into text, and sets the request's finish_reason if ``reason`` or a stop string ends it."""
    piece: str | None = None
    if text is not None:
        # A stop token is one of the tokens, but no part of the text unless that is asked for.
        hidden = reason is FinishReason.STOP and not request.params.include_stop_str_in_output
        searching = len(request.generated) > request.params.min_tokens
        piece, stop = text.add([] if hidden else token_ids, searching)
        if reason is not None and stop is None:
            rest, stop = text.flush(searching)
            piece += rest
        if stop is not None and reason in (None, FinishReason.LENGTH):
            reason, request.stop_reason = FinishReason.STOP, stop
    request.finish_reason = reason
    return Delta(request, token_ids, piece, logprobs, reason is not None)


def _stop_token(request: Request, token: int) -> FinishReason | None:
    """A stop token ends the request once min_tokens are there; end-of-sequence too, unless it is ignored."""
    if len(request.generated) <= request.params.min_tokens:
        return None
    if token in (request.params.stop_token_ids or ()):
        request.stop_reason = token
    return FinishReason.STOP
