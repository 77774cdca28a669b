"""Who answers a batch's questions: an engine of this process, or a server."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from grpc import StatusCode

from headwise.runtime.aio import AsyncLLM
from headwise.runtime.async_model import Lane
from headwise.runtime.batch.question import Answer, LineError, Question, Sample
from headwise.runtime.client import AsyncClient, ServerError
from headwise.runtime.engine.request import Request
from headwise.runtime.inputs.grammars import GrammarTrialError
from headwise.workers.errors import HeadwiseError, InvalidValueError

T = TypeVar("T")

MAX_BUSY_S = 600.0
"""How long a server that answers nothing else may refuse a question because others wait."""
MAX_AWAY_S = 60.0
"""How long a server that has answered before may be out of reach: it may be started again."""
_AWAY_PAUSE_S = 1.0
_REACHED_S = 30.0
"""A call that fails after this long had reached a server: a connection that cannot be made fails after 20."""
_OF_THE_LINE = (StatusCode.INVALID_ARGUMENT, StatusCode.OUT_OF_RANGE, StatusCode.DEADLINE_EXCEEDED)
"""What a server says of one question; anything else is said of all."""
_MAX_TEXTS = 1 << 16


class UnfinishedError(HeadwiseError):
    """A question was ended from outside before it had its answer."""


class Answerer(ABC):
    """Answers many questions at the same time.

    Attributes:
        model: the name of the model.
    """

    model: str

    def __init__(self) -> None:
        self._texts: dict[int, str] = {}

    async def answer(self, question: Question, number: int) -> Answer:
        """
        Args:
            number: of the question in its batch. Where it brings no seed, its seed depends on this.

        Raises:
            LineError: this question cannot be answered.
            HeadwiseError: nothing more can be answered.
        """
        answer = await self._answer(question, number)
        if any(sample.finish_reason == "abort" for sample in answer.samples):
            raise UnfinishedError(f"line {number} was ended before it was done")
        if question.url and question.params.logprobs is not None:
            tokens = {token for sample in answer.samples for token in sample.token_ids}
            tokens |= {token for one in answer.samples for _, _, top in one.logprobs for token, _ in top}
            answer.token_texts = {token: await self._text(token) for token in tokens}
        return answer

    async def _text(self, token: int) -> str:
        if token not in self._texts:
            if len(self._texts) >= _MAX_TEXTS:
                self._texts.clear()
            self._texts[token] = await self._decode(token)
        return self._texts[token]

    @abstractmethod
    async def _answer(self, question: Question, number: int) -> Answer: ...

    @abstractmethod
    async def _decode(self, token: int) -> str: ...


class EngineAnswerer(Answerer):
    """Asks an engine of this process."""

    def __init__(self, llm: AsyncLLM, model: str) -> None:
        super().__init__()
        self._llm, self.model = llm, model

    async def _answer(self, question: Question, number: int) -> Answer:
        try:
            requests = await self._llm.off_loop(lambda: self._requests(question, number), self._lane(question))
        except InvalidValueError as error:
            raise LineError("invalid_value", str(error), error.field) from None
        except GrammarTrialError as error:  # there may be grammars that no trial survives
            raise LineError("failed", str(error), "structured_outputs", 500) from None
        texts: dict[int, list[str]] = {request.index: [] for request in requests}
        async for deltas in self._llm.stream(requests):
            for delta in deltas:
                if delta.text:
                    texts[delta.request.index].append(delta.text)
        has_text = self._llm.inputs.tokenizer is not None
        samples = [_sample(one, "".join(texts[one.index]) if has_text else None) for one in requests]
        first = requests[0]
        return Answer(self.model, samples, len(first.prompt_token_ids), first.metrics.num_cached_tokens)

    async def _decode(self, token: int) -> str:
        return self._llm.inputs.decode([token], skip_special_tokens=False)

    def _lane(self, question: Question) -> Lane:
        structured, inputs = question.params.structured_outputs, self._llm.inputs
        return "grammar" if structured is not None and not inputs.knows_grammar(structured) else "text"

    def _requests(self, question: Question, number: int) -> list[Request]:
        inputs, prompt = self._llm.inputs, question.prompt
        chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        ids: Any = inputs.chat_token_ids(prompt) if chat else prompt  # type: ignore[arg-type]
        requests = list(inputs.requests(f"line-{number}", inputs.token_ids(ids), question.params, number))
        for request in requests:
            request.streamed = False
        return requests


class ServerAnswerer(Answerer):
    """Asks a server; see :meth:`connect`."""

    def __init__(self, client: AsyncClient, model: str) -> None:
        super().__init__()
        self._client, self.model = client, model
        self._answered = 0.0

    @classmethod
    async def connect(cls, client: AsyncClient) -> ServerAnswerer:
        """
        Raises:
            ServerError: no server answers, or it does not let this client in.
        """
        return cls(client, (await client.model()).name)

    async def _answer(self, question: Question, number: int) -> Answer:
        # A server counts the requests of all its clients: by its own seed, a line would get other tokens each time.
        params = question.params if question.params.seed is not None else question.params.clone(seed=number)
        done = await self._asked(lambda: self._client.generate(question.prompt, params))
        samples = [
            Sample(s.index, s.text, s.token_ids, s.logprobs, s.finish_reason or "abort", s.stop_reason, s.error)
            for s in done.samples
        ]
        return Answer(self.model, samples, done.prompt_tokens, done.cached_tokens)

    async def _decode(self, token: int) -> str:
        return await self._asked(lambda: self._client.detokenize([token], skip_special_tokens=False))

    async def _asked(self, call: Callable[[], Awaitable[T]]) -> T:
        """What the server answers, asked again while it is busy or away."""
        first = time.monotonic()
        away_since: float | None = None
        while True:
            began = time.monotonic()
            try:
                answer = await call()
                self._answered = time.monotonic()
                return answer
            except InvalidValueError as error:
                raise LineError("invalid_value", str(error), error.field) from None
            except ServerError as error:
                now = time.monotonic()
                pause = _AWAY_PAUSE_S
                if error.code is not StatusCode.UNAVAILABLE:
                    away_since, pause = None, _pause(error, now < max(first, self._answered) + MAX_BUSY_S)
                elif away_since is None or now - began >= _REACHED_S:
                    away_since = now
                if away_since is not None and now - away_since >= MAX_AWAY_S:
                    raise
                await asyncio.sleep(pause)


def _pause(error: ServerError, in_time: bool) -> float:
    """In how many seconds to ask a server again that can be reached.

    Args:
        in_time: whether it may still be busy.

    Raises:
        LineError: the question is wrong.
        ServerError: asking again is of no use.
    """
    busy = error.code is StatusCode.RESOURCE_EXHAUSTED
    if busy and error.retry_after_s is not None and in_time:
        return error.retry_after_s
    # What is too large for a message is refused so, too, but with no word of when to try again.
    if error.code in _OF_THE_LINE or (busy and error.retry_after_s is None):
        wrong = error.code is StatusCode.INVALID_ARGUMENT
        code, status = ("invalid_value", 400) if wrong else ("failed", 500)
        raise LineError(code, str(error), error.field, status)
    raise error


def _sample(request: Request, text: str | None) -> Sample:
    assert request.finish_reason is not None
    logprobs = [
        (one.chosen, one.rank, list(zip(one.top_ids, one.top, strict=True)))
        for one in request.logprobs[: len(request.generated)]
    ]
    reason = str(request.finish_reason)
    return Sample(request.index, text, request.generated, logprobs, reason, request.stop_reason, request.error or "")
