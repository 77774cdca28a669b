"""How well a model reads a text under a KV policy: the loss of every token, and what the row took meanwhile.

The *loss* of a token is minus the logarithm of how likely the model held it, told all true tokens before it. The
perplexity of a stretch is the exponential of its mean loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median, pvariance

import torch
from torch import Tensor

from headwise.runtime.bench.scorer import CHUNK_TOKENS, ScoredModel, Scorer

DECODED = 8
"""At the end of each stretch so many tokens are computed one by one, as decoding does, and timed."""

Progress = Callable[[int], object]


@dataclass(slots=True)
class Reading:
    """Of a text under one policy.

    Attributes:
        losses: by position in the text; the first token, which nothing comes before, has none.
        kv_bytes: by how many tokens are computed, of the row's keys and values.
        token_ms: by how many tokens are computed, what it takes to compute one more: the median of some.
        bytes_per_token: of each token that is kept.
    """

    losses: dict[int, float] = field(default_factory=dict)
    kv_bytes: dict[int, int] = field(default_factory=dict)
    token_ms: dict[int, float] = field(default_factory=dict)
    bytes_per_token: int = 0

    def perplexity(self, positions: Iterable[int], control: Reading | None = None) -> float | None:
        """Of those of the positions that have a loss; None if none has.

        Args:
            control: where this is of a sample of the positions only, a reading of all of them. The difference to it at
                the sample is added to its mean: losses differ far more from token to token than from policy to policy,
                so that comes much closer than the mean of the sample (a *control variate*).
        """
        places = list(positions)
        found = [position for position in places if position in self.losses]
        if not found:
            return None
        loss = sum(self.losses[position] for position in found) / len(found)
        if control is not None:
            known = [position for position in places if position in control.losses]
            loss += sum(control.losses[position] for position in known) / len(known)
            loss -= sum(control.losses[position] for position in found) / len(found)
        return math.exp(loss)

    def distance(self, other: Reading) -> float:
        """The variance of the difference of the losses, at the positions of this reading; infinite where the other one
        does not have them all."""
        if not self.losses.keys() <= other.losses.keys():
            return math.inf
        return pvariance(loss - other.losses[position] for position, loss in self.losses.items())


def read(
    model: ScoredModel, policy: str, kv_dtype: str, token_ids: Sequence[int], stretch: int, progress: Progress
) -> Reading:
    """Reads a text once.

    Args:
        policy: as of an engine.
        stretch: tokens after which the time of decoding is measured; more than DECODED.
        progress: gets how many more tokens are computed.
    """
    scorer = Scorer(model, policy, kv_dtype, len(token_ids))
    reading = Reading(bytes_per_token=scorer.bytes_per_token)
    scorer.start(token_ids)
    seconds: list[float] = []
    for count in _steps(len(token_ids), stretch):
        first = scorer.num_computed + 1  # the token that the step's first one predicts
        losses = losses_of(scorer.advance(count), token_ids[first : first + count])
        reading.losses.update(enumerate(losses, first))
        if count == 1:
            seconds.append(scorer.step_seconds)
        else:
            reading.kv_bytes[scorer.num_computed] = scorer.kv_bytes
        if len(seconds) == DECODED:
            reading.token_ms[scorer.num_computed] = 1e3 * median(seconds)
            seconds.clear()
        progress(count)
    return reading


def recompute(
    model: ScoredModel, last: int, kv_dtype: str, token_ids: Sequence[int], samples: Sequence[int], progress: Progress
) -> Reading:
    """Reads tokens at some positions, each from the ``last`` tokens before it alone, computed anew from position 0 on:
    a sliding window with recomputation, which the others' quality is compared with.

    Args:
        samples: positions, from 1 on.
    """
    scorer = Scorer(model, "dense", kv_dtype, last)
    reading = Reading(bytes_per_token=scorer.bytes_per_token)
    for position in samples:
        before = token_ids[max(0, position - last) : position]
        scorer.start(before)
        seconds = 0.0
        for start in range(0, len(before), CHUNK_TOKENS):
            logits_1V = scorer.advance(min(CHUNK_TOKENS, len(before) - start), last_only=True)
            seconds += scorer.step_seconds
        [reading.losses[position]] = losses_of(logits_1V, [token_ids[position]])
        reading.kv_bytes[position] = scorer.kv_bytes
        reading.token_ms[position] = 1e3 * seconds
        progress(len(before))
    return reading


def losses_of(logits_TV: Tensor, token_ids: Sequence[int]) -> list[float]:
    """Args: ``token_ids``: what came true; where the text ends, one fewer than there are logits."""
    targets_T1 = torch.tensor(token_ids, device=logits_TV.device, dtype=torch.int64)[:, None]
    logits_TV = logits_TV[: len(token_ids)]
    losses: list[float] = (logits_TV.logsumexp(-1) - logits_TV.gather(1, targets_T1)[:, 0]).tolist()
    return losses


def _steps(num_tokens: int, stretch: int) -> Iterator[int]:
    """How many tokens each step computes."""
    for start in range(0, num_tokens, stretch):
        whole = min(stretch, num_tokens - start)
        single = DECODED if whole == stretch else 0
        for done in range(0, whole - single, CHUNK_TOKENS):
            yield min(CHUNK_TOKENS, whole - single - done)
        yield from [1] * single
