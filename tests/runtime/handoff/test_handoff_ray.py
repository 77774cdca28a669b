"""The demo model on Ray actors: prompts computed by one group of processes and continued by another give the tokens of
one process that does both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headwise.runtime import LLM, RequestOutput, SamplingParams, StructuredOutputsParams
from tests.test_end_to_end import QUESTIONS

pytestmark = pytest.mark.slow

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
# Few tokens where a seed picks them: another order of sums may tip what is nearly a tie, with or without a handoff.
ASKED = [
    SamplingParams(temperature=0, max_tokens=48, ignore_eos=True),
    SamplingParams(temperature=0.8, top_k=20, seed=5, max_tokens=16),
    SamplingParams(temperature=0, max_tokens=48, structured_outputs=StructuredOutputsParams(json=PERSON)),
    SamplingParams(temperature=0.8, top_k=20, seed=7, n=2, max_tokens=16),
]


def answers(llm: LLM) -> list[RequestOutput]:
    """16 requests, each kind of sampling with every question of four."""
    chats = [
        [{"role": "system", "content": f"You are helper {number}."}, {"role": "user", "content": question}]
        for number, question in enumerate([*QUESTIONS, *QUESTIONS])
    ]
    return llm.chat(chats, [ASKED[number % len(ASKED)] for number in range(len(chats))])


def results(outputs: list[RequestOutput]) -> list[Any]:
    return [[(sample.token_ids, sample.text, sample.finish_reason) for sample in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def right(smollm2: Path) -> list[Any]:
    with LLM(smollm2, executor="local", max_model_len=512, kv_memory="256MiB", quiet=True) as llm:
        return results(answers(llm))


@pytest.mark.parametrize(("prefill", "decode"), [(1, 2), (3, 2), (2, 1)])
def test_tokens_are_those_of_one_process(smollm2: Path, right: list[Any], prefill: int, decode: int) -> None:
    with LLM(
        smollm2,
        prefill={"tensor_parallel_size": prefill},
        decode={"tensor_parallel_size": decode},
        handoff_min_tokens=0,
        max_model_len=512,
        kv_memory="256MiB",
        quiet=True,
    ) as llm:
        outputs = answers(llm)
        assert results(outputs) == right
        assert all(output.metrics is not None and output.metrics.prefilled_by == "prefill" for output in outputs)
        stats = llm.stats()
        assert stats["handoff"]["committed"] == 16 and not stats["handoff"]["fallbacks"]
        assert stats["num_free_blocks"] == stats["num_blocks"]
        assert stats["prefill"]["num_free_blocks"] == stats["prefill"]["num_blocks"]
        assert len(stats["shard_pids"]) == decode
