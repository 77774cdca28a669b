"""Grammars on the rank that samples: which tokens may come next in a row whose output has to match one.

A grammar is a string that llguidance understands (Earley parsing over a derivative-based lexer; Moskal et al.,
https://github.com/guidance-ai/llguidance). Imports neither torch nor, before a grammar is there, llguidance, which is
the extra ``grammar``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from headwise.workers.errors import HeadwiseError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Bools: TypeAlias = "NDArray[np.bool_]"

MAX_COMPILED = 32
"""Grammars a rank keeps compiled. Most take less than 1 MiB, one whose lexer has all the states it may some 15 MB."""

_MAX_MESSAGE = 300

# What one token's mask may take. Ordinary patterns need up to 100,000 of the lexer's fuel and 1,000 items.
# Measured on 49,152 tokens: what is ordinary takes 5 ms at most, regexes and ambiguous grammars made to be slow some
# 20 ms; the worst found are terminals that count repetitions, all at once: 50 of them 120 ms, 200 of them 150 ms.
_INITIAL_LEXER_FUEL, _STEP_LEXER_FUEL = 1_000_000, 200_000
# Objects take most, for each property that may be left out 4 items in a row: 150 pass, and 100 need more than 5,000.
_STEP_MAX_ITEMS, _MAX_ITEMS_IN_ROW = 10_000, 1_000
# A state takes 180 to 290 bytes, measured as memory before and after such as .*a.{2000}b: 15 MB for all, 0.5 GB for 32
# grammars. A string with a maxLength comes to 4 states a character, so less would end long texts.
_MAX_LEXER_STATES, _MAX_GRAMMAR_SIZE = 50_000, 50_000

# Errors of llguidance's lexer begin so; the second is the only one that a fresh lexer is the answer to.
_LEXER_ERROR = "lexer error"
_TOO_MANY_STATES = "lexer error: too many states"


class GrammarError(HeadwiseError):
    """A grammar cannot be compiled, or has come to where it allows nothing, or too much to work through."""


@dataclass(eq=False)
class _Shared:
    """A compiled grammar, whose rows follow copies of it that share one lexer."""

    matcher: Future[LLMatcher]
    failure: str = ""
    """Of the lexer, which is then of no use to anybody: its masks are wrong, even those that come without an error."""
    failed_at: Sequence[int] | None = None
    """What the row had generated whose mask or token it was."""
    successor: _Shared | None = None
    """What its rows go on with after that. One for all of them, so that they compile it once."""

    @property
    def is_usable(self) -> bool:
        return not self.failure and not (self.matcher.done() and self.matcher.exception())

    @property
    def used_up(self) -> bool:
        return self.failure.startswith(_TOO_MANY_STATES)

    def observe(self, error: str, generated: Sequence[int]) -> None:
        if error.startswith(_LEXER_ERROR) and not self.failure:
            self.failure, self.failed_at = error, list(generated)


class Grammars:
    """The compiled grammars of one rank. They are compiled on a thread of their own, beside the steps."""

    def __init__(self, model_dir: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """
        Args:
            vocab_size: the number of logits of a row.
            eos_token_ids: allowed once a row's grammar is complete.
        """
        self._about = model_dir, vocab_size, eos_token_ids
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[str, _Shared] = OrderedDict()
        self._thread: ThreadPoolExecutor | None = None

    def constraint(self, grammar: str, generated: Sequence[int] = ()) -> Constraint:
        """A row's place in a grammar, after the tokens that were generated already."""
        return Constraint(self._current(grammar), partial(self._renewed, grammar), self._about[1:], generated)

    def close(self) -> None:
        """Idempotent; waits for what is being compiled."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._thread, self._tokenizer = None, None
        self._compiled.clear()

    def _current(self, grammar: str) -> _Shared:
        """What new rows share. One that failed to compile is tried again: its cause may be gone."""
        found = self._compiled.get(grammar)
        if found is None or not found.is_usable:
            found = self._compiled[grammar] = _Shared(self._submit(grammar))
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return found

    def _renewed(self, grammar: str, failed: _Shared) -> _Shared:
        """What the rows of one whose lexer has failed go on with."""
        if failed.successor is None:
            failed.successor = self._current(grammar)
        return failed.successor

    def _submit(self, grammar: str) -> Future[LLMatcher]:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "headwise-grammars")
        return self._thread.submit(self._compile, grammar)

    def _compile(self, grammar: str) -> LLMatcher:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(*self._about)
        return compile_grammar(self._tokenizer, grammar)


class Constraint:
    """One row's place in its grammar."""

    def __init__(
        self,
        shared: _Shared,
        renewed: Callable[[_Shared], _Shared],
        vocabulary: tuple[int, Sequence[int]],
        generated: Sequence[int],
    ) -> None:
        """
        Args:
            renewed: gives what to go on with in place of one whose lexer has failed.
            vocabulary: its size and its ends of sequence.
        """
        self._shared, self._renewed, self._vocabulary = shared, renewed, vocabulary
        self._generated = list(generated)
        self._matcher: LLMatcher | None = None
        self._failure = ""

    def allowed(self) -> Bools:
        """Which tokens may come next, [V]: at least one. Waits for the grammar, should it not be compiled yet.

        Raises:
            GrammarError: there is none, or the grammar is too much at this place. So does every later call.
        """
        if self._failure:
            raise GrammarError(self._failure)
        try:
            return self._allowed()
        except GrammarError as error:
            self._failure = str(error)
            raise

    def accept(self, token: int) -> None:
        """Takes note of the token that was chosen. One that was not allowed shows in the next :meth:`allowed`."""
        self._generated.append(token)
        if self._matcher is not None:
            self._matcher.consume_token(token)
            self._shared.observe(self._matcher.get_error(), self._generated)

    def _allowed(self) -> Bools:
        shared = self._shared
        # A row that is too much for a lexer is too much for a fresh one. Others are not to blame for it, nor is any
        # row for how many states all rows have come to together.
        by_another = shared.failure and shared.failed_at != self._generated
        mask_V, error = self._mask()
        if by_another or shared.used_up:
            shared = self._renewed(shared)
            while shared.used_up and shared.failed_at != self._generated:
                shared = self._renewed(shared)
            self._shared, self._matcher = shared, None
            mask_V, error = self._mask()
        if error:
            raise GrammarError(f"the grammar cannot be followed further: {shorten(error)}")
        if not mask_V.any():
            raise GrammarError("no token of the model's vocabulary continues the grammar")
        return mask_V

    def _mask(self) -> tuple[Bools, str]:
        """And the error, if any, with which the mask means nothing."""
        if self._shared.failure:
            return np.zeros(self._vocabulary[0], np.bool_), self._shared.failure
        matcher = self._matcher = self._matcher or self._follow()
        mask_V, error = allowed(matcher, *self._vocabulary), matcher.get_error()
        self._shared.observe(error, self._generated)
        return mask_V, error

    def _follow(self) -> LLMatcher:
        """A copy of its own, moved on to where the row is."""
        try:
            matcher = self._shared.matcher.result().deep_copy()
        except (OSError, ValueError, ImportError) as error:
            raise GrammarError(f"the grammar cannot be compiled on this host: {shorten(str(error))}") from error
        matcher.consume_tokens(self._generated)
        return matcher


