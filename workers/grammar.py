"""Grammars on the rank that samples: which tokens may come next in a row whose output has to match one.

A grammar is a string that llguidance understands (Earley parsing over a derivative-based lexer; Moskal et al.,
https://github.com/guidance-ai/llguidance). Imports neither torch nor, before a grammar is there, llguidance, which is
the extra ``grammar``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from headwise.workers.errors import HeadwiseError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Bools: TypeAlias = "NDArray[np.bool_]"

MAX_COMPILED = 32
"""Grammars a rank keeps compiled. A trial bounds what each takes; most take less than 1 MiB."""

_MAX_MESSAGE = 300

# What one token's mask may take: some 5 ms at worst, far above what schemas need. The lexer's fuel is about 14,000 a
# millisecond, items about 20,000; a lexer's state about 1 KiB (llguidance's figures).
_INITIAL_LEXER_FUEL, _STEP_LEXER_FUEL = 1_000_000, 50_000
_STEP_MAX_ITEMS, _MAX_ITEMS_IN_ROW = 20_000, 500
_MAX_LEXER_STATES, _MAX_GRAMMAR_SIZE = 50_000, 50_000


class GrammarError(HeadwiseError):
    """A grammar cannot be compiled, or has come to where it allows nothing, or too much to work through."""


class Grammars:
    """The compiled grammars of one rank. They are compiled on a thread of their own, beside the steps."""

    def __init__(self, model_dir: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """
        Args:
            vocab_size: the number of logits of a row.
            eos_token_ids: allowed once a row's grammar is complete.
        """
        self._about = model_dir, vocab_size, eos_token_ids
        self._vocab_size = vocab_size
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._thread: ThreadPoolExecutor | None = None

    def constraint(self, grammar: str, generated: Sequence[int] = ()) -> Constraint:
        """A row's place in a grammar, after the tokens that were generated already."""
        if grammar not in self._compiled:
            self._compiled[grammar] = self._submit(grammar)
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        compiled = self._compiled[grammar]
        return Constraint(compiled, lambda: self._renew(grammar, compiled), self._vocab_size, generated)

    def close(self) -> None:
        """Idempotent; waits for what is being compiled."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._thread, self._tokenizer = None, None
        self._compiled.clear()

    def _renew(self, grammar: str, used_up: Future[LLMatcher]) -> Future[LLMatcher]:
        """For one row alone. Those that come later get one of their own to share."""
        if self._compiled.get(grammar) is used_up:
            del self._compiled[grammar]
        return self._submit(grammar)

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
        compiled: Future[LLMatcher],
        renew: Callable[[], Future[LLMatcher]],
        vocab_size: int,
        generated: Sequence[int],
    ) -> None:
        """Args: ``renew``: compiles the grammar for this row alone."""
        self._compiled, self._vocab_size = compiled, vocab_size
        self._renew: Callable[[], Future[LLMatcher]] | None = renew
        self._generated = list(generated)
        self._matcher: LLMatcher | None = None

    def allowed(self) -> Bools:
        """Which tokens may come next, [V]: at least one. Waits for the grammar, should it not be compiled yet.

        Raises:
            GrammarError: there is none, or the grammar is too much at this place.
        """
        matcher = self._matcher or self._follow(self._compiled)
        mask_V = allowed(matcher, self._vocab_size)
        if "lexer error" in matcher.get_error() and self._renew is not None:
            # Copies share their lexer, whose states add up over all rows, and one that has too many is of no more use.
            matcher = self._follow(self._renew())
            mask_V = allowed(matcher, self._vocab_size)
            self._renew = None
        if error := matcher.get_error():
            raise GrammarError(f"the grammar cannot be followed further: {shorten(error)}")
        if not mask_V.any():
            raise GrammarError("no token of the model's vocabulary continues the grammar")
        return mask_V

    def accept(self, token: int) -> None:
        """Takes note of the token that was chosen. One that was not allowed shows in the next :meth:`allowed`."""
        self._generated.append(token)
        if self._matcher is not None:
            self._matcher.consume_token(token)

    def _follow(self, compiled: Future[LLMatcher]) -> LLMatcher:
        """A copy of its own, moved on to where the row is."""
        try:
            matcher = compiled.result().deep_copy()
        except (OSError, ValueError, ImportError) as error:
            raise GrammarError(f"the grammar cannot be compiled on this host: {shorten(str(error))}") from error
        matcher.consume_tokens(self._generated)
        self._matcher = matcher
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


def allowed(matcher: LLMatcher, vocab_size: int) -> Bools:
    """Which tokens may come next, [V]; once the grammar is complete, the end of sequence."""
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    return np.unpackbits(bits, count=vocab_size, bitorder="little").view(np.bool_)


def shorten(message: str) -> str:
    """One line of bounded length: llguidance quotes the grammar, which may be long."""
    line = " ".join(message.split())
    return line if len(line) <= _MAX_MESSAGE else f"{line[: _MAX_MESSAGE - 3]}..."
