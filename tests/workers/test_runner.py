"""Rows and plans on one shard, and how ranks agree on a token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headwise.workers.collectives import Solo
from headwise.workers.plan import RowAdmit, RowSampling, StepPlan
from headwise.workers.runner import Runner
from headwise.workers.shard import Shard
from tests.checkpoints import small_spec


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


class Work:
    """Stands for what a GPU has to do."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def record(self, stream: object) -> None:
        self.calls.append("record")

    def synchronize(self) -> None:
        self.calls.append("synchronize")


def test_a_step_without_a_token_is_finished_once_the_device_has_computed_it(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the blocks of a chunk would be sent to another engine before they are computed."""
    work, runner = Work(), shard._runner
    assert runner is not None
    monkeypatch.setattr(torch.cuda, "Event", lambda: work)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(runner, "_device", torch.device("cuda"))
    launched = runner.launch(StepPlan(0, admits=[admit(0, list(range(3, 23)), [0, 1])], computes=[(0, 13)]))
    assert work.calls == ["record"]
    runner.finish(launched)
    assert work.calls == ["record", "synchronize"]


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
        pairs = torch.tensor([value for pair in self._others for value in pair], dtype=x.dtype)
        return torch.cat((x, pairs.expand(len(x), -1)), dim=1)


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
