"""A line of a batch, understood: what is asked, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from headwise.runtime.sampling_params import SamplingParams
from headwise.workers.errors import HeadwiseError

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or a conversation."""


@dataclass(frozen=True, slots=True)
class Question:
    """What a line asks.

    Attributes:
        custom_id: the line's own name; None if it has none.
        url: of a line of an OpenAI batch file, the path that it asks; empty for a line of our own form.
        model: the model that the line names; empty if it names none.
        top_logprobs: of a chat in OpenAI's form that asks for log-probabilities, how many of the most likely tokens it
            wants.
    """

    prompt: Prompt
    params: SamplingParams
    custom_id: str | None = None
    url: str = ""
    model: str = ""
    top_logprobs: int = 0


@dataclass(slots=True)
class Sample:
    """One of a question's ``n`` outputs; the fields are those of the client's
    :class:`~headwise.runtime.client.Sample`."""

    index: int
    text: str | None
    token_ids: list[int]
    logprobs: list[tuple[float, int, list[tuple[int, float]]]]
    finish_reason: str
    stop_reason: str | int | None = None
    error: str = ""


@dataclass(slots=True)
class Answer:
    """What came of a question.

    Attributes:
        model: the name of the model that gave it.
        cached_tokens: tokens of the prompt that were found in the prefix cache.
        token_texts: the text of each token that ``logprobs`` name, where the question is a chat or completion of
            OpenAI's that asks for log-probabilities.
    """

    model: str
    samples: list[Sample]
    prompt_tokens: int
    cached_tokens: int = 0
    token_texts: dict[int, str] = field(default_factory=dict)

    @property
    def completion_tokens(self) -> int:
        return sum(len(sample.token_ids) for sample in self.samples)

    @property
    def error(self) -> str:
        """What went wrong, if a sample failed."""
        return next((one.error or "the request failed" for one in self.samples if one.finish_reason == "error"), "")


class LineError(HeadwiseError):
    """A line cannot be answered; the others can.

    Attributes:
        code: ``invalid_line`` (no JSON object), ``invalid_value`` (a field is wrong) or ``failed`` (it was tried).
        field: which field is wrong; empty if none is.
        status: the HTTP status of it in OpenAI's form.
    """

    def __init__(self, code: str, message: str, field: str = "", status: int = 400) -> None:
        self.code, self.field, self.status = code, field, status
        super().__init__(message)
