"""Logits to tokens: penalties, truncation, and a random choice that depends on (seed, position) only.

The order is the one vLLM's users know: log-probabilities are taken from the raw logits; then logit_bias, the
min_tokens mask, repetition penalty, frequency and presence penalties, the grammar's mask, temperature, min_p, top_k,
top_p.

The choice is the inverse of the cumulative distribution at one uniform number. Tokens are laid out in token-id order,
not by probability: noise of 1e-6 in the logits (another number of shards, another batch) moves each boundary by about
as much, while in sorted order two close tokens could change places and move by a whole token's probability.
Probabilities are summed as integers (multiples of 2**-40 of the most likely token's), so that the sums are exact and
a parallel scan gives what a loop would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from headwise.workers.cpu.argmax import argmax
from headwise.workers.errors import InvalidValueError
from headwise.workers.plan import RowSampling, TokenLogprobs
from headwise.workers.sampling.grammar import Constraint, GrammarError, Grammars

GREEDY_TEMPERATURE = 1e-5
"""A temperature below this is greedy, as in vLLM."""

_CHUNK_LOGITS = 1 << 18
"""How many logits a CPU works on at a time: larger temporaries come from fresh pages and cost four times as much."""

_MOST_LOGPROBS = 20
"""The largest ``num_logprobs``."""

_ONE = 2.0**40
"""The integer weight of the most likely token; 2**23 tokens of that weight still fit in an int64."""


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of the token at ``position`` of a row sampled under ``seed``.

    Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC11), the seed as
    key and the position as counter: no state, and integers only, so the same on every platform.

    Args:
        seed, position: taken modulo 2**64.
    """
    words = _philox4x32((position & _U32, position >> 32 & _U32, 0, 0), (seed & _U32, seed >> 32 & _U32))
    return ((words[0] << 32 | words[1]) >> 11) * 2.0**-53


