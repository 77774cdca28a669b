"""Pace: how long an engine's steps take, and so how long one may take before it counts as hanging."""

from __future__ import annotations

import math
import time

from headwise.runtime.kv.cost import running_mean

MIN_STEP_TIMEOUT_S = 8.0
SLOW_STEPS = 4
"""So many times the slowest recent step is a step that hangs."""
SLOW_TOKENS = 8
"""So many times what its tokens should take, too."""
GRAMMAR_S = 0.5
"""What a step may wait for a grammar to be compiled: five times what is let through, for the core may be another's."""
CAPTURE_S = 20.0
"""What a step may take longer that captures a graph: ten times what is usual."""
FIRST_STEP_TIMEOUT_S = 600.0
"""Of a step while none was measured: a large model on a slow machine computes a long prompt."""
STEP_HALF_LIFE_S = 3600.0
"""After so long a slow step counts half."""


class Pace:
    """What steps take. Written by the engine's thread, and read by others.

    Attributes:
        token_s: seconds to compute a token of a prompt, of those computed lately; None before the first.
        row_s: seconds that a request which generates tokens adds to a step, and so to the wait for a first token, of
            steps that only generate; None before the first.
    """

    def __init__(self, step_timeout_s: float | None = None) -> None:
        """Args: ``step_timeout_s``: how long any step may take; None: by what steps took."""
        self.token_s: float | None = None
        self.row_s: float | None = None
        self._step_timeout_s = step_timeout_s
        self._slowest = 0.0, time.monotonic()  # its seconds, and when it was over
        self._most_s = 0.0  # of a token, whichever kind of step it was in

    @property
    def slowest_step_s(self) -> float:
        """Seconds of the slowest step, which count less as time goes by."""
        seconds, ended = self._slowest
        return seconds * math.pow(0.5, (time.monotonic() - ended) / STEP_HALF_LIFE_S)

    def saw_step(self, seconds: float, num_tokens: int) -> None:
        """A step with so many tokens was done, seconds after somebody began to wait for it. It captured no graph."""
        if seconds > self.slowest_step_s:
            self._slowest = seconds, time.monotonic()
        self._most_s = max(self._most_s, seconds / num_tokens)

    def saw_prefill(self, seconds: float, num_tokens: int) -> None:
        """A step computed so many tokens of prompts, and hardly anything else."""
        self.token_s = running_mean(self.token_s, seconds / num_tokens)

    def saw_decode(self, seconds: float, num_rows: int) -> None:
        """A step generated a token for each of so many requests, and did nothing else."""
        self.row_s = running_mean(self.row_s, seconds / num_rows)

    def limit_s(self, num_tokens: int, num_grammars: int = 0, captures: bool = False) -> float:
        """How long a step may take with so many tokens, which waits for so many grammars, and maybe captures a graph.
        Steps that generate tokens tell what those of a prompt take at most, until one that computes a prompt was
        measured."""
        capture_s = CAPTURE_S if captures else 0.0
        if self._step_timeout_s is not None:
            return self._step_timeout_s + capture_s
        if not self._most_s:
            return FIRST_STEP_TIMEOUT_S
        tokens_s = num_tokens * (self._most_s if self.token_s is None else self.token_s)
        steps_s = max(MIN_STEP_TIMEOUT_S, SLOW_STEPS * self.slowest_step_s, SLOW_TOKENS * tokens_s)
        return steps_s + GRAMMAR_S * num_grammars + capture_s
