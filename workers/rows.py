"""The rows of a shard: their tokens, block tables and lengths, and the steps over them."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwise.workers.model.attention import AttentionBatch
from headwise.workers.model.model import StepInput
from headwise.workers.plan import RowAdmit, StepPlan
from headwise.workers.upload import upload, upload_together

Ints: TypeAlias = "NDArray[np.int64]"


class Rows:
    """Every rank applies the same plans in the same order, so their rows are always alike.

    What a step needs of its rows is looked up in arrays, and the block tables of a step that has the same rows as the
    one before are kept.

    Attributes:
        tokens_RL: int64, on the device: the tokens of every row.
    """

    def __init__(self, block_size: int, max_num_seqs: int, max_model_len: int, device: torch.device) -> None:
        self._block_size, self._device = block_size, device
        # A token more than the model's length: the last one sampled is stored, never computed.
        self.tokens_RL = torch.zeros((max_num_seqs, max_model_len + 1), dtype=torch.int64, device=device)
        self._block_table_RN = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self._num_blocks_R = np.zeros(max_num_seqs, np.int64)
        self._length_R = np.zeros(max_num_seqs, np.int64)
        self._computed_R = np.zeros(max_num_seqs, np.int64)
        self._prompt_len_R = np.zeros(max_num_seqs, np.int64)
        self._tabled_B = np.empty(0, np.int64)
        self._tables_BN = np.empty((0, 0), np.int32)

    def apply(self, plan: StepPlan) -> None:
        """Drops and admits rows, and appends blocks.

        Raises:
            RuntimeError: an admitted row is taken.
        """
        for row in plan.drops:
            self._length_R[row] = 0
        for admit in plan.admits:
            self._admit(admit)
        for row, block in plan.appends:
            self._block_table_RN[row, self._num_blocks_R[row]] = block
            self._num_blocks_R[row] += 1
        if plan.admits or plan.appends:
            self._tabled_B = np.empty(0, np.int64)

    def build(self, rows_B: Ints, counts_B: Ints, bucket: int) -> StepInput:
        """The step that computes so many tokens of these rows, of each from the first one without KV; they count as
        computed from now on.

        Args:
            bucket: as in the plan.

        Raises:
            RuntimeError: a row does not have so many tokens, or no blocks for them.
        """
        context_B = self._computed_R[rows_B] + counts_B
        lengths_B = self._length_R[rows_B]
        if (context_B > lengths_B).any() or (counts_B < 1).any():
            raise RuntimeError(f"rows {rows_B.tolist()} cannot compute {counts_B.tolist()} tokens")
        if (context_B > self._num_blocks_R[rows_B] * self._block_size).any():
            raise RuntimeError(f"rows {rows_B.tolist()} lack blocks for {context_B.tolist()} tokens")
        stops_B = np.cumsum(counts_B)
        if stops_B[-1] == len(rows_B):  # each of one token
            row_T, position_T = rows_B, context_B - 1
        else:
            row_T = np.repeat(rows_B, counts_B)
            position_T = np.arange(stops_B[-1]) + np.repeat(context_B - stops_B, counts_B)
        block_T, offset_T = np.divmod(position_T, self._block_size)
        slot_T = self._block_table_RN[row_T, block_T] * np.int64(self._block_size) + offset_T
        self._computed_R[rows_B] = context_B
        return StepInput(
            tokens_RL=self.tokens_RL,
            rows_T=row_T,
            positions_T=position_T,
            slots_T=slot_T,
            logit_tokens_B=stops_B[context_B == lengths_B] - 1,
            attention=AttentionBatch(
                query_starts_B1=np.concatenate(([0], stops_B)).astype(np.int32),
                context_lens_B=context_B.astype(np.int32),
                block_tables_BN=self._tables(rows_B),
            ),
            bucket=bucket,
        )

    def whole(self, rows_B: Ints) -> Ints:
        """Those of the rows whose last known token is computed: they sample the next one."""
        found_B: Ints = rows_B[self._computed_R[rows_B] == self._length_R[rows_B]]
        return found_B

    def lengths(self, rows_B: Ints) -> tuple[Ints, Ints]:
        """Of each row, how many tokens it has, and how many of them were generated."""
        length_B = self._length_R[rows_B]
        return length_B, length_B - self._prompt_len_R[rows_B]

    def store(self, rows_B: Ints, tokens_B: Tensor) -> None:
        """Appends a token, on the device, to each of the rows."""
        rows, lengths = upload_together([rows_B, self._length_R[rows_B]], self._device)
        self.tokens_RL[rows, lengths] = tokens_B
        self._length_R[rows_B] += 1

    def holds(self, rows_B: Ints, token: int) -> bool:
        """Whether one of the rows has this token."""
        return any(bool((self.tokens_RL[row, : self._length_R[row]] == token).any()) for row in rows_B)

    def _admit(self, admit: RowAdmit) -> None:
        row, length = admit.row, len(admit.token_ids)
        if self._length_R[row]:
            raise RuntimeError(f"row {row} is taken")
        self.tokens_RL[row, :length] = upload(np.array(admit.token_ids, np.int64), self._device)
        self._block_table_RN[row, : len(admit.block_ids)] = admit.block_ids
        self._num_blocks_R[row] = len(admit.block_ids)
        self._length_R[row], self._computed_R[row] = length, admit.num_computed
        self._prompt_len_R[row] = admit.prompt_len

    def _tables(self, rows_B: Ints) -> NDArray[np.int32]:
        if not np.array_equal(rows_B, self._tabled_B):
            self._tabled_B = rows_B
            self._tables_BN = self._block_table_RN[rows_B, : self._num_blocks_R[rows_B].max()]
        return self._tables_BN
