"""Rows and plans on one shard, and how ranks agree on a token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headwise.workers.collectives import Solo
from headwise.workers.cuda import gpu
from headwise.workers.model.model import StepInput
from headwise.workers.plan import RowAdmit, RowSampling, StepPlan
from headwise.workers.runner import Runner
from headwise.workers.sampling.best import keys_of
from headwise.workers.shard import Shard
from tests.checkpoints import small_spec
from tests.workers.cuda.fake_gpu import FakeGpu


@pytest.fixture
def shard(checkpoint: Callable[..., Path]) -> Iterator[Shard]:
    made = Shard(small_spec(checkpoint("gqa")), Solo(), 1)
    made.load()
    made.allocate(8)
    yield made
    made.close()


def admit(row: int, tokens: list[int], blocks: list[int]) -> RowAdmit:
    return RowAdmit(row, tokens, len(tokens), 0, blocks, RowSampling())


def test_a_prompt_in_chunks_samples_once_and_as_a_whole(shard: Shard) -> None:
    tokens = list(range(3, 23))
    whole = shard.step(StepPlan(0, admits=[admit(0, tokens, [0, 1])], computes=[(0, 20)]))
    first = shard.step(StepPlan(1, admits=[admit(1, tokens, [5, 2])], computes=[(1, 13)]))
    last = shard.step(StepPlan(2, computes=[(1, 7)]))
    assert first.tokens == []
    assert [token for _, token in last.tokens] == [token for _, token in whole.tokens]


def test_a_step_is_launched_before_the_one_before_it_is_finished(shard: Shard) -> None:
    tokens, runner = list(range(3, 23)), shard._runner
    assert runner is not None
    expected = [shard.step(StepPlan(0, admits=[admit(0, tokens, [0, 1])], computes=[(0, 20)]))]
    expected += [shard.step(StepPlan(step, computes=[(0, 1)])) for step in (1, 2)]
    launched = [runner.launch(StepPlan(3, admits=[admit(1, tokens, [5, 2])], computes=[(1, 20)]))]
    launched += [runner.launch(StepPlan(step, computes=[(1, 1)])) for step in (4, 5)]
    found = [runner.finish(step) for step in launched]
    assert [output.step for output in found] == [3, 4, 5]
    assert [token for output in found for _, token in output.tokens] == [o.tokens[0][1] for o in expected]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """What stands for the GPU; ask for it before a shard."""
    made = FakeGpu()
    monkeypatch.setattr(gpu, "of", lambda device: made)
    return made


def test_on_a_gpu_a_step_is_finished_without_a_wait_for_the_next(fake: FakeGpu, shard: Shard) -> None:
    """Else two steps in flight would be as slow as one after the other."""
    runner = shard._runner
    assert runner is not None
    plans = [
        StepPlan(0, admits=[admit(0, list(range(3, 23)), [0, 1])], computes=[(0, 13)]),  # without a token
        StepPlan(1, computes=[(0, 7)]),
        StepPlan(2, computes=[(0, 1)]),
    ]
    fake.log.clear()
    launched = [runner.launch(plan) for plan in plans]
    assert fake.syncs == []
    ends = [entry[1][0] for entry in fake.log if entry[0] == "record"][1::2]
    # The copy of a step's tokens is queued before the point that is waited for: one copy a step that has tokens.
    kinds = [entry[0] for entry in fake.log if entry[0] in ("record", "pinned")]
    assert kinds == ["record", "record", *["record", "pinned", "record"] * 2]
    outputs = [runner.finish(step) for step in launched]
    assert fake.syncs == [("sync event", end) for end in ends]
    assert [output.seconds for output in outputs] == [0.001] * 3, "measured by the events"


def test_which_steps_must_be_finished_before_the_next_is_launched(fake: FakeGpu, shard: Shard) -> None:
    """On a GPU only those before a plan with a row that has a grammar, or one that captures a graph."""
    runner = shard._runner
    assert runner is not None
    launched = runner.launch(StepPlan(0, admits=[admit(0, [3] * 4, [0])], computes=[(0, 4)]))
    with_grammar = replace(launched, constrained={2})
    on_a_cpu = replace(launched, span=None)
    plans = [StepPlan(1, computes=[(0, 1)]), StepPlan(1, computes=[(0, 1), (2, 1)])]
    new = replace(admit(1, [3], [1]), sampling=RowSampling(grammar="x"))
    assert all(launched.precedes(plan) for plan in (StepPlan(1, capture=8), StepPlan(1, admits=[new])))
    found = [[step.precedes(plan) for plan in plans] for step in (launched, with_grammar, on_a_cpu)]
    assert found == [[False, False], [False, True], [True, True]]
    runner.finish(launched)


@pytest.mark.parametrize("sampling", [RowSampling(), RowSampling(1.0, top_k=9, seed=3, num_logprobs=2)])
def test_on_a_gpu_the_tokens_are_the_same(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, sampling: RowSampling
) -> None:
    tokens, outputs = list(range(3, 23)), []
    for fake in (None, FakeGpu()):
        monkeypatch.setattr(gpu, "of", lambda device, fake=fake: fake)
        made = Shard(small_spec(checkpoint("gqa")), Solo(), 1)
        made.load()
        made.allocate(8)
        plans = [StepPlan(0, admits=[RowAdmit(0, tokens, 20, 0, [0, 1], sampling)], computes=[(0, 20)])]
        plans += [StepPlan(step, computes=[(0, 1)]) for step in (1, 2, 3)]
        outputs.append([made.step(plan) for plan in plans])
        made.close()
    assert [o.tokens for o in outputs[0]] == [o.tokens for o in outputs[1]]
    assert [o.logprobs for o in outputs[0]] == [o.logprobs for o in outputs[1]]


def test_the_block_tables_of_a_step_follow_its_rows(shard: Shard) -> None:
    """Those of the step before are kept where nothing changed."""
    runner, seen = shard._runner, []
    assert runner is not None and shard._model is not None
    forward = shard._model.forward

    def record(step: StepInput) -> Tensor:
        seen.append(step.attention.block_tables_BN)
        return forward(step)

    shard._model.forward = record  # type: ignore[method-assign]
    shard.step(StepPlan(0, admits=[admit(0, [3] * 15, [4]), admit(1, [5] * 3, [6])], computes=[(0, 15), (1, 3)]))
    shard.step(StepPlan(1, computes=[(0, 1), (1, 1)]))
    shard.step(StepPlan(2, appends=[(0, 2)], computes=[(0, 1), (1, 1)]))
    shard.step(StepPlan(3, computes=[(1, 1), (0, 1)]))
    shard.step(StepPlan(4, drops=[1], admits=[admit(1, [7] * 3, [1])], computes=[(1, 3), (0, 1)]))
    assert seen[1] is seen[0]
    assert [[row[0] for row in table] for table in seen] == [[4, 6], [4, 6], [4, 6], [6, 4], [1, 4]]
    assert seen[2][0].tolist() == seen[3][1].tolist() == [4, 2]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (StepPlan(1), "step 1 arrived where step 0 was due"),
        (StepPlan(0, admits=[admit(0, [3] * 4, [0])], computes=[(0, 5)]), "cannot compute"),
        (StepPlan(0, admits=[admit(0, [3] * 4, [0])], computes=[(0, 0)]), "cannot compute"),
        (StepPlan(0, admits=[admit(0, [3] * 20, [0])], computes=[(0, 20)]), "lack blocks"),
        (StepPlan(0, admits=[admit(0, [3], [0]), admit(0, [3], [1])]), "row 0 is taken"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(shard: Shard, plan: StepPlan, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        shard.step(plan)


class Others(Solo):
    """Stands in for a group whose other ranks offer fixed (value, id) pairs."""

    def __init__(self, *others: tuple[float, int]) -> None:
        super().__init__()
        self.world_size = 1 + len(others)
        self._others = others

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        values, ids = zip(*self._others, strict=True)
        return torch.cat((x, keys_of(torch.tensor(values), torch.tensor(ids)).expand(len(x), -1)), dim=1)


@pytest.mark.parametrize(
    ("others", "token", "finite"),
    [
        ([(2.0, 7)], 7, True),
        ([(0.5, 7)], 1, True),
        ([(1.0, 7)], 1, True),  # a tie goes to the lowest id
        ([(-math.inf, 7), (3.0, 9)], 9, True),  # a rank may ban all its tokens
        ([(math.nan, 7)], None, False),
        ([(math.inf, 7)], None, False),
    ],
)
def test_ranks_agree_on_the_best_token(others: list[tuple[float, int]], token: int | None, finite: bool) -> None:
    runner = object.__new__(Runner)
    runner._collectives, runner._vocab_start = Others(*others), 0
    runner._num_threads = 1
    result = runner._greedy(torch.tensor([[0.0, 1.0, -3.0]]))
    assert result.finite_B.tolist() == [finite]
    assert token is None or result.tokens_B.tolist() == [token]