def greedy(logits_BV: Tensor, num_threads: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The largest logit of each row, float32, of the whole vocabulary or of one rank's slice of it.

    A NaN counts as the largest, then +inf. Ranks that exchange (value, first id of the slice + id) and keep the
    largest value of the lowest rank get the whole vocabulary's answer, and the row is finite if that value is.

    Returns:
        values_B (float32), ids_B (int64, the lowest of equals), finite_B (bool: no NaN, no +inf and not all -inf).
    """
    if logits_BV.device.type == "cpu" and logits_BV.stride(1) == 1:
        ids_B = argmax(logits_BV, num_threads)
        values_B = logits_BV.gather(1, ids_B.unsqueeze(1)).squeeze(1)
    else:
        values_B, ids_B = logits_BV.max(dim=-1)
    return values_B, ids_B, values_B.isfinite()


@dataclass(frozen=True, slots=True)
class SampleResult:
    """One token for each row of a :meth:`Sampler.sample`; everything is still on the device.

    Attributes:
        tokens_B: int64.  finite_B: bool; where it is False there is no token to choose, and the token means nothing.
        failed: by row, why there is none, where its logits were finite.
    """

    tokens_B: Tensor
    finite_B: Tensor
    failed: dict[int, str] = field(default_factory=dict)
    _reported: _Reported | None = None

    def logprobs(self) -> dict[int, TokenLogprobs]:
        """By row, for the finite rows that asked; copies to the host, so waits for the device."""
        return self._reported.to_host() if self._reported else {}


class Sampler:
    """Samples the rows of a step, and keeps what their sampling needs to remember on the device.

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
        self._constraints: dict[int, Constraint] = {}
        self._sampling: dict[int, RowSampling] = {}
        self._bias: dict[int, tuple[Tensor, Tensor]] = {}
        self._stops: dict[int, Tensor] = {}
        self._penalties = _Penalties(vocab_size, max_rows, self.device)

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
        if _has_penalties(sampling):
            self._check_ids("prompt_token_ids", prompt_token_ids)
            self._check_ids("generated", generated)
            self._penalties.admit(row, prompt_token_ids, generated)
        if sampling.logit_bias:
            ids, values = zip(*sampling.logit_bias, strict=True)
            self._bias[row] = (_tensor(ids, torch.int64, self.device), _tensor(values, torch.float32, self.device))
        if sampling.min_tokens > 0 and sampling.stop_token_ids:
            self._stops[row] = _tensor(sampling.stop_token_ids, torch.int64, self.device)
        if sampling.grammar and self._grammars is not None:
            self._constraints[row] = self._grammars.constraint(sampling.grammar, generated)
        self._sampling[row] = sampling

    def drop(self, row: int) -> None:
        """Free a row; one that is not in use is no error."""
        for state in (self._sampling, self._bias, self._stops, self._constraints):
            state.pop(row, None)
        self._penalties.drop(row)

    def greedy_only(self, rows: Sequence[int], num_generated: Sequence[int] | None = None) -> bool:
        """Whether every row is plain greedy, so that the step needs an argmax and not the whole vocabulary.

        Args:
            num_generated: as for :meth:`sample`; without it a row with min_tokens is never plain.
        """
        for i, row in enumerate(rows):
            sampling = self._sampling[row]
            if sampling.temperature >= GREEDY_TEMPERATURE or sampling.num_logprobs >= 0 or sampling.grammar:
                return False
            if row in self._bias or row in self._penalties:
                return False
            if row in self._stops and (num_generated is None or num_generated[i] < sampling.min_tokens):
                return False
        return True

    def sample(
        self, logits_BV: Tensor, rows: Sequence[int], positions: Sequence[int], num_generated: Sequence[int]
    ) -> SampleResult:
        """Choose one token a row. A row whose logits are not finite spoils no other and raises nothing.

        Args:
            logits_BV: float32, the whole vocabulary; not changed.
            rows: admitted rows, no two the same.
            positions: of each row, the index its new token will have: prompt and generated tokens before it.
            num_generated: of each row, the generated tokens before this one.
        """
        sampling = [self._sampling[row] for row in rows]
        processed_BV = self._process(logits_BV, rows, num_generated)
        failed = self._constrain(processed_BV, rows)
        finite_B = logits_BV.amax(-1).isfinite()
        if failed:
            is_finite = dict(zip(rows, finite_B.tolist(), strict=True))
            failed = {row: why for row, why in failed.items() if is_finite[row]}
        tokens_B = torch.zeros(len(rows), dtype=torch.int64, device=logits_BV.device)
        plain = [i for i, s in enumerate(sampling) if s.temperature < GREEDY_TEMPERATURE]
        random = [i for i, s in enumerate(sampling) if s.temperature >= GREEDY_TEMPERATURE]
        if plain:
            index = _tensor(plain, torch.int64, self.device)
            _, tokens, finite = greedy(_take(processed_BV, index))
            tokens_B[index], finite_B[index] = tokens, finite_B[index] & finite
        for part in self._chunks(random):
            index = _tensor(part, torch.int64, self.device)
            uniforms = [uniform(sampling[i].seed, positions[i]) for i in part]
            tokens, finite = _choose(_take(processed_BV, index), [sampling[i] for i in part], uniforms)
            tokens_B[index], finite_B[index] = tokens, finite_B[index] & finite
        if failed:
            finite_B[_tensor([rows.index(row) for row in failed], torch.int64, self.device)] = False
        asked = [i for i, s in enumerate(sampling) if s.num_logprobs >= 0]
        if not asked:
            return SampleResult(tokens_B, finite_B, failed)
        index = _tensor(asked, torch.int64, self.device)
        counts = {rows[i]: sampling[i].num_logprobs for i in asked}
        reported = _report(_take(logits_BV, index), tokens_B[index], finite_B[index], counts)
        return SampleResult(tokens_B, finite_B, failed, reported)

    def observe(self, rows: Sequence[int], tokens_B: Tensor) -> None:
        """Count the chosen tokens for the penalties; every rank calls it, also one that did not sample.

        Args:
            tokens_B: int64 on the device, one for each of ``rows``.
        """
        self._penalties.observe(rows, tokens_B)

    def constraint(self, row: int) -> Constraint | None:
        """Where a row is in its grammar; the row's tokens move it on. None if the row has no grammar."""
        return self._constraints.get(row)

    def _process(self, logits_BV: Tensor, rows: Sequence[int], num_generated: Sequence[int]) -> Tensor:
        """The logits after bias, min_tokens mask and penalties; the same tensor if no row has any, nor a grammar."""
        biased = [i for i, row in enumerate(rows) if row in self._bias]
        masked = [i for i, row in enumerate(rows) if row in self._stops]
        masked = [i for i in masked if num_generated[i] < self._sampling[rows[i]].min_tokens]
        penalised = [i for i, row in enumerate(rows) if row in self._penalties]
        if not (biased or masked or penalised or any(row in self._constraints for row in rows)):
            return logits_BV
        processed_BV = logits_BV.clone()
        for i in biased:
            ids, values = self._bias[rows[i]]
            processed_BV[i, ids] += values
        for i in masked:
            processed_BV[i, self._stops[rows[i]]] = -math.inf
        for part in self._chunks(penalised):
            index = _tensor(part, torch.int64, self.device)
            sampling = {rows[i]: self._sampling[rows[i]] for i in part}
            processed_BV[index] = self._penalties.apply(_take(processed_BV, index), sampling)
        return processed_BV

    def _constrain(self, processed_BV: Tensor, rows: Sequence[int]) -> dict[int, str]:
        """Leaves the rows with a grammar only what it allows; the rows that have failed, and why."""
        failed = {}
        for i, row in enumerate(rows):
            if row not in self._constraints:
                continue
            try:
                banned_V = torch.from_numpy(~self._constraints[row].allowed())
            except GrammarError as error:
                failed[row] = str(error)
            else:
                processed_BV[i].masked_fill_(banned_V.to(self.device), -math.inf)
        return failed

    def _chunks(self, rows: list[int]) -> list[list[int]]:
        size = max(1, _CHUNK_LOGITS // self.vocab_size) if self.device.type == "cpu" else self.max_rows
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def _check_ids(self, field: str, ids: Sequence[int]) -> None:
        if len(ids) and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = next(t for t in ids if not 0 <= t < self.vocab_size)
            raise InvalidValueError(field, wrong, f"a token id must be in [0, {self.vocab_size})")


class _Penalties:
    """Which tokens the prompt holds and how often each was generated, for the rows with a penalty.

    They share two matrices of one slot a row, which double when they are full: a shard whose requests use
    no penalty holds nothing, and one where all do holds 5 bytes a row and token of the vocabulary.
    """

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device) -> None:
        self.max_rows, self.device = max_rows, device
        self._slots: dict[int, int] = {}
        self._counts_SV = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self._prompt_SV = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)

    def __contains__(self, row: int) -> bool:
        return row in self._slots

    def admit(self, row: int, prompt_token_ids: Sequence[int], generated: Sequence[int]) -> None:
        slot = min(set(range(len(self._slots) + 1)) - set(self._slots.values()))
        if slot == len(self._counts_SV):
            more = min(max(1, slot), self.max_rows - slot)
            self._counts_SV = torch.cat([self._counts_SV, self._counts_SV.new_zeros((more, self._counts_SV.shape[1]))])
            self._prompt_SV = torch.cat([self._prompt_SV, self._prompt_SV.new_zeros((more, self._prompt_SV.shape[1]))])
        prompt = _tensor(prompt_token_ids, torch.int64, self.device)
        chosen = _tensor(generated, torch.int64, self.device)
        self._prompt_SV[slot].zero_().index_fill_(0, prompt, True)
        self._counts_SV[slot].zero_().index_add_(0, chosen, torch.ones_like(chosen, dtype=torch.int32))
        self._slots[row] = slot

    def drop(self, row: int) -> None:
        self._slots.pop(row, None)

    def observe(self, rows: Sequence[int], tokens_B: Tensor) -> None:
        index = [i for i, row in enumerate(rows) if row in self._slots]
        if index:
            slots = _tensor([self._slots[rows[i]] for i in index], torch.int64, self.device)
            self._counts_SV[slots, tokens_B[_tensor(index, torch.int64, self.device)]] += 1

    def apply(self, logits_PV: Tensor, sampling: dict[int, RowSampling]) -> Tensor:
        """Repetition penalty as in CTRL (Keskar et al., 2019), frequency and presence as in OpenAI's API."""
        slots = _tensor([self._slots[row] for row in sampling], torch.int64, self.device)
        counts_PV = self._counts_SV[slots]
        generated_PV = counts_PV > 0
        repetition, frequency, presence = (
            _tensor([[value] for value in values], torch.float32, self.device)
            for values in zip(
                *((s.repetition_penalty, s.frequency_penalty, s.presence_penalty) for s in sampling.values()),
                strict=True,
            )
        )
        repeated_PV = torch.where(logits_PV > 0, logits_PV / repetition, logits_PV * repetition)
        logits_PV = torch.where(self._prompt_SV[slots] | generated_PV, repeated_PV, logits_PV)
        return logits_PV - frequency * counts_PV - presence * generated_PV


