"""What an engine gives back when it is closed, and what is said of memory that is not there. The GPU is none."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from headwise.cluster.local_group import LocalShardGroup
from headwise.runtime import LLM, SamplingParams
from headwise.runtime.cli import main as cli
from headwise.workers import shard as shard_module
from headwise.workers.errors import InvalidValueError
from headwise.workers.shard import Shard
from tests.conftest import MakeLLM
from tests.runtime.test_parity import expected, prompts
from tests.workers.cuda.fake_gpu import FakeGpu, fake_gpu

__all__ = ["fake_gpu"]

GREEDY = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
ENGINE: dict[str, Any] = {"executor": "local", "quiet": True, "cpus_per_rank": 1, "max_num_batched_tokens": 128}


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is gone, then, is gone because nobody refers to it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def shard_of(llm: LLM) -> Shard:
    group = llm._loop.engine.generation.group
    assert isinstance(group, LocalShardGroup)
    shard = group._ranks[0].rank.shard
    assert shard is not None
    return shard


def kept(shard: Shard) -> dict[str, weakref.ref[Any]]:
    """What holds the memory of a shard."""
    assert shard._kv_cache is not None and shard._runner is not None
    found: dict[str, Any] = {"model": shard._model, "runner": shard._runner, "cache": shard._kv_cache}
    found |= {"keys": shard._kv_cache.keys, "values": shard._kv_cache.values}
    if shard._spec.attention == "reference":
        weights = vars(shard._model)["_weights"]
        found |= {"embedding": weights.embed_VE, "a layer": weights.layers[0].qkv_weight}
    return {name: weakref.ref(x) for name, x in found.items()}


@pytest.mark.parametrize("attention", ["cpu", "reference"])
def test_a_closed_engine_keeps_no_memory(checkpoint: Callable[..., Path], no_collector: None, attention: str) -> None:
    sampled = SamplingParams(temperature=0.8, top_p=0.5, repetition_penalty=1.1, logprobs=2, seed=1, max_tokens=8)
    with LLM(checkpoint("gqa"), **ENGINE, attention=attention, kv_memory="8MiB", host_kv_memory="1MiB") as llm:
        llm.generate(prompts(), GREEDY)
        llm.generate(prompts(), sampled)
        found = kept(shard_of(llm))
    assert [name for name, reference in found.items() if reference() is not None] == []


def test_nor_does_one_whose_step_has_failed(
    checkpoint: Callable[..., Path], no_collector: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error that everybody gets has a traceback of the step, in which the model is."""
    with LLM(checkpoint("gqa"), **ENGINE, attention="reference", kv_memory="8MiB", on_shard_death="fail") as llm:
        shard = shard_of(llm)
        found = kept(shard)

        def fail(step: object) -> None:
            raise ZeroDivisionError("for the test")

        monkeypatch.setattr(type(shard._model), "forward", lambda self, step: fail(step))
        del shard
        with pytest.raises(Exception, match="for the test") as error:
            llm.generate(prompts(), GREEDY)
    assert error.value is not None
    assert [name for name, reference in found.items() if reference() is not None] == []


def test_a_second_engine_gets_as_many_blocks(checkpoint: Callable[..., Path], fake_gpu: FakeGpu) -> None:
    """What steps need is the same again, too."""
    fake_gpu.free, fake_gpu.peak = 16 << 20, 1 << 20
    blocks = []
    for _ in range(2):
        with LLM(checkpoint("gqa"), **ENGINE, attention="reference", kv_memory=0.5) as llm:
            blocks.append(llm.stats()["num_blocks"])
            assert [output.outputs[0].token_ids for output in llm.generate(prompts(), GREEDY)] == expected(
                checkpoint("gqa")
            )
    assert blocks == [(15 << 19) // (2 * 2 * 4 * 16 * 16 * 4)] * 2


@pytest.mark.parametrize("tp", [2, 3])
def test_the_ranks_measure_steps_together(
    checkpoint: Callable[..., Path], fake_gpu: FakeGpu, thread_llm: MakeLLM, tp: int
) -> None:
    """Each all-reduce of the largest step has all ranks in it, and the steps of requests are right after it."""
    fake_gpu.free = 16 << 20
    settings = {"tensor_parallel_size": tp, "attention": "reference", "max_num_batched_tokens": 37}
    llm = thread_llm(checkpoint("uneven"), **settings, kv_memory=0.5)
    assert [what for what, _ in fake_gpu.log].count("peak") == tp
    outputs = llm.generate(prompts(), GREEDY)
    assert [output.outputs[0].token_ids for output in outputs] == expected(checkpoint("uneven"))


def run_out(*args: Any, **kwargs: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_weights_that_do_not_fit_are_one_line_of_the_command_line(
    checkpoint: Callable[..., Path],
    fake_gpu: FakeGpu,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_gpu.free = 1_000_000
    monkeypatch.setattr(shard_module, "load_shard", run_out)
    command = ["headwise", "generate", "--model", str(checkpoint("gqa")), "--executor", "local", "--cpus-per-rank", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "hello"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = [line for line in capsys.readouterr().err.splitlines() if line]
    assert end.value.code == 2
    assert said[-1] == (
        "headwise: tensor_parallel_size=1: the weights of rank 0 do not fit in the 1000000 bytes of GPU memory that "
        "were free; raise tensor_parallel_size (--tp), or take a smaller dtype (--dtype)"
    )
    assert not any("Traceback" in line for line in said)


def test_an_engine_that_was_refused_keeps_nothing(
    checkpoint: Callable[..., Path], fake_gpu: FakeGpu, no_collector: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even while its error is there."""
    made: list[weakref.ref[Any]] = []

    def forward(self: Any, step: object) -> None:
        made.extend(weakref.ref(x) for x in (self, vars(self)["_weights"].embed_VE, self.attention.cache))
        run_out()

    monkeypatch.setattr("headwise.workers.reference.llama.Llama.forward", forward)
    with pytest.raises(InvalidValueError, match=r"^max_num_batched_tokens=128: ") as error:
        LLM(checkpoint("gqa"), **ENGINE, attention="reference")
    assert len(made) == 3 and [reference() for reference in made] == [None] * 3
    assert "max_num_seqs=128" in str(error.value)
