"""What a server says of a question, and what becomes of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from grpc import StatusCode

from headwise.runtime import SamplingParams
from headwise.runtime.batch import answering
from headwise.runtime.batch.answering import ServerAnswerer, UnfinishedError
from headwise.runtime.batch.question import Answer, LineError, Question
from headwise.runtime.client import Completion, Sample, ServerError


class Server:
    """Says these things, one after another."""

    def __init__(self, *said: ServerError | Completion) -> None:
        self.said = list(said)

    async def generate(self, prompt: Any, params: SamplingParams) -> Completion:
        one = self.said.pop(0)
        if isinstance(one, ServerError):
            raise one
        return one


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "_AWAY_PAUSE_S", 0.0)


def done(finish_reason: str | None = "stop") -> Completion:
    return Completion("a", [Sample(0, "text", [5], [], finish_reason)], prompt_tokens=2)


def error(code: StatusCode, retry_after_s: float | None = None, field: str = "") -> ServerError:
    return ServerError(code, "said", field, retry_after_s)


def ask(*said: ServerError | Completion) -> Answer:
    answerer = ServerAnswerer(Server(*said), "m")  # type: ignore[arg-type]
    return asyncio.run(answerer.answer(Question("a", SamplingParams()), 1))


def test_an_answer() -> None:
    answer = ask(done())
    assert (answer.model, answer.samples[0].text, answer.prompt_tokens, answer.completion_tokens) == ("m", "text", 2, 1)


def test_a_server_that_is_busy_or_away_is_asked_again() -> None:
    busy, away = error(StatusCode.RESOURCE_EXHAUSTED, 0.0), error(StatusCode.UNAVAILABLE)
    assert ask(busy, away, busy, away, done()).samples[0].finish_reason == "stop"


def test_a_server_that_stays_busy_or_away_ends_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "MAX_AWAY_S", 0.0)
    monkeypatch.setattr(answering, "MAX_BUSY_S", 0.0)
    for said in (error(StatusCode.UNAVAILABLE), error(StatusCode.RESOURCE_EXHAUSTED, 0.0)):
        with pytest.raises(ServerError):
            ask(said)


@pytest.mark.parametrize(
    ("said", "code", "status"),
    [
        (error(StatusCode.INVALID_ARGUMENT, field="prompt"), "invalid_value", 400),
        (error(StatusCode.DEADLINE_EXCEEDED), "failed", 500),
        (error(StatusCode.RESOURCE_EXHAUSTED), "failed", 500),
    ],
)
def test_what_is_said_of_one_line_stops_no_other(said: ServerError, code: str, status: int) -> None:
    with pytest.raises(LineError, match="said") as refused:
        ask(said)
    assert (refused.value.code, refused.value.status, refused.value.field) == (code, status, said.field)


@pytest.mark.parametrize("code", [StatusCode.UNAUTHENTICATED, StatusCode.PERMISSION_DENIED, StatusCode.INTERNAL])
def test_what_is_said_of_all_ends_the_batch(code: StatusCode) -> None:
    with pytest.raises(ServerError):
        ask(error(code))


def test_a_request_that_was_ended_from_outside_is_no_answer() -> None:
    for reason in ("abort", None):
        with pytest.raises(UnfinishedError, match="line 1 was ended"):
            ask(done(reason))


def test_what_failed_at_the_engine_says_so() -> None:
    failed = Completion("a", [Sample(0, "", [5], [], "error", error="not finite")])
    assert ask(failed).error == "not finite"