@dataclass(frozen=True, slots=True)
class _Reported:
    """The log-probabilities of the rows that asked; K is _MOST_LOGPROBS, or the vocabulary if that is smaller."""

    counts: dict[int, int]
    finite_L: Tensor
    chosen_L: Tensor
    rank_L: Tensor
    top_LK: Tensor
    ids_LK: Tensor

    def to_host(self) -> dict[int, TokenLogprobs]:
        finite, chosen, rank = self.finite_L.tolist(), self.chosen_L.tolist(), self.rank_L.tolist()
        top, ids = self.top_LK.tolist(), self.ids_LK.tolist()
        return {
            row: TokenLogprobs(chosen[i], rank[i], tuple(ids[i][:count]), tuple(top[i][:count]))
            for i, (row, count) in enumerate(self.counts.items())
            if finite[i]
        }


def _report(logits_LV: Tensor, tokens_L: Tensor, finite_L: Tensor, counts: dict[int, int]) -> _Reported:
    logprobs_LV = logits_LV.log_softmax(-1)
    chosen_L1 = logprobs_LV.gather(1, tokens_L[:, None])
    rank_L = (logits_LV > logits_LV.gather(1, tokens_L[:, None])).sum(-1) + 1
    # Always as many, for which of equals come first depends on how many are asked for.
    top_LK, ids_LK = logprobs_LV.topk(min(_MOST_LOGPROBS, logits_LV.shape[1]), dim=-1)
    return _Reported(counts, finite_L, chosen_L1[:, 0], rank_L, top_LK, ids_LK)


