"""Penalties on tokens that a row has already: what they need to remember, and the logits that come of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwise.workers.upload import upload_together

Ints: TypeAlias = "NDArray[np.int64]"


class Penalties:
    """Which tokens the prompt holds and how often each was generated, for the rows with a penalty.

    They share two matrices of one slot a row, which double when they are full: a shard whose requests use
    no penalty holds nothing, and one where all do holds 5 bytes a row and token of the vocabulary.
    """

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device) -> None:
        self.max_rows, self.device = max_rows, device
        self._slots: dict[int, int] = {}
        self._slot_R = np.full(max_rows, -1, np.int64)
        self._counts_SV = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self._prompt_SV = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)

    def admit(self, row: int, prompt_token_ids: Sequence[int], generated: Sequence[int]) -> None:
        slot = min(set(range(len(self._slots) + 1)) - set(self._slots.values()))
        if slot == len(self._counts_SV):
            more = min(max(1, slot), self.max_rows - slot)
            self._counts_SV = torch.cat([self._counts_SV, self._counts_SV.new_zeros((more, self._counts_SV.shape[1]))])
            self._prompt_SV = torch.cat([self._prompt_SV, self._prompt_SV.new_zeros((more, self._prompt_SV.shape[1]))])
        both = np.array(prompt_token_ids, np.int64), np.array(generated, np.int64)
        prompt, chosen = upload_together(both, self.device)
        self._prompt_SV[slot].zero_().index_fill_(0, prompt, True)
        self._counts_SV[slot].zero_().index_add_(0, chosen, torch.ones_like(chosen, dtype=torch.int32))
        self._slots[row] = self._slot_R[row] = slot

    def drop(self, row: int) -> None:
        if self._slots.pop(row, None) is not None:
            self._slot_R[row] = -1

    def observe(self, rows_B: Ints, tokens_B: Tensor) -> None:
        """Count the chosen tokens of the rows that have a penalty."""
        if not self._slots:
            return
        slot_B = self._slot_R[rows_B]
        index = np.flatnonzero(slot_B >= 0)
        if len(index):
            slots, at = upload_together([slot_B[index], index], self.device)
            self._counts_SV[slots, tokens_B[at]] += 1

    def apply(self, logits_PV: Tensor, rows_P: Ints, settings_P: NDArray[Any]) -> Tensor:
        """Repetition penalty as in CTRL (Keskar et al., 2019), frequency and presence as in OpenAI's API."""
        values = (settings_P[f"{name}_penalty"][:, None] for name in ("repetition", "frequency", "presence"))
        arrays = [self._slot_R[rows_P], *(np.ascontiguousarray(value) for value in values)]
        slots, repetition, frequency, presence = upload_together(arrays, self.device)
        counts_PV = self._counts_SV[slots]
        generated_PV = counts_PV > 0
        repeated_PV = torch.where(logits_PV > 0, logits_PV / repetition, logits_PV * repetition)
        logits_PV = torch.where(self._prompt_SV[slots] | generated_PV, repeated_PV, logits_PV)
        return logits_PV - frequency * counts_PV - presence * generated_PV
