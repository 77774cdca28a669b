"""What is lost where keys and values are kept in fewer bits: the model's logits against those with float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from torch import Tensor

from headwise.runtime.bench.perplexity import losses_of
from headwise.runtime.bench.scorer import CHUNK_TOKENS, ScoredModel, Scorer

EXACT = "float32"
"""What the others are compared with."""

PROMPT_TOKENS = 64
NEW_TOKENS = 64

Progress = Callable[[int], object]


@dataclass(slots=True)
class KvError:
    """Of one kv_dtype.

    Attributes:
        divergences: by token of a text, the Kullback-Leibler divergence of what the model expects next from what it
            expects with EXACT: in nats.
        losses: see :mod:`~headwise.runtime.bench.perplexity`.
        regrets: of the tokens of a text after which another next one is the most likely: by how much it is less likely
            with EXACT than the most likely one there, in nats. Small ones are near ties, which any change may turn.
        greedy_agreed: of the tokens that are generated with EXACT, for how many the most likely one is the same, given
            the same tokens before it.
        greedy_same: by prompt, how many tokens are generated until one differs.
    """

    bytes_per_token: int
    divergences: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    regrets: list[float] = field(default_factory=list)
    greedy_agreed: int = 0
    greedy_same: list[int] = field(default_factory=list)

    def result(self) -> dict[str, Any]:
        tokens, prompts = len(self.divergences), len(self.greedy_same)
        found: dict[str, Any] = {
            "bytes_per_token": self.bytes_per_token,
            "tokens": tokens,
            "kl_mean": sum(self.divergences) / tokens,
            "kl_max": max(self.divergences),
            "agreement": 1 - len(self.regrets) / tokens,
            "regret_median": median(self.regrets) if self.regrets else 0.0,
            "regret_max": max(self.regrets, default=0.0),
            "perplexity": math.exp(sum(self.losses) / len(self.losses)),
        }
        if prompts:
            found["greedy_agreement"] = self.greedy_agreed / (prompts * NEW_TOKENS)
            found["greedy_prompts"] = prompts
            found["greedy_same_prompts"] = sum(same == NEW_TOKENS for same in self.greedy_same)
            found["greedy_same_tokens"] = sum(self.greedy_same) / prompts
        return found


def kv_errors(
    model: ScoredModel, kv_dtypes: Sequence[str], token_ids: Sequence[int], prompts: int, progress: Progress
) -> dict[str, KvError]:
    """
    Args:
        kv_dtypes: each once.
        token_ids: a text, within the model's length.
        prompts: so many pieces of it are continued, greedily.
        progress: gets how many more tokens are computed.
    """
    most = max(len(token_ids), PROMPT_TOKENS + NEW_TOKENS)
    exact = Scorer(model, "dense", EXACT, most)
    scorers = {name: Scorer(model, "dense", name, most) for name in kv_dtypes}
    errors = {name: KvError(scorer.bytes_per_token) for name, scorer in scorers.items()}
    _read(exact, scorers, errors, token_ids, progress)
    for prompt in pieces(token_ids, prompts):
        new = _generate(exact, prompt)
        progress(len(prompt) + NEW_TOKENS)
        for name, scorer in scorers.items():
            same = [one == other for one, other in zip(_expected(scorer, prompt, new), new, strict=True)]
            errors[name].greedy_agreed += sum(same)
            errors[name].greedy_same.append(same.index(False) if False in same else NEW_TOKENS)
            progress(len(prompt) + NEW_TOKENS)
    return errors


def work(kv_dtypes: int, tokens: int, prompts: int) -> int:
    """How many tokens :func:`kv_errors` computes."""
    return (kv_dtypes + 1) * (tokens + prompts * (PROMPT_TOKENS + NEW_TOKENS))


def pieces(token_ids: Sequence[int], count: int) -> list[list[int]]:
    """Pieces of PROMPT_TOKENS, from evenly over the text."""
    last = len(token_ids) - PROMPT_TOKENS
    starts = [last * index // max(1, count - 1) for index in range(count)]
    return [list(token_ids[start : start + PROMPT_TOKENS]) for start in starts]


def divergences(exact_TV: Tensor, other_TV: Tensor) -> list[float]:
    """Of each row of log-probabilities from that of ``exact_TV``, in nats; not below 0, where rounding puts some."""
    found: list[float] = (exact_TV.exp() * (exact_TV - other_TV)).sum(-1).clamp(min=0).tolist()
    return found


def regrets(exact_TV: Tensor, other_TV: Tensor) -> list[float]:
    """Of the rows whose best number is another in ``other_TV``: how far it is below the best one in ``exact_TV``."""
    best_T, other_T = exact_TV.argmax(-1), other_TV.argmax(-1)
    lost_T = (exact_TV.gather(1, best_T[:, None]) - exact_TV.gather(1, other_T[:, None]))[:, 0]
    found: list[float] = lost_T[best_T != other_T].tolist()
    return found


def _read(
    exact: Scorer,
    scorers: dict[str, Scorer],
    errors: dict[str, KvError],
    token_ids: Sequence[int],
    progress: Progress,
) -> None:
    for scorer in (exact, *scorers.values()):
        scorer.start(token_ids)
    for start in range(0, len(token_ids), CHUNK_TOKENS):
        count = min(CHUNK_TOKENS, len(token_ids) - start)
        true = token_ids[start + 1 : start + count + 1]
        exact_TV = exact.advance(count).log_softmax(-1)
        progress(count)
        for name, scorer in scorers.items():
            logits_TV = scorer.advance(count)
            error = errors[name]
            error.losses += losses_of(logits_TV, true)
            error.regrets += regrets(exact_TV, logits_TV)
            error.divergences += divergences(exact_TV, logits_TV.log_softmax(-1))
            progress(count)


def _generate(scorer: Scorer, prompt: list[int]) -> list[int]:
    """The most likely tokens after a prompt."""
    scorer.start(prompt)
    new = [int(scorer.advance(len(prompt), last_only=True).argmax())]
    while len(new) < NEW_TOKENS:
        scorer.append(new[-1])
        new.append(int(scorer.advance(1).argmax()))
    return new


def _expected(scorer: Scorer, prompt: list[int], new: list[int]) -> list[int]:
    """The most likely token at the place of each of the new ones, given those before it."""
    scorer.start(prompt + new[:-1])
    scorer.advance(len(prompt) - 1, last_only=True)
    found: list[int] = scorer.advance(len(new)).argmax(-1).tolist()
    return found