def _choose(logits_RV: Tensor, sampling: Sequence[RowSampling], uniforms: Sequence[float]) -> tuple[Tensor, Tensor]:
    """A random token a row, int64, and whether the row was finite."""
    device = logits_RV.device
    top_R1 = logits_RV.amax(-1, keepdim=True)
    temperature_R1 = _tensor([[s.temperature] for s in sampling], torch.float32, device)
    # The largest logit is subtracted before the division, so that no temperature overflows.
    scaled_RV = (logits_RV - top_R1).div_(temperature_R1)
    weights_RV = _weights(scaled_RV)
    cut = [i for i, s in enumerate(sampling) if _truncates(s, logits_RV.shape[1])]
    if cut:
        index = _tensor(cut, torch.int64, device)
        floor_R1 = torch.full_like(top_R1, -math.inf)
        floor_R1[index] = _floor(_take(scaled_RV, index), [sampling[i] for i in cut])
        weights_RV.masked_fill_(scaled_RV < floor_R1, 0)
    sums_RV = weights_RV.cumsum(-1)
    total_R1 = sums_RV[:, -1:]
    uniform_R1 = _tensor([[u] for u in uniforms], torch.float64, device)
    # The product can round up to the total, which no token's sum exceeds.
    target_R1 = torch.minimum((uniform_R1 * total_R1).to(torch.int64), total_R1 - 1)
    tokens_R1 = torch.searchsorted(sums_RV, target_R1, right=True).clamp_(0, logits_RV.shape[1] - 1)
    return tokens_R1[:, 0], top_R1[:, 0].isfinite()


