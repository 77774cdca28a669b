"""The promise the project stands on: the tokens are those of transformers, however the heads are split."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from headwise.runtime import SamplingParams
from tests.checkpoints import SHAPES, reference_model, reference_tokens
from tests.conftest import MakeLLM
from tests.effort import thorough

LENGTHS = (1, 15, 16, 17, 100)
CASES = [
    pytest.param(
        *(shape, tied, tp),
        id=f"{shape}-{'tied' if tied else 'untied'}-tp{tp}",
        # Whether the vocabulary's rows are stored twice has nothing to do with heads: CI takes every shape with every
        # number of ranks once, and each of both with tied rows and untied ones.
        marks=[pytest.mark.slow] if tied == (number + tp) % 2 else [],
    )
    for number, shape in enumerate(SHAPES)
    for tied in (True, False)
    for tp in (1, 2, 3, 4)
    if tp <= SHAPES[shape][0]
]
_references: dict[Path, list[list[int]]] = {}


def prompts() -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(3, 256) for _ in range(length)] for length in LENGTHS]


def expected(directory: Path, count: int = 48) -> list[list[int]]:
    if directory not in _references:
        model = reference_model(directory)
        _references[directory] = [reference_tokens(model, prompt, count) for prompt in prompts()]
    return _references[directory]


@pytest.mark.parametrize(("shape", "tied", "tp"), CASES)
def test_greedy_tokens_are_those_of_transformers(
    checkpoint: Callable[..., Path], thread_llm: MakeLLM, shape: str, tied: bool, tp: int
) -> None:
    directory = checkpoint(shape, tie_word_embeddings=tied)
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    for depth in (1, 2):
        # 37 tokens a step, 13 beside a decode: both cut the 100-token prompt in the middle of a block.
        llm = thread_llm(
            directory,
            tensor_parallel_size=tp,
            max_num_batched_tokens=37,
            max_mixed_prefill_tokens=13,
            pipeline_depth=depth,
        )
        mixed = [output.outputs[0].token_ids for output in llm.generate(prompts(), params)]
        assert mixed == expected(directory)
    alone = [llm.generate(prompt, params)[0].outputs[0].token_ids for prompt in prompts()]
    assert alone == mixed


@pytest.mark.parametrize(("tp", "depth"), [thorough(1, 1), (1, 2), (2, 1), thorough(2, 2)])
def test_depth_and_preemption_do_not_change_tokens(
    checkpoint: Callable[..., Path], thread_llm: MakeLLM, tp: int, depth: int
) -> None:
    directory = checkpoint("uneven")
    # 5 prompts of up to 148 tokens want 26 blocks; 10 hold the longest alone, so others are preempted.
    llm = thread_llm(
        directory,
        tensor_parallel_size=tp,
        max_num_batched_tokens=37,
        pipeline_depth=depth,
        num_blocks=10,
        max_model_len=160,
    )
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    outputs = llm.generate(prompts(), params)
    assert [output.outputs[0].token_ids for output in outputs] == expected(directory)
    assert llm.stats()["num_preemptions"] > 0
    assert llm.stats()["num_free_blocks"] == 10


def test_biases_and_llama3_rope(checkpoint: Callable[..., Path], thread_llm: MakeLLM) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    directory = checkpoint("uneven", attention_bias=True, mlp_bias=True, rope_parameters=rope)
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    for tp, depth in ((1, 1), (1, 2), (2, 1), (4, 2)):
        llm = thread_llm(directory, tensor_parallel_size=tp, pipeline_depth=depth)
        outputs = llm.generate(prompts(), params)
        assert [output.outputs[0].token_ids for output in outputs] == expected(directory)


@pytest.mark.parametrize(("tp", "depth"), [thorough(1, 1), (1, 2), (2, 2), thorough(3, 1)])
def test_seeded_sampling_depends_on_seed_and_position_only(
    checkpoint: Callable[..., Path], thread_llm: MakeLLM, tp: int, depth: int
) -> None:
    directory = checkpoint("uneven")
    params = SamplingParams(temperature=1.2, top_p=0.95, top_k=50, seed=11, max_tokens=40, ignore_eos=True)
    others = SamplingParams(temperature=0.7, max_tokens=40, ignore_eos=True)
    prompt = prompts()[3]
    alone = thread_llm(directory, pipeline_depth=1).generate(prompt, params)[0].outputs[0].token_ids
    batch = thread_llm(directory, tensor_parallel_size=tp, pipeline_depth=depth).generate(
        [*[prompts()[2]] * 15, prompt], [*[others] * 15, params]
    )
    assert batch[-1].outputs[0].token_ids == alone
    small = thread_llm(directory, tensor_parallel_size=tp, num_blocks=8, max_model_len=128, pipeline_depth=depth)
    outputs = small.generate([prompts()[2], prompts()[2], prompt], [others, others, params])
    assert outputs[-1].outputs[0].token_ids == alone
    assert small.stats()["num_preemptions"] > 0
