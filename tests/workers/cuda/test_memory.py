"""How a GPU's memory is shared out, on a GPU whose memory is the CPU's."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from headwise.workers import shard as shard_module
from headwise.workers.collectives import Solo
from headwise.workers.cuda.memory import GpuMemory, LargestStep
from headwise.workers.errors import InvalidValueError
from headwise.workers.plan import RowAdmit, RowSampling, StepPlan
from headwise.workers.reference.llama import Llama
from headwise.workers.shard import Shard
from headwise.workers.spec import ShardSpec
from tests.checkpoints import small_spec
from tests.effort import examples
from tests.workers.cuda.fake_gpu import FakeGpu, fake_gpu
from tests.workers.cuda.metered_gpu import MeteredGpu, metered_gpu

__all__ = ["fake_gpu", "metered_gpu"]

BLOCK_BYTES = 2 * 2 * 4 * 16 * 16 * 4
"""Of K and V in 2 layers of 4 heads: 16 tokens, 16 floats wide."""


@pytest.fixture
def spec(checkpoint: Callable[..., Path]) -> ShardSpec:
    return small_spec(checkpoint("gqa"), attention="reference", kv_memory=0.5, max_num_batched_tokens=48)


def loaded(spec: ShardSpec) -> Shard:
    made = Shard(spec, Solo(), 1)
    made.load()
    return made


@given(
    rows=st.integers(1, 9),
    more_tokens=st.integers(0, 200),
    row_tokens=st.integers(1, 60),
    block_size=st.sampled_from([1, 4, 16]),
)
def test_the_largest_step_is_a_plan_of_that_size(rows: int, more_tokens: int, row_tokens: int, block_size: int) -> None:
    tokens = rows + more_tokens
    plans = LargestStep(rows, tokens, row_tokens).plans(block_size)
    assert [plan.step for plan in plans] == [0, 1] and plans[1].drops == list(range(rows))
    for plan in plans:
        counts = [count for _, count in plan.computes]
        assert len(counts) == len(plan.admits) == rows and min(counts) >= 1
        assert sum(counts) == min(tokens, rows * row_tokens)
        for admit, count in zip(plan.admits, counts, strict=True):
            assert len(admit.token_ids) == row_tokens
            assert admit.num_computed + count == row_tokens, "each row samples"
            assert set(admit.block_ids) == {0} and len(admit.block_ids) * block_size >= row_tokens
    in_few, in_all = ([count for _, count in plan.computes] for plan in plans)
    assert sum(1 < count < row_tokens for count in in_few) <= 1
    assert max(in_all) - min(in_all) <= 1


@examples(20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_step_takes_more_than_was_measured(spec: ShardSpec, metered_gpu: MeteredGpu, data: st.DataObject) -> None:
    """Any prompts in any chunks, sampled in any way."""
    made = loaded(spec)
    weights = metered_gpu.meter.live
    made.allocate(16)
    assert made._gpu_memory is not None and made._kv_cache is not None
    metered_gpu.meter.peak = metered_gpu.meter.live
    rows = data.draw(st.integers(1, spec.max_num_seqs), "rows")
    lengths = data.draw(st.lists(st.integers(1, 63), min_size=rows, max_size=rows), "lengths")
    sampling = st.builds(
        RowSampling,
        temperature=st.sampled_from([0.0, 1.0]),
        top_p=st.sampled_from([0.5, 1.0]),
        top_k=st.sampled_from([0, 7]),
        min_p=st.sampled_from([0.0, 0.1]),
        repetition_penalty=st.sampled_from([1.0, 1.1]),
        frequency_penalty=st.sampled_from([0.0, 0.1]),
        num_logprobs=st.sampled_from([-1, 20]),
        logit_bias=st.sampled_from([(), ((5, 1.0),)]),
    )
    left = dict(enumerate(lengths))
    plan = StepPlan(0)
    for row, length in left.items():
        blocks = [row * 4 + block for block in range(4)]
        plan.admits.append(RowAdmit(row, [3] * length, length, 0, blocks, data.draw(sampling)))
    for step in range(200):
        budget = spec.max_num_batched_tokens
        for row in [row for row, tokens in left.items() if tokens]:
            count = min(left[row], budget)
            if count:
                plan.computes.append((row, count))
                left[row], budget = left[row] - count, budget - count
        if not plan.computes:
            break
        made.step(plan)
        plan = StepPlan(step + 1)
    assert metered_gpu.meter.peak - weights - made._kv_cache.nbytes <= made._gpu_memory.for_steps
    made.close()


def test_a_fraction_is_of_what_weights_and_steps_leave(spec: ShardSpec, metered_gpu: MeteredGpu) -> None:
    made = loaded(spec)
    assert made._gpu_memory is not None
    needed, free = made._gpu_memory.for_steps, metered_gpu.free_memory()
    assert needed > 4 * 256 * (4 + 8), "logits of all rows, and their sums"
    assert made.affordable_blocks() == int(0.5 * (free - needed)) // BLOCK_BYTES
    made.close()
    twice = loaded(replace(spec, max_num_batched_tokens=200))
    assert twice._gpu_memory is not None and twice._gpu_memory.for_steps > needed
    twice.close()


def test_a_closed_shard_leaves_room_for_as_many_blocks(spec: ShardSpec, metered_gpu: MeteredGpu) -> None:
    """Weights, KV, rows, and what sampling remembers are given up at once, and not by the garbage collector."""
    blocks = []
    for _ in range(2):
        made = loaded(spec)
        blocks.append(made.affordable_blocks())
        made.allocate(blocks[-1])
        admit = RowAdmit(0, [3, 4], 2, 0, [0], RowSampling(temperature=1.0, top_p=0.5, repetition_penalty=1.1))
        made.step(StepPlan(0, admits=[admit], computes=[(0, 2)]))
        assert metered_gpu.free_memory() < metered_gpu.total / 2
        made.close()
        assert metered_gpu.free_memory() > metered_gpu.total - (1 << 16)
    assert blocks[0] == blocks[1] > 0


def test_a_size_that_does_not_fit_beside_the_steps_is_refused(spec: ShardSpec, metered_gpu: MeteredGpu) -> None:
    made = loaded(replace(spec, kv_memory="63.9MiB"))
    assert made._gpu_memory is not None
    needed, free = made._gpu_memory.for_steps, metered_gpu.free_memory()
    assert free - needed < 63.9 * 2**20
    blocks = made.affordable_blocks()
    message = (
        rf"^kv_memory='63.9MiB': {blocks} blocks take {blocks * BLOCK_BYTES} bytes, and rank 0 has {free - needed} "
        rf"bytes of GPU memory, beside the {needed} bytes that steps need; lower kv_memory \(--kv-memory\)$"
    )
    with pytest.raises(InvalidValueError, match=message):
        made.allocate(blocks)
    made.close()


def test_steps_that_leave_nothing_are_refused(spec: ShardSpec, metered_gpu: MeteredGpu) -> None:
    metered_gpu.total = 1 << 20
    message = (
        r"^max_num_batched_tokens=48: a step of so many tokens with max_num_seqs=4 and max_model_len=64 needs (\d+) "
        r"bytes, and rank 0 has (\d+) bytes of GPU memory beside its weights; lower one of them \(--max-num-"
    )
    made = Shard(spec, Solo(), 1)
    with pytest.raises(InvalidValueError, match=message):
        made.load()
    made.close()


class Held:
    """What was computed before memory ran out."""

    def __init__(self) -> None:
        self.alive: weakref.ref[torch.Tensor] | None = None

    def run_out(self, *args: Any, **kwargs: Any) -> Any:
        held = torch.zeros(5)
        self.alive = weakref.ref(held)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


WEIGHTS = (
    r"^tensor_parallel_size=1: the weights of rank 0 do not fit in the 1000000 bytes of GPU memory that were free; "
    r"raise tensor_parallel_size \(--tp\), or take a smaller dtype \(--dtype\)$"
)
STEP = (
    r"^max_num_batched_tokens=48: a step of so many tokens with max_num_seqs=4 and max_model_len=64 needs more than it "
    r"can have, and rank 0 has 1000000 bytes of GPU memory beside its weights; lower one of them "
)
CACHE = r"^kv_memory=0\.5: 8 blocks take 131072 bytes, and rank 0 has 1000000 bytes of GPU memory, beside the 0 bytes "


@pytest.mark.parametrize(
    ("owner", "name", "message"),
    [(shard_module, "load_shard", WEIGHTS), (Llama, "forward", STEP), (shard_module, "KVCache", CACHE)],
)
def test_memory_that_runs_out_is_refused_by_flag_and_number(
    spec: ShardSpec,
    fake_gpu: FakeGpu,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    message: str,
) -> None:
    """The error keeps nothing of what was computed so far."""
    fake_gpu.free, held = 1_000_000, Held()
    made = Shard(spec, Solo(), 1)
    if name == "KVCache":
        made.load()
    monkeypatch.setattr(owner, name, held.run_out)
    with pytest.raises(InvalidValueError, match=message) as caught:
        made.load() if name != "KVCache" else made.allocate(8)
    assert held.alive is not None and held.alive() is None
    assert caught.value.__context__ is None
    assert made._model is None or not hasattr(made._model, "attention"), "the small cache is given up"
    made.close()


def test_another_error_is_not_taken_for_that(
    spec: ShardSpec,
    fake_gpu: FakeGpu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    fake_gpu.free = 1_000_000
    monkeypatch.setattr(Llama, "forward", fail)
    made = Shard(spec, Solo(), 1)
    with pytest.raises(RuntimeError, match="illegal"):
        made.load()
    made.close()


def test_graphs_have_the_memory_of_the_largest_and_a_bit_for_each(
    spec: ShardSpec,
    fake_gpu: FakeGpu,
) -> None:
    fake_gpu.free, fake_gpu.peak = 10_000, 3_000
    plans: list[StepPlan] = []

    def step(plan: StepPlan) -> None:
        plans.append(plan)
        fake_gpu.free -= {0: 0, 16: 500, 1: 20}[plan.capture]

    def end() -> None:
        fake_gpu.free += 520

    memory = GpuMemory(fake_gpu, spec, 0)
    memory.measure_steps(LargestStep(12, 12, 60), lambda: step, end)
    assert [(plan.step, plan.capture) for plan in plans] == [(0, 0), (1, 0), (2, 16), (3, 1)]
    assert memory.for_steps == 3_000 + 500 + 4 * 20, "buckets are 1, 2, 4, 8 and 16"
    assert memory.for_kv() == 10_000 - 3_580


def test_a_cpu_measures_nothing(spec: ShardSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_module, "free_host_memory", lambda: 32 * BLOCK_BYTES)
    monkeypatch.setattr(Llama, "forward", lambda *args: pytest.fail("a step was computed"))
    made = loaded(spec)
    assert made.affordable_blocks() == 16
    made.close()
