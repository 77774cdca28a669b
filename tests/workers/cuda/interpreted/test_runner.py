"""A step as a GPU computes it: the host launches it without a look at a tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from headwise.workers.collectives import Solo
from headwise.workers.cuda import gpu
from headwise.workers.plan import RowAdmit, RowSampling, StepPlan
from headwise.workers.sampling import choice
from headwise.workers.shard import Shard
from tests.checkpoints import small_spec
from tests.workers.cuda.fake_gpu import FakeGpu, waits_are_errors

KINDS = [
    RowSampling(),
    RowSampling(temperature=1.0, seed=1),
    RowSampling(0.7, top_k=20, top_p=0.9, min_p=0.01, seed=2, num_logprobs=3),
    RowSampling(1.0, repetition_penalty=1.2, presence_penalty=0.3, logit_bias=((3, 2.0),), seed=3),
    RowSampling(min_tokens=9, stop_token_ids=(0, 3), num_logprobs=0),
]


@pytest.mark.parametrize(
    "kinds",
    [pytest.param(KINDS[:1] * 3, id="greedy"), pytest.param(KINDS, id="mixed", marks=pytest.mark.slow)],
)
def test_no_launch_waits(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kinds: list[RowSampling]
) -> None:
    fake, on_device = FakeGpu(), lambda x_CV: x_CV.sort(-1).values
    monkeypatch.setattr(gpu, "of", lambda device: fake)
    monkeypatch.setattr(choice, "_sort", on_device)  # NumPy sorts for CPUs alone
    spec = small_spec(checkpoint("gqa"), attention="cuda", max_num_seqs=len(kinds), kv_memory="4MiB")
    shard = Shard(spec, Solo(), 1)
    shard.load()
    shard.allocate(2 * len(kinds))
    assert shard._runner is not None
    admits = [RowAdmit(row, [5, 6, 7, row], 4, 0, [2 * row], sampling) for row, sampling in enumerate(kinds)]
    plans = [StepPlan(0, admits=admits, computes=[(row, 4) for row in range(len(kinds))])]
    plans += [StepPlan(step, computes=[(row, 1) for row in range(len(kinds))]) for step in (1, 2)]
    fake.log.clear()
    with waits_are_errors(fake):
        launched = [shard._runner.launch(plan) for plan in plans]
    assert fake.syncs == []
    for one in launched:
        assert len(shard._runner.finish(one).tokens) == len(kinds)
    assert len(fake.syncs) == len(plans)
    shard.close()
