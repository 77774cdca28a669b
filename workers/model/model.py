"""What a shard's model looks like to the runner, on whatever device it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwise.workers.kv.cache import KVCache
from headwise.workers.model.attention import AttentionBatch
from headwise.workers.model.model_config import ModelConfig, rope_inv_freq


@dataclass(slots=True, eq=False)
class StepInput:
    """The T tokens of a step. They are on the model's device, everything about them is in host memory.

    Attributes:
        tokens_RL: int64, on the model's device: the tokens of every row of the shard.
        rows_T, positions_T: int64; the step's token t is tokens_RL[rows[t], positions[t]].
        slots_T: int64, block * block_size + offset: where each token's K and V are written.
        logit_tokens_B: int64, the tokens of the step (indices into T) whose logits are wanted.
        attention: the rows as attention sees them.
        bucket: see :class:`~headwise.workers.plan.StepPlan`; 0 pads nothing.
    """

    tokens_RL: Tensor
    rows_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]
    slots_T: NDArray[np.int64]
    logit_tokens_B: NDArray[np.int64]
    attention: AttentionBatch
    bucket: int = 0


class Model(Protocol):
    """One rank's part of the model; every rank runs the same calls in the same order.

    Attributes:
        nbytes: memory of the weights, in bytes, packed copies included.
    """

    nbytes: int

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time by part since the start; empty where nothing measures it."""

    def attach(self, cache: KVCache) -> None:
        """Takes the KV memory that steps are to write to and read; called before the first step.

        Raises:
            InvalidValueError: the model's attention cannot work on this memory.
        """

    def forward(self, step: StepInput) -> Tensor:
        """Computes a step and writes its KV.

        Returns:
            ``[B, V]`` float32: this rank's vocabulary rows of the logits of ``step.logit_tokens_B``. Good until the
            next step.
        """

    def capture(self, bucket: int, tokens_RL: Tensor) -> None:
        """Makes the graph of decode steps that are padded to so many rows, where the model has graphs; all ranks do it
        together.

        Args:
            tokens_RL: that of every step from now on.
        """

    def detach(self) -> None:
        """Gives up the KV memory and all that steps have left on the device, before the collectives are closed: a graph
        that NCCL's operations are in must be gone before their group is, or the process hangs in its end. Other KV
        memory may be attached then. Idempotent."""


def rope_tables(config: ModelConfig, max_model_len: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, ``[max_model_len, D/2]`` each, float32."""
    inv_freq_D = torch.from_numpy(rope_inv_freq(config.rope, config.head_dim))
    angles_LD = torch.arange(max_model_len, dtype=torch.float32)[:, None] * inv_freq_D[None, :]
    return angles_LD.cos(), angles_LD.sin()
