"""What a shard's model looks like to the runner, on whatever device it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from headwise.workers.model.attention import AttentionBackend, AttentionBatch
from headwise.workers.model.model_config import ModelConfig, rope_inv_freq


@dataclass(slots=True)
class StepInput:
    """The tokens of a step.

    Attributes:
        token_ids_T: int64.
        positions_T: int64, each token's index in its row.
        logit_tokens_B: int64, the tokens of the step (indices into T) whose logits are wanted.
        attention: the rows as attention sees them.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    logit_tokens_B: Tensor
    attention: AttentionBatch


class Model(Protocol):
    """One rank's part of the model; every rank runs the same calls in the same order.

    Attributes:
        nbytes: memory of the weights, in bytes, packed copies included.
    """

    nbytes: int

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time by part since the start; empty where nothing measures it."""

    def forward(self, step: StepInput, attention: AttentionBackend) -> Tensor:
        """Computes a step and writes its KV.

        Returns:
            ``[B, V]`` float32: this rank's vocabulary rows of the logits of ``step.logit_tokens_B``. Good until the
            next step.
        """


def rope_tables(config: ModelConfig, max_model_len: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, ``[max_model_len, D/2]`` each, float32."""
    inv_freq_D = torch.from_numpy(rope_inv_freq(config.rope, config.head_dim))
    angles_LD = torch.arange(max_model_len, dtype=torch.float32)[:, None] * inv_freq_D[None, :]
    return angles_LD.cos(), angles_LD.sin()
