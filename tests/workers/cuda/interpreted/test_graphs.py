"""Steps that decode as graphs, on a GPU that is none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from headwise.workers.collectives import Solo
from headwise.workers.cuda import llama
from headwise.workers.cuda.graphs import DecodeGraph
from headwise.workers.cuda.llama import CudaLlama
from headwise.workers.cuda.memory import GpuMemory
from headwise.workers.plan import RowAdmit, RowSampling, StepPlan
from headwise.workers.reference.llama import Inputs, Llama
from headwise.workers.shard import Shard
from tests.checkpoints import small_spec
from tests.workers.cuda.fake_gpu import FakeGpu, waits_are_errors

PROMPTS = [[5, 9, 200, 31, 7], [1] * 17, [77, 3]]


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What steps need: the largest one takes the interpreter long."""
    monkeypatch.setattr(GpuMemory, "measure_steps", lambda *args: None)
    monkeypatch.setattr(llama, "check_kernels", lambda *args: None)


@contextmanager
def shard(directory: Path, attention: str = "cuda", **changes: Any) -> Iterator[Shard]:
    spec = small_spec(directory, attention=attention, **changes)
    with closing(Shard(spec, Solo(), 1)) as made:
        made.load()
        made.allocate(12)
        yield made


def plans(captures: list[int], bucket: int, num_decodes: int = 2) -> list[StepPlan]:
    """Prefills three rows, captures, and decodes all of them."""
    admits = [
        RowAdmit(row, prompt, len(prompt), 0, [3 * row, 3 * row + 1, 3 * row + 2], RowSampling())
        for row, prompt in enumerate(PROMPTS)
    ]
    made = [StepPlan(0, admits=admits, computes=[(row, len(prompt)) for row, prompt in enumerate(PROMPTS)])]
    made += [StepPlan(len(made) + n, capture=size) for n, size in enumerate(captures)]
    decodes = [(row, 1) for row in range(3)]
    made += [StepPlan(len(made) + n, computes=decodes, bucket=bucket) for n in range(num_decodes)]
    return made


def tokens(shard: Shard, plans: list[StepPlan]) -> list[list[tuple[int, int]]]:
    return [shard.step(plan).tokens for plan in plans]


def cache_of(shard: Shard) -> torch.Tensor:
    assert shard._kv_cache is not None
    return torch.cat([shard._kv_cache.keys, shard._kv_cache.values])


@pytest.mark.parametrize("shape", ["gqa", pytest.param("uneven", marks=pytest.mark.slow)])
def test_graphs_give_the_tokens_of_the_reference(
    checkpoint: Callable[..., Path], fake_gpu: FakeGpu, shape: str
) -> None:
    with shard(checkpoint(shape), "reference") as one:
        expected, cache = tokens(one, plans([], 0)), cache_of(one)
    with shard(checkpoint(shape)) as one:
        got = tokens(one, plans([4, 2], 4))
        torch.testing.assert_close(cache_of(one), cache, rtol=0, atol=1e-4)
    assert got[:1] + got[3:] == expected
    assert [what for what, _ in fake_gpu.log if what in ("capture", "replay")] == ["capture"] * 2 + ["replay"] * 2


def test_padded_rows_leave_the_cache_alone(checkpoint: Callable[..., Path], fake_gpu: FakeGpu) -> None:
    caches = []
    for captures, bucket in (([], 0), ([], 4), ([4], 4)):
        with shard(checkpoint("gqa")) as one:
            tokens(one, plans(captures, bucket))
            caches.append(cache_of(one))
    plain, padded, replayed = caches
    assert torch.equal(replayed, padded)
    assert torch.equal(plain != 0, padded != 0)  # the products of more rows may have other bits
    torch.testing.assert_close(padded, plain, rtol=0, atol=1e-4)


def test_rows_that_sample_nothing_are_decoded_by_graphs_too(checkpoint: Callable[..., Path], fake_gpu: FakeGpu) -> None:
    prompt = RowAdmit(3, [4, 5, 6], 3, 0, [9], RowSampling())
    with shard(checkpoint("gqa")) as one:
        made = plans([4], 4)
        made[-2].admits.append(prompt)
        made[-2].computes.insert(1, (3, 1))
        got = tokens(one, made)
    with shard(checkpoint("gqa")) as one:
        assert tokens(one, plans([], 0)) == got[:1] + got[2:]


