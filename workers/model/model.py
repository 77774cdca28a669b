"""What a shard's model looks like to the runner, on whatever device it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwise.workers.kv.cache import KVCache
from headwise.workers.kv.policy import KvPolicy
from headwise.workers.model.attention import AttentionBatch
from headwise.workers.model.model_config import ModelConfig, rope_inv_freq


@dataclass(slots=True, eq=False)
class StepInput:
    """The T tokens of a step. They are on the model's device, everything about them is in host memory.

    Attributes:
        tokens_RL: int64, on the model's device: the tokens of every row of the shard.
        rows_T, positions_T: int64; the step's token t is tokens_RL[rows[t], positions[t] % the tokens' length]. A
            position counts from the start of the text.
        slots_T: int64 [G * T], block * block_size + offset: where the K and V of token t are written in group g of the
            cache's policy is at g * T + t.
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


class RopeTable:
    """cos and sin of positions for the rotary embedding, float32, in host memory.

    Under the dense policy the angles are transformers', bit for bit: float32 products, which are off by up to 1e-4 rad
    at position 2,000 and by 0.002 at 50,000. Any other policy counts on distances, whatever the positions, and has
    angles in float64. Its text may go on beyond the table: further rows are made step by step, and take no memory.

    Attributes:
        cos_LD, sin_LD: [L, D/2]; L is ``max_model_len``, or the longest span of a reach with sinks if that is more.
    """

    def __init__(self, config: ModelConfig, max_model_len: int, policy: KvPolicy | None = None) -> None:
        spans = [reach.span or 0 for reach in policy.reaches if reach.sinks] if policy is not None else []
        exact = policy is not None and not policy.plain
        self._dtype = np.float64 if exact else np.float32
        self._inv_freq_D = rope_inv_freq(config.rope, config.head_dim)
        self.cos_LD, self.sin_LD = self._turn(np.arange(max(max_model_len, *spans, 1)))

    def holds(self, positions_T: NDArray[np.int64]) -> bool:
        """Whether all of the positions are in the table."""
        return int(positions_T.max(initial=0)) < len(self.cos_LD)

    def rows(self, positions_T: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """cos_TD and sin_TD of any positions, equal to the table's where it has them."""
        if self.holds(positions_T):
            known_T = torch.from_numpy(positions_T)
            return self.cos_LD[known_T], self.sin_LD[known_T]
        return self._turn(positions_T)

    def _turn(self, positions_T: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        angles_TD = torch.from_numpy(positions_T[:, None].astype(self._dtype) * self._inv_freq_D.astype(self._dtype))
        return angles_TD.cos().float(), angles_TD.sin().float()
