"""Whatever a query may see is where tables and shifts say, and every token that is computed is on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise.workers.kv.policy import DENSE, Reach
from headwise.workers.model.attention import PART_KEYS
from headwise.workers.model.model import StepInput
from headwise.workers.plan import RowAdmit, RowSampling, StepPlan
from headwise.workers.rows import Rows
from tests.effort import examples

NUM_ROWS = 3


class Told:
    """A row as plans tell of it.

    Attributes:
        blocks: by group, of each block of the text which it is; -1 if the row was admitted without it.
    """

    def __init__(self, tokens: list[int], num_computed: int, blocks: list[list[int]]) -> None:
        self.tokens, self.num_computed, self.blocks = tokens, num_computed, blocks


class Engine:
    """Tells rows what a scheduler would, and checks the steps that come of it."""

    def __init__(self, reaches: Sequence[Reach], block_size: int, max_model_len: int, max_step: int) -> None:
        self.reaches, self.block_size, self.max_step = reaches, block_size, max_step
        self.rows = Rows(block_size, NUM_ROWS, max_model_len, torch.device("cpu"), reaches, max_step)
        self.told: dict[int, Told] = {}
        self.plan = StepPlan(0)
        self._next_block = 0

    def admit(self, row: int, length: int, num_computed: int, num_ahead: int = 1) -> None:
        """Args: ``num_ahead``: for how many tokens after the computed ones the row gets blocks."""
        tokens = [(row * 77 + 13 * position) % 251 for position in range(length)]
        blocks = []
        for reach in self.reaches:
            num_computed_blocks = num_computed // self.block_size
            needed = reach.needed_blocks(num_computed_blocks, self.block_size)
            # As of a whole number of blocks, which is what a hit is: it may need one more than the row does.
            first = [self._block() if index in needed else -1 for index in range(num_computed_blocks)]
            stop = -(-max(num_computed, min(length, num_computed + num_ahead)) // self.block_size)
            blocks.append(first + [self._block() for _ in range(stop - num_computed_blocks)])
        self.told[row] = Told(tokens, num_computed, blocks)
        admitted = [list(of_group) for of_group in blocks]
        self.plan.admits.append(
            RowAdmit(row, list(tokens), length, num_computed, admitted[0], RowSampling(), tuple(admitted[1:]))
        )

    def drop(self, row: int) -> None:
        del self.told[row]
        self.plan.drops.append(row)

    def step(self, counts: dict[int, int]) -> StepInput:
        """Computes so many tokens of rows; those whose last token is computed get another."""
        for row, count in counts.items():
            told = self.told[row]
            for group, blocks in enumerate(told.blocks):
                while len(blocks) * self.block_size < told.num_computed + count:
                    blocks.append(self._block())
                    if group:
                        self.plan.group_appends.append((group, row, blocks[-1]))
                    else:
                        self.plan.appends.append((row, blocks[-1]))
        self.rows.apply(self.plan)
        self.plan = StepPlan(0)
        rows_B, counts_B = np.array(list(counts), np.int64), np.array(list(counts.values()), np.int64)
        step = self.rows.build(rows_B, counts_B, 0)
        self._check_tokens(step, counts)
        self._check_blocks(step, counts)
        for row, count in counts.items():
            self.told[row].num_computed += count
        whole_B = self.rows.whole(rows_B)
        assert whole_B.tolist() == [row for row in counts if self._is_whole(self.told[row])]
        if len(whole_B):
            sampled = [7 + len(self.told[row].tokens) % 5 for row in whole_B.tolist()]
            self.rows.store(whole_B, torch.tensor(sampled))
            for row, token in zip(whole_B.tolist(), sampled, strict=True):
                self.told[row].tokens.append(token)
        return step

    def _block(self) -> int:
        self._next_block += 1
        return self._next_block

    def _is_whole(self, told: Told) -> bool:
        return told.num_computed == len(told.tokens)

    def _check_tokens(self, step: StepInput, counts: dict[int, int]) -> None:
        expected = [
            (row, position, self.told[row].tokens[position])
            for row, count in counts.items()
            for position in range(self.told[row].num_computed, self.told[row].num_computed + count)
        ]
        columns_T = step.positions_T % step.tokens_RL.shape[1]
        found_T = step.tokens_RL[torch.from_numpy(step.rows_T), torch.from_numpy(columns_T)]
        assert list(zip(step.rows_T, step.positions_T, found_T.tolist(), strict=True)) == expected
        ends = [self.told[row].num_computed + count for row, count in counts.items()]
        assert step.attention.context_lens_B.tolist() == ends

    def _check_blocks(self, step: StepInput, counts: dict[int, int]) -> None:
        batch, starts = step.attention, step.attention.query_starts_B1
        num_rows, num_tokens = len(counts), len(step.rows_T)
        assert len(batch.block_tables_BN) == num_rows * len(self.reaches)
        assert len(step.slots_T) == num_tokens * len(self.reaches)
        for group, reach in enumerate(self.reaches):
            for b, (row, count) in enumerate(counts.items()):
                told = self.told[row]
                blocks_N = np.array(told.blocks[group])
                at = group * num_rows + b
                shift = 0 if batch.shifts_B is None else int(batch.shifts_B[at])
                self._check_shift(reach, shift, told.num_computed)
                positions = np.arange(told.num_computed, told.num_computed + count)
                keys = self._seen_keys(reach, told.num_computed, told.num_computed + count)
                places = np.where((keys < reach.sinks) & (shift > 0), keys, keys - shift)
                found = batch.block_tables_BN[at, places // self.block_size]
                assert np.array_equal(found, blocks_N[keys // self.block_size])
                assert (found > 0).all()
                slots = step.slots_T[group * num_tokens + starts[b] : group * num_tokens + starts[b + 1]]
                expected = blocks_N[positions // self.block_size] * self.block_size + positions % self.block_size
                assert np.array_equal(slots, expected)

    def _check_shift(self, reach: Reach, shift: int, first_query: int) -> None:
        assert shift % math.lcm(PART_KEYS, self.block_size) == 0
        if shift:
            first = reach.first_key(first_query) - shift
            assert first >= reach.sinks + 1 and first // self.block_size >= -(-reach.sinks // self.block_size)

    def _seen_keys(self, reach: Reach, first_query: int, stop: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        first = reach.first_key(first_query)
        return np.concatenate((np.arange(min(first, reach.sinks)), np.arange(first, stop)))


windows = st.integers(1, 300)
reaches = st.one_of(
    st.just(DENSE),
    st.builds(Reach, st.just(0), windows),
    st.builds(Reach, st.sampled_from([1, 4, 15, 16, 17, 300]), windows),
)


@examples(60)
@given(st.lists(reaches, min_size=1, max_size=3, unique=True), st.sampled_from([1, 8, 16, 48]), st.data())
def test_what_a_query_sees_is_where_the_tables_say(
    of_groups: list[Reach], block_size: int, data: st.DataObject
) -> None:
    """Rows of any length and history, admitted with blocks for one step or for all of their tokens."""
    endless = all(reach.window is not None for reach in of_groups)
    max_step = data.draw(st.sampled_from([16, 100, 400]))
    max_len = data.draw(st.sampled_from([64, 500])) if endless else 2500
    engine = Engine(of_groups, block_size, max_len, max_step)
    for _ in range(data.draw(st.integers(1, 25))):
        if engine.told and data.draw(st.integers(0, 5)) == 0:
            engine.drop(data.draw(st.sampled_from(sorted(engine.told))))
        free = [row for row in range(NUM_ROWS) if row not in engine.told]
        if free and (not engine.told or data.draw(st.booleans())):
            length = data.draw(st.integers(1, 1500))
            num_computed = data.draw(st.integers(0, length - 1))
            num_computed -= data.draw(st.sampled_from([0, num_computed % block_size]))
            engine.admit(free[0], length, num_computed, data.draw(st.sampled_from([max_step, 1 << 20])))
        chosen = data.draw(st.lists(st.sampled_from(sorted(engine.told)), min_size=1, unique=True))
        left, counts = max_step, {}
        for row in chosen:
            told = engine.told[row]
            most = min(left, len(told.tokens) - told.num_computed)
            if most:
                counts[row] = data.draw(st.integers(1, most) | st.just(most))
                left -= counts[row]
        if counts:
            engine.step(counts)


@pytest.mark.parametrize("num_computed", [0, 10, 4_690, 4_720, 4_990])
@pytest.mark.parametrize("chunk", [7, 128])
def test_of_a_text_longer_than_the_ring_every_computed_token_is_there(num_computed: int, chunk: int) -> None:
    """Its last tokens, too, once it goes on; and whatever the row's predecessor left is not the row's."""
    engine = Engine([Reach(4, 60)], 16, 299, 128)
    engine.admit(0, 5_000, 4_900)
    engine.step({0: 100})
    engine.drop(0)
    engine.admit(0, 5_000, 0)
    engine.rows.apply(engine.plan)
    engine.plan = StepPlan(0, drops=[0])
    engine.rows.apply(engine.plan)
    assert not engine.rows._texts
    engine.plan = StepPlan(0)
    engine.admit(0, 5_000, num_computed, 1 << 20)
    engine.plan.admits[-1].token_ids[1_000] = engine.told[0].tokens[1_000] = 9_999
    told = engine.told[0]
    while told.num_computed < 5_000:
        engine.step({0: min(chunk, 5_000 - told.num_computed)})
        if told.num_computed < 4_000:
            assert engine.rows.holds(np.array([0]), 9_999)
    held = engine.rows.tokens_RL[0].tolist()
    assert held == [told.tokens[position] for position in sorted(range(4_701, 5_001), key=lambda p: p % 300)]
    for _ in range(400):
        engine.step({0: 1})


def test_an_endless_row_takes_no_more_memory() -> None:
    engine = Engine([Reach(4, 60), Reach(0, 100)], 16, 99, 32)
    rows = engine.rows

    def sizes() -> list[tuple[int, ...]]:
        return [tuple(rows.tokens_RL.shape), *(group._table_RN.shape for group in rows._groups)]

    before, widest = sizes(), 0
    engine.admit(0, 90, 0)
    engine.step({0: 32})
    told = engine.told[0]
    for _ in range(2):
        engine.step({0: 29})
    rows_B, one_B = np.array([0]), np.array([1])
    for number in range(20_000):
        if number % 1_000 == 0:
            widest = max(widest, engine.step({0: 1}).attention.block_tables_BN.shape[1])
            continue
        if told.num_computed % 16 == 0:
            for group in told.blocks:
                group.append(engine._block())
            rows.apply(StepPlan(0, [], [], [(0, told.blocks[0][-1])], [], 0, 0, [(1, 0, told.blocks[1][-1])]))
        rows.build(rows_B, one_B, 0)
        rows.store(rows_B, torch.tensor([5]))
        told.tokens.append(5)
        told.num_computed += 1
    assert told.num_computed > 20_000 and sizes() == before
    assert widest * 16 <= 101 + 2 * (PART_KEYS + 32) + 16
    assert not rows._texts and not any(group._waiting for group in rows._groups)


def test_a_dense_row_is_never_shifted() -> None:
    engine = Engine([DENSE], 16, 2_000, 500)
    engine.admit(0, 1_999, 0, 1 << 20)
    for _ in range(3):
        step = engine.step({0: 500})
        assert step.attention.shifts_B is None
    assert step.attention.block_tables_BN.shape == (1, 125)


def admitted(length: int, num_computed: int, *tables: list[int]) -> StepPlan:
    return StepPlan(
        0, admits=[RowAdmit(0, [3] * length, length, num_computed, tables[0], RowSampling(), tuple(tables[1:]))]
    )


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (admitted(50, 32, [1, -1, 3, 4], [1, 2, 3, 4]), "row 0 lacks blocks of its first 32 tokens"),
        (admitted(50, 48, [-1, 2, 3, 4], [1, 2, 3, 4]), "row 0 lacks blocks of its first 48 tokens"),  # of the sinks
        (admitted(50, 0, [1, 2, 3, -1], [1, 2, 3, 4]), "row 0 lacks blocks of its first 0 tokens"),
        (admitted(50, 48, [1, -1], [1, 2, 3, 4]), "row 0 lacks blocks of its first 48 tokens"),
        (admitted(50, 48, [1, -1, 3, 4], [-1, 2, 3, 4]), "row 0 lacks blocks of its first 48 tokens"),
        (admitted(50, 48, [1, -1, 3, 4]), "row 0 has blocks in 1 groups, of 2"),
        (admitted(66, 48, [1, -1, 3, 4, 5], [1, 2, 3, 4, 5]), "row 0 cannot have 66 tokens, only 65"),
    ],
)
def test_an_admission_that_cannot_be_is_refused(plan: StepPlan, message: str) -> None:
    """Of a policy of sinks and a window in one group, and everything in the other."""
    rows = Rows(16, 1, 64, torch.device("cpu"), [Reach(4, 17), DENSE], 64)
    with pytest.raises(RuntimeError, match=message):
        rows.apply(plan)
    rows.apply(admitted(50, 48, [1, -1, 3, 4], [1, 2, 3, 4]))


def test_a_row_that_lacks_blocks_in_any_group_is_refused() -> None:
    rows = Rows(16, 1, 64, torch.device("cpu"), [Reach(4, 17), DENSE], 64)
    rows.apply(admitted(50, 48, [1, -1, 3, 4], [1, 2, 3]))
    with pytest.raises(RuntimeError, match=r"rows \[0\] lack blocks for \[50\] tokens"):
        rows.build(np.array([0]), np.array([2]), 0)
