"""What a server says of a question, and what becomes of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from grpc import StatusCode

from headwise.runtime import SamplingParams
from headwise.runtime.batch import answering
from headwise.runtime.batch.answering import EngineAnswerer, ServerAnswerer, UnfinishedError
from headwise.runtime.batch.question import Answer, LineError, Question
from headwise.runtime.client import Completion, Sample, ServerError
from headwise.runtime.inputs.grammars import GrammarTrialError


class Server:
    """Says these things, one after another."""

    def __init__(self, *said: ServerError | Completion) -> None:
        self.said, self.seeds = list(said), list[int | None]()
        self.before = lambda: None

    async def generate(self, prompt: Any, params: SamplingParams) -> Completion:
        self.before()
        self.seeds.append(params.seed)
        one = self.said.pop(0)
        if isinstance(one, ServerError):
            raise one
        return one

    async def detokenize(self, token_ids: Any, skip_special_tokens: bool) -> str:
        one = self.said.pop(0)
        if isinstance(one, ServerError):
            raise one
        return one.request_id


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


def test_a_server_that_is_away_again_after_a_long_answer_has_its_time_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was there in between: what it was asked for took longer than it may be away."""
    clock = 0.0
    monkeypatch.setattr(answering.time, "monotonic", lambda: clock)
    away, server = error(StatusCode.UNAVAILABLE), Server()
    server.said = [away, away, done()]

    def take_long() -> None:
        nonlocal clock
        clock += 100.0 if len(server.said) == 2 else 1.0

    server.before = take_long
    answerer = ServerAnswerer(server, "m")  # type: ignore[arg-type]
    assert asyncio.run(answerer._asked(lambda: server.generate("a", SamplingParams()))).prompt_tokens == 2


def test_another_question_that_takes_long_does_not_count_as_being_away(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr(answering.time, "monotonic", lambda: clock)
    server = Server()
    answerer = ServerAnswerer(server, "m")  # type: ignore[arg-type]

    async def ask_both() -> list[Completion]:
        """The first is away, is asked again, and computed for long; meanwhile the second loses its connection once."""
        nonlocal clock
        computed, failed = asyncio.Event(), [False, False]

        async def generate(number: int) -> Completion:
            nonlocal clock
            if number == 0 and failed[0]:
                await computed.wait()
            elif not failed[number]:
                failed[number] = True
                clock += 100.0 * number
                raise error(StatusCode.UNAVAILABLE)
            computed.set()
            return done()

        first = asyncio.create_task(answerer._asked(lambda: generate(0)))
        await asyncio.sleep(0)
        return [await answerer._asked(lambda: generate(1)), await first]

    assert len(asyncio.run(ask_both())) == 2


def test_a_question_may_be_refused_for_as_long_as_others_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with many samples finds less room in the queue than the others."""
    clock = 1.0
    monkeypatch.setattr(answering.time, "monotonic", lambda: clock)
    answerer = ServerAnswerer(Server(), "m")  # type: ignore[arg-type]
    refused = 0

    async def large() -> Completion:
        nonlocal clock, refused
        clock += answering.MAX_BUSY_S - 1
        refused += 1
        if refused == 1 or refused > 6:
            raise error(StatusCode.RESOURCE_EXHAUSTED, 0.0)
        await answerer._asked(small)
        raise error(StatusCode.RESOURCE_EXHAUSTED, 0.0)

    async def small() -> Completion:
        return done()

    with pytest.raises(ServerError):
        asyncio.run(answerer._asked(large))
    assert refused == 8


def test_a_grammar_that_cannot_be_tried_stops_no_other_line() -> None:
    class Model:
        inputs = None

        async def off_loop(self, work: Any, lane: str) -> Any:
            raise GrammarTrialError("the process that tries grammars has ended")

    answerer = EngineAnswerer(Model(), "m")  # type: ignore[arg-type]
    with pytest.raises(LineError, match="has ended") as refused:
        asyncio.run(answerer.answer(Question("a", SamplingParams()), 1))
    assert (refused.value.code, refused.value.status, refused.value.field) == ("failed", 500, "structured_outputs")


def test_a_line_has_the_same_seed_whenever_it_is_asked() -> None:
    """Or a batch that goes on would sample other tokens than one that was not disturbed."""
    server = Server(done(), done(), done())
    answerer = ServerAnswerer(server, "m")  # type: ignore[arg-type]
    for number, seed in ((7, None), (8, 5), (7, None)):
        asyncio.run(answerer.answer(Question("a", SamplingParams(seed=seed)), number))
    assert server.seeds == [7, 5, 7]


def test_the_text_of_a_token_is_asked_for_again_too() -> None:
    server = Server(done(), error(StatusCode.UNAVAILABLE), error(StatusCode.RESOURCE_EXHAUSTED, 0.0), done())
    answerer = ServerAnswerer(server, "m")  # type: ignore[arg-type]
    question = Question("a", SamplingParams(logprobs=0), url="/v1/completions")
    assert asyncio.run(answerer.answer(question, 1)).token_texts == {5: "a"}


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
