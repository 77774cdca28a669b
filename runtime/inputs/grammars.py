"""Grammars before they reach a shard: each is brought into llguidance's form and compiled once, on trial."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import select
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from headwise.runtime.inputs.grammar_trial import WALL_SECONDS, read_frame, write_frame
from headwise.runtime.structured_outputs import StructuredOutputsParams
from headwise.workers.errors import HeadwiseError, InvalidValueError

MAX_VERDICTS = 256
"""Grammars whose trial is remembered, each with some 300 KB at most."""

_START_SECONDS = 60.0


class GrammarTrialError(HeadwiseError):
    """The process that tries grammars does not answer."""


class GrammarChecker:
    """Tells whether a grammar can be used with a model, before a request is taken. Thread-safe.

    Each new grammar is compiled once in a process of its own; see :mod:`headwise.runtime.inputs.grammar_trial`.
    """

    def __init__(self, model_dir: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._model_dir, self._vocab_size, self._eos_token_ids = model_dir, vocab_size, eos_token_ids
        self._lock = threading.Lock()
        """Held for a look at the verdicts; the other one during a trial."""
        self._trial = threading.Lock()
        self._verdicts: OrderedDict[bytes, dict[str, str]] = OrderedDict()
        self._useless: str | None = None
        """What the process found wrong with the model's tokenizer.json."""
        self._process: subprocess.Popen[bytes] | None = None

    @cached_property
    def problem(self) -> str | None:
        """Why no grammar can be used here, and what to do; None if they can."""
        if importlib.util.find_spec("llguidance") is None:
            return "needs the package llguidance, which is not installed; run: pip install 'headwise[grammar]'"
        if not (self._model_dir / "tokenizer.json").is_file():
            return "the model's directory has no tokenizer.json"
        if not self._eos_token_ids:
            return "the model's configuration names no end of sequence, which has to end the output"
        return None

    def grammar(self, params: StructuredOutputsParams) -> str:
        """In the form that :mod:`headwise.workers.sampling.grammar` takes. A new one takes a tenth of a second
        at most, but for the first, which starts the process.

        Raises:
            InvalidValueError: it cannot be used, or this installation or model knows no grammars.
            GrammarTrialError: it could not be tried.
        """
        if (problem := self.problem or self._useless) is not None:
            raise InvalidValueError("structured_outputs", params.field, problem)
        verdict = self._verdict(json.dumps(params.given))
        if "grammar" not in verdict:
            raise InvalidValueError(params.field, _size(params), f"cannot be used: {verdict['error']}")
        return verdict["grammar"]

    def known(self, params: StructuredOutputsParams) -> bool:
        """Whether :meth:`grammar` would answer at once. Itself never waits for a trial."""
        return (self.problem or self._useless) is not None or self._remembered(json.dumps(params.given)) is not None

    def close(self) -> None:
        """Ends the process. Idempotent; another :meth:`grammar` would start it again."""
        with self._trial:
            self._end()

    def _verdict(self, question: str) -> dict[str, str]:
        if (verdict := self._remembered(question)) is not None:
            return verdict
        with self._trial:
            if (verdict := self._remembered(question)) is not None:  # another's trial, while this one waited
                return verdict
            verdict = self._ask(question)
            with self._lock:
                self._verdicts[_key(question)] = verdict
                if len(self._verdicts) > MAX_VERDICTS:
                    self._verdicts.popitem(last=False)
            return verdict

    def _remembered(self, question: str) -> dict[str, str] | None:
        key = _key(question)
        with self._lock:
            if key in self._verdicts:
                self._verdicts.move_to_end(key)
            return self._verdicts.get(key)

    def _ask(self, question: str) -> dict[str, str]:
        """
        Raises:
            InvalidValueError: the model's tokenizer.json is of no use.
            GrammarTrialError: there is no verdict.
        """
        if self._useless is not None:
            raise InvalidValueError("structured_outputs", "given", self._useless)
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        try:
            write_frame(self._process.stdin, question)
            answer = self._answer(2 * WALL_SECONDS)
        except (OSError, ValueError, GrammarTrialError) as error:
            self._end()
            raise GrammarTrialError(f"the grammar could not be tried: {error}") from error
        if "starved" in answer:
            raise GrammarTrialError(f"the grammar could not be tried: {answer['starved']}")
        return answer

    def _start(self) -> None:
        eos = ",".join(map(str, self._eos_token_ids))
        # -P: nothing in the working directory is imported. No stderr: what llguidance says there quotes the grammar.
        command = [sys.executable, "-P", "-m", "headwise.runtime.inputs.grammar_trial", str(self._model_dir)]
        self._process = subprocess.Popen(
            [*command, str(self._vocab_size), eos],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            problem = self._answer(_START_SECONDS).get("error")
        except GrammarTrialError:
            self._end()
            raise
        if problem:
            self._end()
            self._useless = problem
            raise InvalidValueError("structured_outputs", "given", problem)

    def _answer(self, timeout_s: float) -> dict[str, str]:
        """
        Raises:
            GrammarTrialError: none came, or the process has ended.
        """
        assert self._process is not None and self._process.stdout is not None
        stdout = self._process.stdout
        poll = select.poll()
        poll.register(stdout, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            raise GrammarTrialError(f"no answer within {timeout_s:g} s")
        if (frame := read_frame(stdout)) is None:
            raise GrammarTrialError("the process that tries grammars has ended")
        answer: dict[str, str] = json.loads(frame)
        return answer

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        process.kill()
        process.stdout.close()
        with suppress(OSError):  # what was not sent cannot be
            process.stdin.close()
        process.wait()


def _key(question: str) -> bytes:
    return hashlib.sha256(question.encode()).digest()


def _size(params: StructuredOutputsParams) -> str:
    if params.choice is not None:
        return f"{len(params.choice)} strings"
    return f"{len((params.json or params.regex or params.grammar or '').encode())} bytes"