def test_the_host_waits_for_nothing_in_a_step(checkpoint: Callable[..., Path], fake_gpu: FakeGpu) -> None:
    with shard(checkpoint("gqa")) as one:
        model, steps = one._model, []
        assert isinstance(model, CudaLlama)
        forward = model.forward

        def watched(step: Any) -> torch.Tensor:
            before = len(fake_gpu.syncs)
            with waits_are_errors(fake_gpu):
                logits_BV = forward(step)
            steps.append(len(fake_gpu.syncs) - before)
            return logits_BV

        model.forward = watched  # type: ignore[method-assign]
        tokens(one, plans([4], 4))
    assert steps == [0] * 3


def test_graphs_share_their_memory_and_go_before_the_collectives(
    checkpoint: Callable[..., Path], fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Solo, "close", lambda self: fake_gpu.log.append(("collectives closed", None)))
    with shard(checkpoint("gqa")) as one:
        tokens(one, plans([4, 2, 1], 2 + 2))
    pools = [pool for what, pool in fake_gpu.log if what == "capture"]
    assert len(pools) == 3 and len(set(map(str, pools))) == 1
    ends = [what for what, _ in fake_gpu.log if what in ("reset", "collectives closed")]
    assert ends == ["reset"] * 3 + ["collectives closed"]
    before_reset = [what for what, _ in fake_gpu.log][: [what for what, _ in fake_gpu.log].index("reset")]
    assert before_reset[-1] == "sync"


def test_what_cannot_be_captured_is_said_once_and_computed_all_the_same(
    checkpoint: Callable[..., Path], fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def refuse(run: Any, pool: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    with shard(checkpoint("gqa"), "reference") as one:
        expected = tokens(one, plans([], 0))
    monkeypatch.setattr(fake_gpu, "capture", refuse)
    with shard(checkpoint("gqa")) as one, caplog.at_level(logging.WARNING):
        got = tokens(one, plans([4, 2], 4))
    assert got[:1] + got[3:] == expected
    said = [record.getMessage() for record in caplog.records if "can be captured" in record.getMessage()]
    assert len(said) == 1 and "4 rows" in said[0] and "--kv-memory" in said[0]


def test_after_a_capture_that_failed_others_succeed(
    checkpoint: Callable[..., Path], fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, fails = Llama.compute, [True]

    def failing(self: Llama, inputs: Inputs, alone: bool = False) -> torch.Tensor:
        if fails and not alone:
            fails.pop()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(self, inputs, alone)

    with shard(checkpoint("gqa")) as one:
        prefill, *captures = plans([4, 2], 4, 1)[:3]
        tokens(one, [prefill])
        monkeypatch.setattr(Llama, "compute", failing)
        tokens(one, captures)
        assert isinstance(one._model, CudaLlama) and one._model._graphs is not None
        assert list(one._model._graphs._graphs) == [2]


def test_ranks_warm_up_alone(checkpoint: Callable[..., Path], fake_gpu: FakeGpu) -> None:
    """If memory runs out there on one rank, the others do not wait for its part of a sum."""
    meetings: list[str] = []

    class Counted(Solo):
        def all_reduce_(self, x: torch.Tensor) -> None:
            meetings.append("warm" if not any(what == "capture" for what, _ in fake_gpu.log) else "capture")

    with closing(Shard(small_spec(checkpoint("gqa"), attention="cuda"), Counted(), 1)) as one:
        one.load()
        one.allocate(12)
        meetings.clear()
        one.step(StepPlan(0, capture=4))
    assert set(meetings) == {"capture"} and len(meetings) == 5, "the embedding's, and two a layer"


def test_a_step_that_a_graph_has_no_room_for_is_launched(
    checkpoint: Callable[..., Path], fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DecodeGraph, "takes", lambda self, size, num_slots: False)
    with shard(checkpoint("gqa"), "reference") as one:
        expected = tokens(one, plans([], 0))
    with shard(checkpoint("gqa")) as one:
        got = tokens(one, plans([4], 4))
    assert got[:1] + got[2:] == expected
    assert "replay" not in [what for what, _ in fake_gpu.log]


def test_a_gpu_s_kernels_are_checked_once(
    checkpoint: Callable[..., Path], fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Any] = []
    monkeypatch.setattr(llama, "check_kernels", lambda *args: checked.append(args))
    with shard(checkpoint("gqa")) as one:
        assert one._model is not None and one._kv_cache is not None
        one._model.detach()
        one._model.attach(one._kv_cache)
    assert len(checked) == 1 and checked[0][1] == (0, 2, 4, 6, 8)


def test_without_a_gpu_there_are_no_graphs(checkpoint: Callable[..., Path]) -> None:
    with shard(checkpoint("gqa")) as one:
        tokens(one, plans([4], 4))
        assert isinstance(one._model, CudaLlama)
        assert one._model._graphs is not None and not one._model._graphs._graphs
