"""What a user gets back."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field


class FinishReason(enum.StrEnum):
    """Why a request ended: a stop token or string; its token limit; abort(); or it failed alone."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(slots=True)
class RequestMetrics:
    """Times in seconds on the monotonic clock, 0 is not yet; and counts.

    Attributes:
        num_cached_tokens: prompt tokens that were not computed but found in the prefix cache, on whatever tier.
        num_restored_tokens: those of them that came back from host memory or disk.
        num_handoff_tokens: those of them that a prefill engine computed for this request.
        prefilled_by: the address of that engine; None if the prompt was computed here.
        num_preemptions: how often the request had to give up its place to others for a while.
        num_recoveries: how often it went on with other shards, after those that computed it had died.
        handoff_started, handoff_ended: of the last time that another engine was asked to compute the prompt.
        replica: the name of the replica that computed it, or was the last to; empty where there is one engine.
        lost: since when it has had no shards, after those that computed it had died; 0 while it has.
        recoveries: when that began and ended, of each time that is over.
    """

    arrival: float = field(default_factory=time.monotonic)
    first_scheduled: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0
    num_preemptions: int = 0
    num_recoveries: int = 0
    num_cached_tokens: int = 0
    num_restored_tokens: int = 0
    num_handoff_tokens: int = 0
    prefilled_by: str | None = None
    handoff_started: float = 0.0
    handoff_ended: float = 0.0
    replica: str = ""
    lost: float = 0.0
    recoveries: tuple[tuple[float, float], ...] = ()

    def lose(self, now: float) -> None:
        """What computed it is dead."""
        self.num_recoveries += 1
        self.lost = self.lost or now

    def go_on(self, now: float) -> None:
        """It is computed, for the first time or again."""
        self.first_scheduled = self.first_scheduled or now
        if self.lost:
            self.recoveries += ((self.lost, now),)
            self.lost = 0.0

    @property
    def was_computed(self) -> bool:
        """Whether it had a place before, and lost it."""
        return self.num_preemptions > 0 or self.num_recoveries > 0

    @property
    def queued(self) -> float:
        """Seconds from arrival to the first step, or to the end without one."""
        return max(0.0, (self.first_scheduled or self.finished) - self.arrival)

    @property
    def total(self) -> float:
        """Seconds from arrival to the end; 0 before it."""
        return self.finished - self.arrival if self.finished else 0.0

    @property
    def time_to_first_token(self) -> float:
        """Seconds from arrival to the first token; 0 without one."""
        return self.first_token - self.arrival if self.first_token else 0.0


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural-log probability of a token, and its rank (1 is the most likely)."""

    logprob: float
    rank: int
    decoded_token: str | None


@dataclass(slots=True)
class CompletionOutput:
    """One of the ``n`` samples of a prompt.

    Attributes:
        index: which of the ``n`` samples, from 0.
        text: the generated text; None if the model has no tokenizer.
        token_ids: the generated tokens.
        logprobs: for each generated token a dict of token id to Logprob, with the chosen token and the most likely
            ones; None if not asked for.
        finish_reason: why the sample ended: ``stop`` (end-of-sequence, a stop token or a stop string), ``length``
            (max_tokens, or the model's context is full), ``abort``, or ``error``; None while it runs.
        stop_reason: the stop token id or the stop string that ended it; None if something else did.
    """

    index: int
    text: str | None
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestOutput:
    """A prompt and what was generated for it.

    Attributes:
        prompt: the text of the prompt; None if it was given as tokens or messages.
        prompt_token_ids: the tokens of the prompt.
        outputs: the ``n`` samples, in order of their index.
        num_cached_tokens: how many tokens of the prompt were found in the prefix cache, so that they were not computed.
        metrics: times and counts of the first sample.
        error: what went wrong, if a sample's finish_reason is ``error``; else None.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    num_cached_tokens: int = 0
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """An increment of a stream: what one sample has gained since the increment before.

    Attributes:
        index: which of the request's ``n`` samples it belongs to.
        text: whole characters only, so that it may be empty; None if the model has no tokenizer.
        logprobs: of the increment's token, like an entry of CompletionOutput.logprobs; None if not asked for.
        finish_reason: None except in the sample's last increment.
        error: what went wrong, if the finish_reason is ``error``; else None.
    """

    request_id: str
    index: int
    text: str | None
    token_ids: list[int]
    logprobs: dict[int, Logprob] | None
    finish_reason: FinishReason | None
    error: str | None = None
