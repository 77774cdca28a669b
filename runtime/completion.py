"""What a client gets of a server: a completion, increment by increment."""

from __future__ import annotations

from dataclasses import dataclass, field

from headwise.v1 import inference_pb2 as pb

_FINISH = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_ABORT: "abort",
    pb.FINISH_REASON_ERROR: "error",
}


@dataclass(frozen=True, slots=True)
class Increment:
    """What one sample of a stream has gained since the increment before.

    Attributes:
        index: which of the request's ``n`` samples, from 0.
        text: whole characters only, so that it may be empty; None if the model has no tokenizer.
        logprobs: an entry for each token, if asked for: its log-probability, its rank (1 is the most likely), and
            (token id, log-probability) of the most likely tokens.
    """

    index: int
    text: str | None
    token_ids: list[int]
    logprobs: list[tuple[float, int, list[tuple[int, float]]]]


@dataclass(slots=True)
class Sample:
    """One of a request's ``n`` outputs.

    Attributes:
        index: which of the ``n``, from 0.
        text: None if the model has no tokenizer.
        logprobs: as in :class:`Increment`, for all tokens.
        finish_reason: ``stop``, ``length``, ``abort`` or ``error``; None while it runs.
        stop_reason: the stop string or the stop token id that ended it; None if something else did.
        error: what went wrong, if the finish_reason is ``error``; else empty.
    """

    index: int
    text: str | None = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[float, int, list[tuple[int, float]]]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str = ""


@dataclass(slots=True)
class Completion:
    """The result of a request: its samples in order, counts of tokens, and times.

    Attributes:
        cached_tokens: tokens of the prompt that were found in the prefix cache.
        completion_tokens: generated tokens of all samples.
        queued_s, time_to_first_token_s, total_s: seconds from the request's arrival at the server until it was first
            scheduled, until its first token, and until its end.
        prefilled_by: the address of the prefill engine that computed the prompt; None if the server did itself.
        handoff_tokens: tokens of the prompt that engine handed over; ``cached_tokens`` counts them, too.
    """

    request_id: str
    samples: list[Sample]
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    queued_s: float = 0.0
    time_to_first_token_s: float = 0.0
    total_s: float = 0.0
    prefilled_by: str | None = None
    handoff_tokens: int = 0

    @property
    def text(self) -> str:
        """The text of the first sample; empty if the model has no tokenizer."""
        return self.samples[0].text or ""


def take(completion: Completion, response: pb.GenerateResponse) -> Increment | Completion:
    """Adds a response of the server to the completion; returns what the caller gets of it."""
    if response.WhichOneof("response") == "increment":
        new = response.increment
        logprobs = [(one.logprob, one.rank, [(top.token_id, top.logprob) for top in one.top]) for one in new.logprobs]
        text = new.text if new.HasField("text") else None
        sample = completion.samples[new.index]
        sample.text = None if text is None or sample.text is None else sample.text + text
        sample.token_ids += new.token_ids
        sample.logprobs += logprobs
        return Increment(new.index, text, list(new.token_ids), logprobs)
    result = response.result
    completion.prompt_tokens = result.usage.prompt_tokens
    completion.completion_tokens = result.usage.completion_tokens
    completion.cached_tokens = result.usage.cached_tokens
    completion.queued_s = result.timings.queued
    completion.time_to_first_token_s = result.timings.time_to_first_token
    completion.total_s = result.timings.total
    completion.prefilled_by = result.prefilled_by if result.HasField("prefilled_by") else None
    completion.handoff_tokens = result.handoff_tokens
    for ended in result.samples:
        sample = completion.samples[ended.index]
        sample.finish_reason, sample.error = _FINISH.get(ended.finish_reason), ended.error
        kind = ended.WhichOneof("stop_reason")
        sample.stop_reason = getattr(ended, kind) if kind else None
    return completion