def _weights(scaled_RV: Tensor) -> Tensor:
    """Probabilities relative to the most likely token's, as int64 multiples of 2**-40."""
    return scaled_RV.exp().mul_(_ONE).to(torch.int64)


def _floor(scaled_CV: Tensor, sampling: Sequence[RowSampling]) -> Tensor:
    """The lowest scaled logit that survives min_p, then top_k, then top_p, [C, 1]; tokens equal to it all survive."""
    device, vocab_size = scaled_CV.device, scaled_CV.shape[1]
    floor_C1 = _tensor([[math.log(s.min_p) if s.min_p > 0 else -math.inf] for s in sampling], torch.float32, device)
    ranked = [i for i, s in enumerate(sampling) if 0 < s.top_k < vocab_size or s.top_p < 1]
    if not ranked:
        return floor_C1
    index = _tensor(ranked, torch.int64, device)
    top_k_C1 = _tensor([[min(sampling[i].top_k or vocab_size, vocab_size)] for i in ranked], torch.int64, device)
    top_p_C1 = _tensor([[sampling[i].top_p] for i in ranked], torch.float64, device)
    # Negated, the most likely token comes first in ascending order, which is what searchsorted needs.
    negated_CV = _sort(_take(scaled_CV, index).neg())
    lowest_C1 = torch.maximum(floor_C1[index], -negated_CV.gather(1, top_k_C1 - 1))
    count_C1 = torch.searchsorted(negated_CV, -lowest_C1, right=True).clamp_(min=1)
    sorted_CV = negated_CV.neg_()
    sums_CV = _weights(sorted_CV).cumsum(-1)
    # The nucleus ends with the token that reaches top_p of the survivors' mass.
    mass_C1 = (sums_CV.gather(1, count_C1 - 1) * top_p_C1).ceil().to(torch.int64)
    last_C1 = torch.minimum(torch.searchsorted(sums_CV, mass_C1), count_C1 - 1)
    floor_C1[index] = torch.maximum(lowest_C1, sorted_CV.gather(1, last_C1))
    return floor_C1


def _sort(x_CV: Tensor) -> Tensor:
    if x_CV.device.type != "cpu":
        return x_CV.sort(-1).values
    # NumPy sorts floats with AVX-512, AVX2 or NEON: 0.15 ms for 49,152 of them, torch.sort 3.6 ms, torch.topk(512) 0.3.
    return torch.from_numpy(np.sort(x_CV.numpy(), axis=-1))


def _tensor(
    values: Sequence[int] | Sequence[float] | Sequence[list[float]] | Sequence[list[int]],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    # Pinned, because a copy to a GPU from other memory makes the host wait for everything before it.
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _take(x_BV: Tensor, index: Tensor) -> Tensor:
    """The rows of ``index``, which is increasing; no copy when that is all of them."""
    return x_BV if len(index) == len(x_BV) else x_BV[index]


def _has_penalties(s: RowSampling) -> bool:
    return s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0


def _truncates(s: RowSampling, vocab_size: int) -> bool:
    return s.min_p > 0 or 0 < s.top_k < vocab_size or s.top_p < 1


_U32 = 0xFFFFFFFF


def _philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & _U32, p0 >> 32 ^ c3 ^ k1, p0 & _U32
        k0, k1 = k0 + 0x9E3779B9 & _U32, k1 + 0xBB67AE85 & _U32
    return c0, c1, c2, c3
