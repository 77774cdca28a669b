"""Clients: threads that ask an engine what the workload says, and tell the history what they get."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence

from headwise.runtime.chaos.history import History
from headwise.runtime.chaos.workload import Ask, Question, Way, asks
from headwise.runtime.llm import LLM
from headwise.runtime.output import OutputDelta
from headwise.workers.errors import InvalidValueError

PIN_S = 3.0


class Clients:
    """Each asks one thing after another until it is told to stop."""

    def __init__(self, llm: LLM, questions: Sequence[Question], history: History, seed: int, count: int) -> None:
        self._llm, self._questions, self._history = llm, questions, history
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(number, asks(seed, number)), name=f"chaos-client-{number}")
            for number in range(count)
        ]
        for thread in self._threads:
            thread.daemon = True  # one that hangs is a finding, and not to keep the program from saying so
            thread.start()

    def stop(self, timeout_s: float) -> int:
        """Lets each finish what it has asked; returns how many have not in time."""
        self._over.set()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return sum(thread.is_alive() for thread in self._threads)

    def _run(self, client: int, wanted: Iterator[Ask]) -> None:
        for number, ask in enumerate(wanted):
            if self._over.is_set():
                return
            request = f"{client}-{number}"
            self._history.add("asked", request=request, client=client, way=ask.way, questions=list(ask.questions))
            try:
                left = self._ask(request, ask)
            except Exception as error:
                self._history.add("failed", request=request, error=f"{type(error).__name__}: {error}")
                if self._llm._loop.ended is not None:
                    return
            else:
                self._history.add("left" if left else "done", request=request)

    def _ask(self, request: str, ask: Ask) -> bool:
        """Returns whether the client has left before the end."""
        if ask.way is Way.WHOLE:
            self._ask_whole(request, ask)
            return False
        question = self._questions[ask.questions[0]]
        prompt = list(question.prompt)
        if ask.way is Way.PIN:
            with contextlib.suppress(InvalidValueError):  # the others have pinned as much as may be
                self._llm.pin_prefix(prompt, PIN_S, cache_salt=ask.salt)
        stream = self._llm.stream(prompt, question.params, request_id=f"chaos-{request}", cache_salt=ask.salt)
        for number, delta in enumerate(stream, start=1):
            self._note(request, delta)
            if number == ask.increments and ask.way is Way.LEAVE:
                stream.close()  # type: ignore[attr-defined]  # a generator
                return True
            if number == ask.increments:
                self._llm.abort(f"chaos-{request}")
        return False

    def _ask_whole(self, request: str, ask: Ask) -> None:
        chosen = [self._questions[number] for number in ask.questions]
        prompts, params = [list(question.prompt) for question in chosen], [question.params for question in chosen]
        outputs = self._llm.generate(prompts, params, cache_salt=ask.salt, use_tqdm=False)
        for number, output in enumerate(outputs):
            for sample in output.outputs:
                self._history.add(
                    "delta",
                    request=request,
                    question=number,
                    sample=sample.index,
                    tokens=sample.token_ids,
                    text=sample.text,
                    finish=sample.finish_reason,
                    error=output.error,
                )

    def _note(self, request: str, delta: OutputDelta) -> None:
        self._history.add(
            "delta",
            request=request,
            question=0,
            sample=delta.index,
            tokens=delta.token_ids,
            text=delta.text,
            finish=delta.finish_reason,
            error=delta.error,
        )
