"""Which KV heads look far back: those that do not may keep sinks and a window only (``headwise calibrate``).

The idea is DuoAttention's (Xiao et al., 2024, arXiv 2410.10819), whose *streaming heads* attend to the first tokens and
the last ones, and whose *retrieval heads* to all. DuoAttention learns which are which, by optimising a gate a head on
texts that hide something to be found again. Here no gate is learned: a head's *mass* is the attention that its queries
give to the tokens outside sinks and window, of all they give, and the heads with the least mass are made streaming
heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from headwise.workers.collectives import Solo
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.cache import KVCache
from headwise.workers.kv.policy import Reach
from headwise.workers.model.attention import AttentionBackend, AttentionBatch
from headwise.workers.model.checkpoint import load_shard
from headwise.workers.model.model import StepInput
from headwise.workers.model.model_config import load_model_config
from headwise.workers.model.partition import partition_model
from headwise.workers.reference.llama import Llama
from headwise.workers.reference.ops import ReferenceOps
from headwise.workers.upload import upload

CHUNK_TOKENS = 128
BLOCK_SIZE = 16

Mass: TypeAlias = list[list[float]]
"""By layer and KV head, from 0 to 1."""


def attention_mass(
    model: Path,
    token_ids: Sequence[int],
    reach: Reach,
    device: str = "cpu",
    progress: Callable[[int], object] = lambda tokens: None,
) -> Mass:
    """The mass of each KV head: the mean over its query heads, and over the text's tokens that something is outside of.

    Computed by the reference model in float32, with the attention that the model was trained with. Takes memory for the
    weights, the KV of the text, and the attention weights of one chunk in one layer.

    Args:
        token_ids: a text; no longer than the model's limit.
        reach: sinks and window.
        progress: gets how many more tokens are done.

    Raises:
        InvalidValueError: the text is too long, or so short that all of it is inside.
        CheckpointError, UnsupportedModelError: as of :class:`~headwise.runtime.llm.LLM`.
    """
    config = load_model_config(model)
    check_length(len(token_ids), reach, config.max_position_embeddings)
    [part] = partition_model(config, 1)
    weights = load_shard(model, config, part, torch.float32, torch.device(device))
    llama = Llama(config, part, weights, Solo(), len(token_ids), ReferenceOps(), MassAttention)
    num_blocks = -(-len(token_ids) // BLOCK_SIZE)
    sizes = (config.num_layers, num_blocks, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
    llama.attach(KVCache(*sizes, torch.float32, device))
    attention = llama.attention
    assert isinstance(attention, MassAttention)
    attention.watch(reach, config.sliding_windows)
    tokens_RL = torch.tensor([token_ids], device=device)
    for start in range(0, len(token_ids), CHUNK_TOKENS):
        stop = min(start + CHUNK_TOKENS, len(token_ids))
        llama.forward(_step(tokens_RL, start, stop, num_blocks))
        progress(stop - start)
    return attention.mass()


def check_length(num_tokens: int, reach: Reach, most: int) -> None:
    """
    Raises:
        InvalidValueError: a text of so many tokens cannot be calibrated with; the field is named --tokens.
    """
    if not (reach.span or 0) < num_tokens <= most:
        limit = f"must be more than --sinks and --window together, {reach.span}, and at most the model's length, {most}"
        raise InvalidValueError("--tokens", num_tokens, limit)


def streaming_heads(mass: Mass, share: float) -> list[tuple[int, int]]:
    """The (layer, KV head) of that share of all heads, rounded, with the least mass; of equals, the earlier ones."""
    ranked = sorted((of, layer, head) for layer, row in enumerate(mass) for head, of in enumerate(row))
    return sorted((layer, head) for _, layer, head in ranked[: round(share * len(ranked))])


class MassAttention(AttentionBackend):
    """Attends to everything, and adds up what queries give to the keys outside sinks and window. Of one row."""

    def __init__(self, cache: KVCache, q_starts: tuple[int, ...], scale: float) -> None:
        super().__init__(cache, q_starts, scale)
        sizes = torch.tensor(q_starts).diff()
        self._kv_head_H = torch.repeat_interleave(torch.arange(cache.num_kv_heads), sizes).to(cache.device)
        self._mass_LH = torch.zeros((cache.num_layers, q_starts[-1]), dtype=torch.float64)
        self._queries = 0  # of one layer, that something is outside of

    def watch(self, reach: Reach, windows: Sequence[int | None]) -> None:
        """Call it before the first step.

        Args:
            windows: of each layer, how many tokens a token attends to as the model was trained; None, or empty: all.
        """
        self._reach, self._windows = reach, [*windows] or [None] * self.cache.num_layers

    def mass(self) -> Mass:
        mean_LH = self._mass_LH / max(1, self._queries)
        return torch.stack([mean_LH[:, start:stop].mean(1) for start, stop in pairwise(self.q_starts)], 1).tolist()

    def begin(self, batch: AttentionBatch) -> None:
        [context] = batch.context_lens_B.tolist()
        self._blocks_N = upload(batch.block_tables_BN[0], self.cache.device)
        self._key_C = torch.arange(context, device=self.cache.device)
        self._position_T1 = self._key_C[context - batch.query_starts_B1[1] :, None]
        sinks, window = self._reach.sinks, self._reach.window or 0
        self._outside_TC = (self._key_C >= sinks) & (self._key_C <= self._position_T1 - window)
        self._queries += int(self._outside_TC.any(1).sum())

    def attend(self, layer: int, q_THD: Tensor, q_sinks_THD: Tensor | None = None) -> Tensor:
        k_KCD, v_KCD = self.cache.gather(layer, self._blocks_N, len(self._key_C))
        scores_HTC = q_THD.transpose(0, 1) @ k_KCD[self._kv_head_H].transpose(1, 2) * self.scale
        hidden_TC = self._key_C > self._position_T1
        if (window := self._windows[layer]) is not None:
            hidden_TC = hidden_TC | (self._key_C <= self._position_T1 - window)
        weights_HTC = scores_HTC.masked_fill(hidden_TC, -torch.inf).softmax(-1)
        self._mass_LH[layer] += (weights_HTC * self._outside_TC).sum((1, 2)).double().cpu()
        return (weights_HTC @ v_KCD[self._kv_head_H]).transpose(0, 1).contiguous()


def _step(tokens_RL: Tensor, start: int, stop: int, num_blocks: int) -> StepInput:
    """The text's tokens from ``start`` on, in a cache that has a slot for each."""
    positions_T = np.arange(start, stop)
    return StepInput(
        tokens_RL=tokens_RL,
        rows_T=np.zeros(stop - start, np.int64),
        positions_T=positions_T,
        slots_T=positions_T,
        logit_tokens_B=np.array([stop - start - 1]),
        attention=AttentionBatch(
            query_starts_B1=np.array([0, stop - start], np.int32),
            context_lens_B=np.array([stop], np.int32),
            block_tables_BN=np.arange(num_blocks, dtype=np.int32)[None],
        ),
    )
