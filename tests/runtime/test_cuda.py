"""A whole engine on one GPU, in this process: the tokens, the memory it takes, and that it gives all of it back."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from headwise.runtime import LLM, SamplingParams
from headwise.workers.collectives import connect, open_rendezvous
from headwise.workers.errors import InvalidValueError
from tests.runtime.test_parity import expected, prompts

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GREEDY = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
ENGINE: dict[str, Any] = {"executor": "local", "device": "cuda", "kv_memory": "64MiB", "quiet": True}


def tokens(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts(), GREEDY)]


@pytest.mark.parametrize("depth", [1, 2])
def test_greedy_tokens_are_those_of_transformers(checkpoint: Callable[..., Path], depth: int) -> None:
    directory = checkpoint("uneven")
    with LLM(directory, **ENGINE, max_num_batched_tokens=37, pipeline_depth=depth) as llm:
        assert tokens(llm) == expected(directory)


def test_auto_is_the_dtype_of_the_checkpoint(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    LlamaForCausalLM.from_pretrained(checkpoint("gqa"), dtype=torch.bfloat16).save_pretrained(tmp_path)
    with LLM(tmp_path, **ENGINE) as llm:
        assert llm._inputs.identity is not None and llm._inputs.identity.dtype == "bfloat16"
        outputs = llm.generate(prompts(), GREEDY)
    assert [output.outputs[0].finish_reason for output in outputs] == ["length"] * len(outputs)


def test_sampling_and_logprobs(checkpoint: Callable[..., Path]) -> None:
    params = SamplingParams(
        temperature=0.8, top_k=20, seed=3, max_tokens=12, logprobs=2, repetition_penalty=1.1, ignore_eos=True
    )
    found = []
    for device in ("cuda", "cpu"):
        with LLM(checkpoint("gqa"), **ENGINE | {"device": device}) as llm:
            found.append([output.outputs[0].token_ids for output in llm.generate(prompts(), params)])
    assert found[0] == found[1]


def test_blocks_come_back_from_host_memory(checkpoint: Callable[..., Path]) -> None:
    directory = checkpoint("gqa")
    # The prompts' blocks fit once: each round pushes those of the round before to the host.
    settings = ENGINE | {"num_blocks": 16, "max_model_len": 160, "host_kv_memory": "8MiB"}
    with LLM(directory, **settings) as llm:
        rounds = [tokens(llm) for _ in range(3)]
        stats = llm.stats()
    assert rounds == [expected(directory)] * 3
    assert stats["shards"][0]["host_kv_bytes"] > 0


def test_closing_gives_the_memory_back_to_the_gpu(checkpoint: Callable[..., Path]) -> None:
    directory = checkpoint("gqa")
    with LLM(directory, **ENGINE) as llm:  # what the first use of a GPU takes for good, such as cuBLAS's workspace
        tokens(llm)
    gc.collect()
    torch.cuda.empty_cache()
    reserved, (free, _) = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()
    with LLM(directory, **ENGINE | {"kv_memory": "1GiB"}) as llm:
        tokens(llm)
        assert torch.cuda.memory_reserved() > reserved + (900 << 20)
    assert torch.cuda.memory_reserved() <= reserved
    assert torch.cuda.mem_get_info()[0] >= free - (64 << 20)


def test_memory_that_the_gpu_does_not_have_is_refused(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InvalidValueError, match=r"^kv_memory='900GiB': \d+ blocks take \d+ bytes, .*of GPU memory"):
        LLM(checkpoint("gqa"), **ENGINE | {"kv_memory": "900GiB"})


def test_a_fraction_is_of_the_memory_that_is_free(checkpoint: Callable[..., Path]) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    with LLM(checkpoint("gqa"), **ENGINE | {"kv_memory": 0.01}) as llm:
        [taken] = llm.stats()["kv_bytes_per_rank"]
    assert 0.008 * free < taken <= 0.01 * free


def test_a_second_engine_gets_as_many_blocks(checkpoint: Callable[..., Path]) -> None:
    """And what steps were measured to need is enough for them, though KV has nearly all the rest."""
    sampled = SamplingParams(temperature=0.8, top_p=0.5, repetition_penalty=1.1, logprobs=20, max_tokens=48)
    blocks = []
    for _ in range(3):
        with LLM(checkpoint("gqa"), **ENGINE | {"kv_memory": 0.95}) as llm:
            blocks.append(llm.stats()["num_blocks"])
            llm.generate(prompts() * 40, [GREEDY, sampled] * (20 * len(prompts())))
    assert blocks[1] == blocks[2]  # the first use of a GPU takes some of it for good


def test_nccl_meets_on_the_first_gpu() -> None:
    peers = connect(open_rendezvous("nccl", 1), 0, 1, 60.0, "cuda")
    x = torch.arange(8, dtype=torch.float32, device="cuda")
    peers.all_reduce_(x)
    assert peers.all_gather(x[None], [8]).tolist() == [list(range(8))]
    peers.barrier()
    peers.close()
