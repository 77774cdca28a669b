"""What steps of the model with Triton's kernels need is measured with their graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from headwise.workers.collectives import Solo
from headwise.workers.plan import RowAdmit, RowSampling, StepPlan
from headwise.workers.shard import Shard
from tests.checkpoints import small_spec
from tests.workers.cuda.fake_gpu import FakeGpu


def test_graphs_are_captured_for_measuring_and_given_up(checkpoint: Callable[..., Path], fake_gpu: FakeGpu) -> None:
    spec = small_spec(checkpoint("gqa"), attention="cuda", max_num_batched_tokens=5, max_num_seqs=3, max_model_len=20)
    made = Shard(spec, Solo(), 1)
    made.load()
    whats = [what for what, _ in fake_gpu.log if what in ("pool", "capture", "replay", "reset")]
    assert whats == ["pool", "capture", "capture", "reset", "reset"], "of the largest bucket, and of the smallest"
    made.allocate(4)
    admit = RowAdmit(0, [5, 6], 2, 0, [3], RowSampling())
    assert len(made.step(StepPlan(0, admits=[admit], computes=[(0, 2)])).tokens) == 1
    made.step(StepPlan(1, capture=4))
    assert len(made.step(StepPlan(2, computes=[(0, 1)], bucket=4)).tokens) == 1
    assert [what for what, _ in fake_gpu.log].count("replay") == 1
    made.close()
    assert [what for what, _ in fake_gpu.log].count("reset") == 3
    assert fake_gpu.log[-1][0] == "empty cache"
