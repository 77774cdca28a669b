"""Logits to tokens: penalties, truncation, and a random choice that depends on (seed, position) only.

The order is the one vLLM's users know: log-probabilities are taken from the raw logits; then logit_bias, the
min_tokens mask, repetition penalty, frequency and presence penalties, the grammar's mask, temperature, min_p, top_k,
top_p.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwise.workers.cuda.gpu import Gpu
from headwise.workers.download import Download
from headwise.workers.errors import InvalidValueError
from headwise.workers.plan import RowSampling, TokenLogprobs
from headwise.workers.sampling.best import greedy
from headwise.workers.sampling.choice import choose, take
from headwise.workers.sampling.grammar import Constraint, GrammarError, Grammars
from headwise.workers.sampling.logprobs import Logprobs, logprobs_of
from headwise.workers.sampling.penalties import Penalties
from headwise.workers.sampling.philox import uniforms
from headwise.workers.sampling.settings import SETTINGS, has_penalties, record_of
from headwise.workers.upload import upload, upload_together

Ints: TypeAlias = "NDArray[np.int64]"

_CHUNK_LOGITS = 1 << 18
"""How many logits a CPU works on at a time: larger temporaries come from fresh pages and cost four times as much."""


class Sampled(NamedTuple):
    """What came of the rows of a :meth:`Sampler.sample`, on the host.

    Attributes:
        tokens: one a row.
        failed: by row, why there is no token, so that the one in ``tokens`` means nothing.
        verified: of the failed rows, those whose logits were finite.
        logprobs: by row, of those that asked and have a token.
    """

    tokens: list[int]
    failed: dict[int, str]
    verified: list[int]
    logprobs: dict[int, TokenLogprobs]


@dataclass(frozen=True, slots=True)
class SampleResult:
    """One token for each row of a :meth:`Sampler.sample`, still on the device.

    Attributes:
        tokens_B: int64.
        finite_B: bool; where it is False there is no token to choose, and the one in ``tokens_B`` means nothing.
        failed: by row, why there is none though the logits may be finite.
    """

    tokens_B: Tensor
    finite_B: Tensor
    failed: Mapping[int, str] = field(default_factory=dict)
    logprobs: Logprobs | None = None


class ResultCopy:
    """A result on its way to the host."""

    def __init__(self, result: SampleResult, rows: Sequence[int], gpu: Gpu | None = None) -> None:
        """
        Args:
            rows: those that were sampled.
            gpu: where the result is; None is a CPU.
        """
        self._result, self._rows = result, rows
        reported = result.logprobs.tensors if result.logprobs else ()
        self._download = Download((result.tokens_B, result.finite_B, *reported), gpu)

    def read(self) -> Sampled:
        """On a GPU only once it has done the copy, for which the caller waits."""
        tokens_B, finite_B, *reported = self._download.arrays()
        failed, verified = {}, []
        if self._result.failed or not finite_B.all():
            for row, finite in zip(self._rows, finite_B.tolist(), strict=True):
                if not finite:
                    failed[row] = "the model's logits are not finite"
                elif row in self._result.failed:
                    failed[row] = self._result.failed[row]
                    verified.append(row)
        logprobs = self._result.logprobs.by_row(reported) if self._result.logprobs else {}
        return Sampled(
            tokens_B.tolist(), failed, verified, {row: lp for row, lp in logprobs.items() if row not in failed}
        )


class Sampler:
    """Samples the rows of a step, and keeps what their sampling needs to remember.

    Args:
        vocab_size: the number of logits of a row.
        max_rows: rows are in [0, max_rows).
        device: where the logits will be.
        grammars: None on a rank that never samples, which then ignores the rows' grammars.
    """

    def __init__(
        self, vocab_size: int, max_rows: int, device: torch.device | str, grammars: Grammars | None = None
    ) -> None:
        self.vocab_size, self.max_rows, self.device = vocab_size, max_rows, torch.device(device)
        self._grammars = grammars
        self._settings_R = np.zeros(max_rows, SETTINGS)
        # Asked of every step, so apart from the rest: to get whole records takes ten times as long.
        self._plain_R, self._min_tokens_R = np.zeros(max_rows, np.bool_), np.zeros(max_rows, np.int64)
        self._constraints: dict[int, Constraint] = {}
        self._bias: dict[int, tuple[Ints, NDArray[np.float32]]] = {}
        self._stops: dict[int, Ints] = {}
        self._penalties = Penalties(vocab_size, max_rows, self.device)

    def admit(
        self, row: int, sampling: RowSampling, prompt_token_ids: Sequence[int], generated: Sequence[int] = ()
    ) -> None:
        """Take a row into use; what it had before is forgotten.

        Args:
            generated: the tokens after the prompt that are known already, as after a preemption.

        Raises:
            InvalidValueError: a row or a token id is out of range. On a GPU such an id would fault the whole device.
        """
        if not 0 <= row < self.max_rows:
            raise InvalidValueError("row", row, f"a row must be in [0, {self.max_rows})")
        self.drop(row)
        self._check_ids("logit_bias", [token for token, _ in sampling.logit_bias])
        self._check_ids("stop_token_ids", sampling.stop_token_ids)
        if has_penalties(sampling):
            self._check_ids("prompt_token_ids", prompt_token_ids)
            self._check_ids("generated", generated)
            self._penalties.admit(row, prompt_token_ids, generated)
        if sampling.logit_bias:
            ids, values = zip(*sampling.logit_bias, strict=True)
            self._bias[row] = (np.array(ids, np.int64), np.array(values, np.float32))
        if sampling.min_tokens > 0 and sampling.stop_token_ids:
            self._stops[row] = np.array(sampling.stop_token_ids, np.int64)
        if sampling.grammar and self._grammars is not None:
            self._constraints[row] = self._grammars.constraint(sampling.grammar, generated)
        settings = record_of(sampling, self.vocab_size, row in self._constraints)
        self._settings_R[row] = settings
        self._plain_R[row], self._min_tokens_R[row] = settings["plain"], settings["min_tokens"]

    def drop(self, row: int) -> None:
        """Free a row; one that is not in use is no error."""
        for state in (self._bias, self._stops, self._constraints):
            state.pop(row, None)
        self._penalties.drop(row)

    def greedy_only(self, rows_B: Ints, generated_B: Ints) -> bool:
        """Whether every row is plain greedy, so that the step needs an argmax and not the whole vocabulary; arguments
        as of :meth:`sample`."""
        return bool((self._plain_R[rows_B] & (generated_B >= self._min_tokens_R[rows_B])).all())

    def sample(self, logits_BV: Tensor, rows_B: Ints, positions_B: Ints, generated_B: Ints) -> SampleResult:
        """Choose one token a row. A row whose logits are not finite spoils no other and raises nothing. On a GPU the
        host waits for nothing.

        Args:
            logits_BV: float32, the whole vocabulary; not changed.
            rows_B: admitted rows, no two the same.
            positions_B: of each row, the index its new token will have: prompt and generated tokens before it.
            generated_B: of each row, the generated tokens before this one.
        """
        settings_B = self._settings_R[rows_B]
        processed_BV = self._process(logits_BV, rows_B, settings_B, generated_B)
        failed = self._constrain(processed_BV, rows_B, settings_B)
        finite_B = logits_BV.amax(-1).isfinite()
        tokens_B = torch.zeros(len(rows_B), dtype=torch.int64, device=logits_BV.device)
        greedy_P = np.flatnonzero(~settings_B["draws"])
        if len(greedy_P):
            index = upload(greedy_P, self.device)
            tokens, finite = greedy(take(processed_BV, index))
            tokens_B[index], finite_B[index] = tokens, finite_B[index] & finite
        for part in self._chunks(np.flatnonzero(settings_B["draws"])):
            index = upload(part, self.device)
            numbers = uniforms(settings_B["seed"][part], positions_B[part].astype(np.uint64))
            tokens, finite = choose(take(processed_BV, index), settings_B[part], numbers)
            tokens_B[index], finite_B[index] = tokens, finite_B[index] & finite
        return SampleResult(tokens_B, finite_B, failed, self._report(logits_BV, tokens_B, rows_B, settings_B))

    def observe(self, rows_B: Ints, tokens_B: Tensor) -> None:
        """Count the chosen tokens for the penalties; every rank calls it, also one that did not sample.

        Args:
            tokens_B: int64 on the device, one for each of ``rows_B``.
        """
        self._penalties.observe(rows_B, tokens_B)

    @property
    def constrained(self) -> Collection[int]:
        """The rows that have a grammar, as they are when somebody looks."""
        return self._constraints.keys()

    def constraints(self, rows_B: Ints) -> dict[int, Constraint]:
        """By row that has a grammar, where it is in it; the row's tokens move it on."""
        if not self._constraints:
            return {}
        return {row: self._constraints[row] for row in rows_B.tolist() if row in self._constraints}

    def _process(self, logits_BV: Tensor, rows_B: Ints, settings_B: NDArray[Any], generated_B: Ints) -> Tensor:
        """The logits after bias, min_tokens mask and penalties; the same tensor if no row has any, nor a grammar."""
        biased = np.flatnonzero(settings_B["biased"])
        masked = np.flatnonzero(generated_B < settings_B["min_tokens"])
        penalised = np.flatnonzero(settings_B["penalised"])
        if not (len(biased) or len(masked) or len(penalised) or settings_B["constrained"].any()):
            return logits_BV
        processed_BV = logits_BV.clone()
        if len(biased):
            bias = [self._bias[row] for row in rows_B[biased].tolist()]
            places = _places(biased, [ids for ids, _ in bias])
            at, ids, values = upload_together([*places, np.concatenate([values for _, values in bias])], self.device)
            processed_BV[at, ids] += values
        if len(masked):
            places = _places(masked, [self._stops[row] for row in rows_B[masked].tolist()])
            at, ids = upload_together(places, self.device)
            processed_BV[at, ids] = -math.inf
        for part in self._chunks(penalised):
            index = upload(part, self.device)
            taken = take(processed_BV, index)
            processed_BV[index] = self._penalties.apply(taken, rows_B[part], settings_B[part])
        return processed_BV

    def _constrain(self, processed_BV: Tensor, rows_B: Ints, settings_B: NDArray[Any]) -> dict[int, str]:
        """Leaves the rows with a grammar only what it allows; the rows that have failed, and why."""
        failed = {}
        for i in np.flatnonzero(settings_B["constrained"]).tolist():
            row = int(rows_B[i])
            try:
                banned_V = ~self._constraints[row].allowed()
            except GrammarError as error:
                failed[row] = str(error)
            else:
                processed_BV[i].masked_fill_(upload(banned_V, self.device), -math.inf)
        return failed

    def _report(self, logits_BV: Tensor, tokens_B: Tensor, rows_B: Ints, settings_B: NDArray[Any]) -> Logprobs | None:
        asked = np.flatnonzero(settings_B["num_logprobs"] >= 0)
        if not len(asked):
            return None
        index = upload(asked, self.device)
        counts = dict(zip(rows_B[asked].tolist(), settings_B["num_logprobs"][asked].tolist(), strict=True))
        return logprobs_of(take(logits_BV, index), tokens_B[index], counts)

    def _chunks(self, rows: Ints) -> list[Ints]:
        size = max(1, _CHUNK_LOGITS // self.vocab_size) if self.device.type == "cpu" else self.max_rows
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def _check_ids(self, field: str, ids: Sequence[int]) -> None:
        if len(ids) and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = next(t for t in ids if not 0 <= t < self.vocab_size)
            raise InvalidValueError(field, wrong, f"a token id must be in [0, {self.vocab_size})")


def _places(index: Ints, ids: Sequence[Ints]) -> tuple[Ints, Ints]:
    """Where these ids of the rows of ``index`` are in a matrix of logits."""
    return np.repeat(index, [len(part) for part in ids]), np.concatenate(ids)
