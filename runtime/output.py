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
    """

    arrival: float = field(default_factory=time.monotonic)
    first_scheduled: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    num_restored_tokens: int = 0

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
