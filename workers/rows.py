"""The rows of a shard: their tokens, block tables and lengths, and the steps over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwise.workers.kv.policy import DENSE, Reach
from headwise.workers.model.attention import AttentionBatch
from headwise.workers.model.model import StepInput
from headwise.workers.plan import RowAdmit, StepPlan
from headwise.workers.row_blocks import RowBlocks
from headwise.workers.upload import upload, upload_together

Ints: TypeAlias = "NDArray[np.int64]"


class Rows:
    """Every rank applies the same plans in the same order, so their rows are always alike.

    What a step needs of its rows is looked up in arrays, and the block tables of a step that has the same rows as the
    one before are kept.

    Attributes:
        tokens_RL: int64, on the device: the last tokens of every row, that of position p at p % L.
    """

    def __init__(
        self,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        device: torch.device,
        reaches: Sequence[Reach] = (DENSE,),
        max_num_batched_tokens: int = 0,
    ) -> None:
        """
        Args:
            max_model_len: most tokens of a row, unless every reach has a window: then a row has no end.
            reaches: of the groups of the KV policy.
            max_num_batched_tokens: of a step.
        """
        self._block_size, self._device = block_size, device
        self._endless = all(reach.window is not None for reach in reaches)
        most = None if self._endless else max_model_len
        # A token more than the model's length: the last one sampled is stored, never computed. A step may compute more
        # of a long text than a prompt may have.
        width = max(max_model_len, max_num_batched_tokens if self._endless else 0) + 1
        self.tokens_RL = torch.zeros((max_num_seqs, width), dtype=torch.int64, device=device)
        self._groups = [RowBlocks(reach, block_size, max_num_seqs, most, max_num_batched_tokens) for reach in reaches]
        self._texts: dict[int, _Text] = {}
        self._length_R = np.zeros(max_num_seqs, np.int64)
        self._computed_R = np.zeros(max_num_seqs, np.int64)
        self._prompt_len_R = np.zeros(max_num_seqs, np.int64)
        self._forget_tables()

    def apply(self, plan: StepPlan) -> None:
        """Drops and admits rows, and appends blocks.

        Raises:
            RuntimeError: an admitted row is taken, or does not have its first blocks, or has too many tokens.
        """
        for row in plan.drops:
            self._length_R[row] = 0
            self._texts.pop(row, None)
            for group in self._groups:
                group.drop(row)
        for admit in plan.admits:
            self._admit(admit)
        for row, block in plan.appends:
            self._groups[0].append(row, block, int(self._computed_R[row]))
        for number, row, block in plan.group_appends:
            self._groups[number].append(row, block, int(self._computed_R[row]))
        if plan.admits or plan.appends or plan.group_appends:
            self._forget_tables()

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
        for group in self._groups:
            if group.lack(rows_B, context_B):
                self._take_waiting_blocks(group, rows_B, context_B)
        if self._texts:
            self._upload_texts(rows_B, context_B)
        starts_B1 = np.zeros(len(rows_B) + 1, np.int64)
        stops_B = np.cumsum(counts_B, out=starts_B1[1:])
        if stops_B[-1] == len(rows_B):  # each of one token
            row_T, position_T = rows_B, context_B - 1
        else:
            row_T = np.repeat(rows_B, counts_B)
            position_T = np.arange(stops_B[-1]) + np.repeat(context_B - stops_B, counts_B)
        block_T, offset_T = np.divmod(position_T, self._block_size)
        slots = [group.slots(row_T, block_T, offset_T) for group in self._groups]
        self._computed_R[rows_B] = context_B
        self._find_tables(rows_B)
        return StepInput(
            tokens_RL=self.tokens_RL,
            rows_T=row_T,
            positions_T=position_T,
            slots_T=slots[0] if len(slots) == 1 else np.concatenate(slots),
            logit_tokens_B=stops_B[context_B == lengths_B] - 1,
            attention=AttentionBatch(
                query_starts_B1=starts_B1.astype(np.int32),
                context_lens_B=context_B.astype(np.int32),
                block_tables_BN=self._tables_BN,
                shifts_B=self._shifts_B,
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
        rows, columns = upload_together([rows_B, self._length_R[rows_B] % self._width], self._device)
        self.tokens_RL[rows, columns] = tokens_B
        self._length_R[rows_B] += 1

    def holds(self, rows_B: Ints, token: int) -> bool:
        """Whether one of the rows has this token, of an endless row among the last ones."""
        rows = rows_B.tolist()
        waiting = any(token in self._texts[row].tokens for row in rows if row in self._texts)
        return waiting or any(bool((self.tokens_RL[row, : self._length_R[row]] == token).any()) for row in rows)

    @property
    def _width(self) -> int:
        return self.tokens_RL.shape[1]

    def _admit(self, admit: RowAdmit) -> None:
        row, length = admit.row, len(admit.token_ids)
        if self._length_R[row]:
            raise RuntimeError(f"row {row} is taken")
        if length > self._width and not self._endless:
            raise RuntimeError(f"row {row} cannot have {length} tokens, only {self._width}")
        tables = (admit.block_ids, *admit.other_block_ids)
        if len(tables) != len(self._groups):
            raise RuntimeError(f"row {row} has blocks in {len(tables)} groups, of {len(self._groups)}")
        for group, blocks in zip(self._groups, tables, strict=True):
            group.admit(row, blocks, admit.num_computed)
        self._upload(row, _Text(np.array(admit.token_ids, np.int64)), self._width)
        self._length_R[row], self._computed_R[row] = length, admit.num_computed
        self._prompt_len_R[row] = admit.prompt_len

    def _upload_texts(self, rows_B: Ints, context_B: Ints) -> None:
        """Sees to it that so many tokens of the rows are on the device, or were and are computed."""
        for row, context in zip(rows_B.tolist(), context_B.tolist(), strict=True):
            text = self._texts.get(row)
            if text is not None and text.num_uploaded < context:
                self._upload(row, text, int(self._computed_R[row]) + self._width)

    def _upload(self, row: int, text: _Text, stop: int) -> None:
        """Uploads the tokens before a position; those that are one length of the ring before it must be computed."""
        first, stop = text.num_uploaded, min(stop, len(text.tokens))
        while first < stop:
            column = first % self._width
            some = text.tokens[first : min(stop, first + self._width - column)]
            self.tokens_RL[row, column : column + len(some)] = upload(some, self._device)
            first += len(some)
        text.num_uploaded = stop
        if stop < len(text.tokens):
            self._texts[row] = text
        else:
            self._texts.pop(row, None)

    def _take_waiting_blocks(self, group: RowBlocks, rows_B: Ints, context_B: Ints) -> None:
        for row in rows_B.tolist():
            group.make_room(row, int(self._computed_R[row]))
        self._forget_tables()
        if group.lack(rows_B, context_B):
            raise RuntimeError(f"rows {rows_B.tolist()} lack blocks for {context_B.tolist()} tokens")

    def _forget_tables(self) -> None:
        self._tabled_B = np.empty(0, np.int64)
        self._tables_BN = np.empty((0, 0), np.int32)
        self._shifts_B: Ints | None = None

    def _find_tables(self, rows_B: Ints) -> None:
        if np.array_equal(rows_B, self._tabled_B):
            return
        self._tabled_B = rows_B
        tables = [group.tables(rows_B) for group in self._groups]
        shift_B = np.concatenate([group.shifts(rows_B) for group in self._groups])
        self._shifts_B = shift_B if shift_B.any() else None
        self._tables_BN = tables[0] if len(tables) == 1 else _stacked(tables)


@dataclass(slots=True)
class _Text:
    """The text of an admitted row, of which the device has only what it has room for and needs."""

    tokens: Ints
    num_uploaded: int = 0


def _stacked(tables: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    """Tables of equally many rows below each other, padded to the widest."""
    width = max(table_BN.shape[1] for table_BN in tables)
    return np.concatenate([np.pad(table_BN, ((0, 0), (0, width - table_BN.shape[1]))) for table_BN in tables])
