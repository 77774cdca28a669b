"""How rows are sampled, as records of an array: what a step asks about all of its rows takes no loop."""

from __future__ import annotations

import math

import numpy as np

from headwise.workers.plan import RowSampling

GREEDY_TEMPERATURE = 1e-5
"""A temperature below this is greedy, as in vLLM."""

SETTINGS = np.dtype(
    [
        ("temperature", np.float32),
        ("seed", np.uint64),
        ("top_k", np.int64),  # the vocabulary's size is off
        ("top_p", np.float64),
        ("log_min_p", np.float32),
        ("repetition_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("num_logprobs", np.int64),
        ("min_tokens", np.int64),  # 0 where no token would end the request
        ("draws", np.bool_),  # not greedy
        ("truncates", np.bool_),  # by min_p, top_k or top_p
        ("ranks", np.bool_),  # by top_k or top_p
        ("biased", np.bool_),
        ("penalised", np.bool_),
        ("constrained", np.bool_),  # by a grammar that this rank follows
        ("plain", np.bool_),  # an argmax is enough, once min_tokens are there
    ],
    align=True,
)
"""A row's :class:`~headwise.workers.plan.RowSampling`, and what follows from it."""


def record_of(s: RowSampling, vocab_size: int, constrained: bool) -> np.void:
    """The record of a row; ``constrained``: whether this rank follows its grammar."""
    records = np.zeros(1, SETTINGS)
    draws = s.temperature >= GREEDY_TEMPERATURE
    ranks = 0 < s.top_k < vocab_size or s.top_p < 1
    biased, penalised = bool(s.logit_bias), has_penalties(s)
    records[0] = (
        s.temperature,
        s.seed % 2**64,
        min(s.top_k or vocab_size, vocab_size),
        s.top_p,
        math.log(s.min_p) if s.min_p > 0 else -math.inf,
        s.repetition_penalty,
        s.presence_penalty,
        s.frequency_penalty,
        s.num_logprobs,
        s.min_tokens if s.stop_token_ids else 0,
        draws,
        ranks or s.min_p > 0,
        ranks,
        biased,
        penalised,
        constrained,
        not (draws or biased or penalised or s.grammar or s.num_logprobs >= 0),
    )
    record: np.void = records[0]
    return record


def has_penalties(s: RowSampling) -> bool:
    return s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0