def load_tokenizer(model_dir: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """
    Raises:
        OSError, ValueError: there is no tokenizer.json, or it cannot be used.
        ImportError: llguidance is not installed.
    """
    from llguidance import LLTokenizer

    text = (model_dir / "tokenizer.json").read_text(encoding="utf-8")
    return LLTokenizer(text, n_vocab=vocab_size, eos_token=list(eos_token_ids))


def compile_grammar(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """
    Raises:
        GrammarError: it is not well-formed, cannot be satisfied or is too large.
    """
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(
        initial_lexer_fuel=_INITIAL_LEXER_FUEL,
        step_lexer_fuel=_STEP_LEXER_FUEL,
        step_max_items=_STEP_MAX_ITEMS,
        max_items_in_row=_MAX_ITEMS_IN_ROW,
        max_lexer_states=_MAX_LEXER_STATES,
        max_grammar_size=_MAX_GRAMMAR_SIZE,
        verbose_errors=False,
    )
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if error := matcher.get_error():
        raise GrammarError(shorten(error))
    return matcher


def allowed(matcher: LLMatcher, vocab_size: int, eos_token_ids: Sequence[int] = ()) -> Bools:
    """Which tokens may come next, [V]; of ``eos_token_ids`` none before the grammar is complete."""
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    mask_V = np.unpackbits(bits, count=vocab_size, bitorder="little").view(np.bool_)
    ends = list(eos_token_ids)
    # Where there is one way to go on, and that text is a special token's, llguidance allows only the special token.
    if mask_V[ends].any() and not (matcher.is_accepting() or matcher.is_stopped()):
        mask_V[ends] = False
    return mask_V


def shorten(message: str) -> str:
    """One line of bounded length: llguidance quotes the grammar, which may be long."""
    line = " ".join(message.split())
    return line if len(line) <= _MAX_MESSAGE else f"{line[: _MAX_MESSAGE - 3]}..."
