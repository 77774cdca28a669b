"""Which blocks every row has in one group of the KV policy: a block table a row, and where its tokens go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from headwise.workers.kv.policy import Reach
from headwise.workers.model.attention import PART_KEYS

Ints: TypeAlias = "NDArray[np.int64]"


class RowBlocks:
    """The block tables of one group.

    A row's table has columns for the blocks that its next tokens attend to, not for all of a text that may have no end.
    The *shift* of a row says which: block i of the text is in column i - shift / block_size, but for the blocks of the
    sinks, which stay in the first columns. So a key k of the text is at k - shift, and a sink k at k. The shift grows
    where the table is full. Whenever it is not 0, the row's next token and all after it have a window that begins, at
    its place less the shift, behind the sinks and their blocks.

    Blocks that find no room in a table wait until the row has computed more of its text.
    """

    def __init__(
        self, reach: Reach, block_size: int, max_num_seqs: int, max_num_tokens: int | None, max_num_batched_tokens: int
    ) -> None:
        """
        Args:
            max_num_tokens: of a row; None is any number, for a reach with a window.
            max_num_batched_tokens: of a step.
        """
        self._reach, self._block_size = reach, block_size
        self._unit = math.lcm(PART_KEYS, block_size)
        self._num_sink_blocks = -(-reach.sinks // block_size)
        self._behind_sinks = max(reach.sinks + 1, self._num_sink_blocks * block_size)
        most = [] if max_num_tokens is None else [max_num_tokens]
        if reach.window is not None:
            # A window and a step's tokens, after less than a unit that cannot be shifted out; again a unit and a step,
            # so that a table is not moved for every block.
            most.append(self._behind_sinks + reach.window + 2 * (self._unit + max_num_batched_tokens))
        self._table_RN = np.zeros((max_num_seqs, -(-min(most) // block_size)), np.int32)
        self._stop_R = np.zeros(max_num_seqs, np.int64)  # of the text, the token after the last block in the table
        self._shift_R = np.zeros(max_num_seqs, np.int64)
        self._waiting: dict[int, list[int]] = {}

    def admit(self, row: int, blocks: Sequence[int], num_computed: int) -> None:
        """
        Args:
            blocks: the row's first blocks; -1 where it has none.

        Raises:
            RuntimeError: a block is missing that one of its next tokens attends to.
        """
        first = self._reach.first_key(num_computed) // self._block_size
        ours = np.array(blocks, np.int32)
        held = len(ours) * self._block_size >= num_computed
        if not held or (ours[first:] < 0).any() or (ours[: min(first, self._num_sink_blocks)] < 0).any():
            raise RuntimeError(f"row {row} lacks blocks of its first {num_computed} tokens")
        self._stop_R[row] = self._shift_R[row] = shift = self._most_shift(num_computed)
        sinks, skipped = self._num_sink_blocks, shift // self._block_size
        kept = np.concatenate((ours[:sinks], ours[sinks + skipped :]))
        self._put(row, kept.clip(min=0).tolist())

    def drop(self, row: int) -> None:
        self._waiting.pop(row, None)

    def append(self, row: int, block: int, num_computed: int) -> None:
        """Args: ``num_computed``: how many tokens of the row have their KV."""
        column = self._column(row)
        if column < self._table_RN.shape[1]:  # else blocks wait already, or this one is the first to
            self._table_RN[row, column] = block
            self._stop_R[row] += self._block_size
            return
        self._waiting.setdefault(row, []).append(block)
        self.make_room(row, num_computed)

    def lack(self, rows_B: Ints, num_tokens_B: Ints) -> bool:
        """Whether the table of one of the rows has no blocks for so many tokens."""
        return bool((num_tokens_B > self._stop_R[rows_B]).any())

    def make_room(self, row: int, num_computed: int) -> None:
        """Takes the blocks of a row that wait into its table, as far as there is room.

        Args:
            num_computed: as above.
        """
        blocks = self._waiting.pop(row, None)
        if blocks is None:
            return
        more = self._most_shift(num_computed) - int(self._shift_R[row])
        if more > 0:
            first, stop, moved = self._num_sink_blocks, self._column(row), more // self._block_size
            table_N = self._table_RN[row]
            table_N[first : stop - moved] = table_N[first + moved : stop]
            self._shift_R[row] += more
        self._put(row, blocks)

    def slots(self, row_T: Ints, block_T: Ints, offset_T: Ints) -> Ints:
        """Where tokens of rows go, in blocks of the text and at offsets therein: block * block_size + offset."""
        if self._reach.window is not None:
            block_T = block_T - self._shift_R[row_T] // self._block_size
        slot_T: Ints = self._table_RN[row_T, block_T] * np.int64(self._block_size) + offset_T
        return slot_T

    def tables(self, rows_B: Ints) -> NDArray[np.int32]:
        """[B, most blocks of these rows]"""
        most = (self._stop_R[rows_B] - self._shift_R[rows_B]).max() // self._block_size
        return self._table_RN[rows_B, :most]

    def shifts(self, rows_B: Ints) -> Ints:
        shift_B: Ints = self._shift_R[rows_B]
        return shift_B

    def _most_shift(self, num_computed: int) -> int:
        """The largest shift of a row that has computed so many tokens."""
        return max(0, (self._reach.first_key(num_computed) - self._behind_sinks) // self._unit * self._unit)

    def _column(self, row: int) -> int:
        """Where the row's next block goes."""
        return int(self._stop_R[row] - self._shift_R[row]) // self._block_size

    def _put(self, row: int, blocks: list[int]) -> None:
        """Appends blocks as far as there is room; the others wait."""
        start = self._column(row)
        fitting = blocks[: self._table_RN.shape[1] - start]
        self._table_RN[row, start : start + len(fitting)] = fitting
        self._stop_R[row] += len(fitting) * self._block_size
        if len(fitting) < len(blocks):
            self._waiting[row] = blocks[len(fitting) :]
