"""Structured outputs are what was asked for, and the same tokens whoever computes them, and beside whom."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from headwise.runtime import LLM, RequestOutput, SamplingParams, StructuredOutputsParams
from headwise.runtime.engine.engine import Engine
from tests.byte_tokenizer import EOS, VOCAB, write_byte_tokenizer
from tests.checkpoints import write_checkpoint
from tests.conftest import MakeLLM
from tests.effort import thorough

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["cat", "dög", None]},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "kind", "age"],
    "additionalProperties": False,
}
REGEX = r"(\d{3}-){2}[a-f]{4,8}(é|日本)?"
CHOICE = ["red", "green", "grün 😀", 'a "quoted" \\ one\nof two lines']
# So many ways to go on after "ababb" that the parser gives up.
TOO_AMBIGUOUS = (
    'start: "abab" body\nbody: '
    + " | ".join(f"r{i}" for i in range(200))
    + "".join(f'\nr{i}: "b" r{i} "c{i}" | "b"' for i in range(200))
)


def params(seed: int | None = None, n: int = 1, max_tokens: int = 60, **structured: Any) -> SamplingParams:
    """Greedy without a seed; without anything structured, free text."""
    wanted = StructuredOutputsParams(**structured) if structured else None
    base = SamplingParams(n=n, max_tokens=max_tokens, structured_outputs=wanted, ignore_eos=not structured)
    if seed is None:
        return base.clone(temperature=0)
    return base.clone(temperature=1.3, top_p=0.95, top_k=40, seed=seed, logprobs=2, frequency_penalty=0.5)


MIXED = [
    params(json=SCHEMA),
    params(seed=1, json=SCHEMA, n=2),
    params(),
    params(seed=2, regex=REGEX),
    params(regex=REGEX),
    params(seed=3),
    params(seed=4, choice=CHOICE, n=2),
    params(seed=5, grammar='start: "(" start? ")" | "[" start* "]"'),
]


def prompts(count: int, length: int = 40) -> list[list[int]]:
    """Half of them start like the first."""
    chance = random.Random(3)
    first = [chance.randrange(3, 256) for _ in range(length)]
    return [
        [
            *(first[: length - 5] if index % 2 else []),
            *(chance.randrange(3, 256) for _ in range(length - 30 * (index % 2))),
        ]
        for index in range(count)
    ]


Result = tuple[list[int], str, Any, Any]


def results(outputs: list[RequestOutput]) -> list[list[Result]]:
    """By prompt and sample."""
    return [
        [(sample.token_ids, sample.text, sample.finish_reason, sample.stop_reason) for sample in output.outputs]
        for output in outputs
    ]


def check(outputs: list[RequestOutput], asked: list[SamplingParams]) -> int:
    """Each is what was asked for, or the beginning of it; returns how many are complete."""
    complete = 0
    for output, wanted in zip(outputs, asked, strict=True):
        assert output.error is None and len(output.outputs) == wanted.n
        for sample in output.outputs:
            structured = wanted.structured_outputs
            assert sample.finish_reason == "length" or (structured is not None and sample.finish_reason == "stop")
            if structured is None:
                continue
            assert EOS not in sample.token_ids[:-1]
            assert (sample.token_ids[-1] == EOS) == (sample.finish_reason == "stop")
            if sample.finish_reason == "stop":
                complete += 1
                check_text(sample.text, structured)
            elif structured.choice is not None:
                assert any(choice.startswith(sample.text.rstrip("\ufffd")) for choice in structured.choice)
    return complete


def check_text(text: str, structured: StructuredOutputsParams) -> None:
    if structured.regex is not None:
        assert re.fullmatch(structured.regex, text, re.ASCII)
    elif structured.choice is not None:
        assert text in structured.choice
    elif structured.grammar is not None:
        assert text.count("(") + text.count("[") == text.count(")") + text.count("]") > 0
    elif structured.json_object:
        assert isinstance(json.loads(text), dict)
    else:
        found = json.loads(text)
        assert set(SCHEMA["required"]) <= set(found) <= set(SCHEMA["properties"])  # type: ignore[call-overload]
        assert isinstance(found["name"], str) and len(found["name"]) <= 6
        assert found["kind"] in ("cat", "dög", None) and found["age"] in range(121)
        assert all(tag in (True, False) for tag in found.get("tags", [])) and len(found.get("tags", [])) <= 3


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_checkpoint(tmp_path_factory.mktemp("spoken"), 9, 3, vocab_size=VOCAB)
    PreTrainedTokenizerFast(tokenizer_object=write_byte_tokenizer(directory), eos_token="</s>").save_pretrained(
        directory
    )
    return directory


@pytest.fixture
def make(spoken: Path, thread_llm: MakeLLM) -> Callable[..., LLM]:
    def made(tp: int = 1, depth: int = 2, **settings: Any) -> LLM:
        settings = {"max_model_len": 160, "max_num_batched_tokens": 37} | settings
        return thread_llm(spoken, tensor_parallel_size=tp, pipeline_depth=depth, **settings)

    return made


@pytest.fixture(scope="module")
def alone() -> dict[str, list[list[Result]]]:
    """What each request of MIXED gives alone, computed once."""
    return {}


def expected(make: Callable[..., LLM], kept: dict[str, list[list[Result]]]) -> list[list[Result]]:
    if not kept:
        llm = make(tp=1, depth=1, enable_prefix_caching=False)
        outputs = [llm.generate(p, s)[0] for p, s in zip(prompts(len(MIXED)), MIXED, strict=True)]
        assert check(outputs, MIXED) >= 6
        kept["alone"] = results(outputs)
    return kept["alone"]


@pytest.mark.parametrize(
    ("tp", "depth", "caching"),
    [
        # make test takes each tp and depth once.
        (tp, depth, caching) if (tp + depth) % 2 == caching else thorough(tp, depth, caching)
        for tp in (1, 2, 3)
        for depth in (1, 2)
        for caching in (True, False)
    ],
)
def test_a_mixed_batch_gives_what_each_gives_alone(
    make: Callable[..., LLM], alone: dict[str, list[list[Result]]], tp: int, depth: int, caching: bool
) -> None:
    llm = make(tp, depth, enable_prefix_caching=caching)
    for _ in range(2):  # again, with the grammars compiled and the prompts cached
        outputs = llm.generate(prompts(len(MIXED)), MIXED)
        assert results(outputs) == expected(make, alone)
    assert any(output.num_cached_tokens for output in outputs) == caching
    llm._loop.run(Engine.check_integrity)


@pytest.mark.parametrize(
    ("tp", "depth", "caching"), [(1, 1, True), (2, 2, True), thorough(1, 2, False), thorough(3, 1, False)]
)
def test_preemption(
    make: Callable[..., LLM], alone: dict[str, list[list[Result]]], tp: int, depth: int, caching: bool
) -> None:
    llm = make(tp, depth, enable_prefix_caching=caching, num_blocks=10)
    assert results(llm.generate(prompts(len(MIXED)), MIXED)) == expected(make, alone)
    stats = llm.stats()
    assert stats["num_preemptions"] > 0 and stats["num_free_blocks"] == 10
    llm._loop.run(Engine.check_integrity)


def test_what_is_free_is_the_same_beside_what_is_not(make: Callable[..., LLM]) -> None:
    llm = make(tp=2)
    free = [params(), params(seed=9), params(seed=10, n=2)]
    several = prompts(6)
    without = results(llm.generate(several[:3], free))
    beside = llm.generate(several, [*free, params(json=SCHEMA), params(seed=1, regex=REGEX), params(json_object=True)])
    assert results(beside)[:3] == without


@pytest.mark.parametrize(
    ("tp", "depth", "caching"),
    [
        *((1, 1, False), (2, 2, True)),
        *(thorough(*case) for case in ((1, 1, True), (1, 2, False), (1, 2, True), (2, 2, False))),
    ],
)
def test_a_grammar_that_fails_on_the_way_ends_its_request_alone(
    make: Callable[..., LLM], tp: int, depth: int, caching: bool
) -> None:
    """Though they share a prompt, and are computed in the same steps."""
    llm = make(tp, depth, enable_prefix_caching=caching)
    prompt = prompts(1, 70)[0]
    asked = [
        params(),
        params(grammar=TOO_AMBIGUOUS),
        params(seed=2, json=SCHEMA),
        params(grammar=TOO_AMBIGUOUS, seed=3, n=2),
    ]
    good = [llm.generate(prompt, asked[index])[0] for index in (0, 2)]
    for _ in range(2):
        if caching:
            llm.reset_prefix_cache()
        outputs = llm.generate([prompt] * 4, asked)
        assert results([outputs[0], outputs[2]]) == results(good)
        for failed in (outputs[1], outputs[3]):
            assert failed.error is not None and "Current row has" in failed.error
            for sample in failed.outputs:
                assert sample.finish_reason == "error" and "abab".startswith(sample.text) and sample.text
    stats = llm.stats()
    assert stats["num_free_blocks"] == stats["num_blocks"]
    llm._loop.run(Engine.check_integrity)


@pytest.mark.parametrize(("tp", "depth"), [thorough(1, 1), thorough(1, 2), (2, 2)])
def test_a_grammar_that_the_shard_cannot_compile_ends_its_requests_alone(
    make: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch, tp: int, depth: int
) -> None:
    """Their first token fails, when nobody has verified the blocks of the prompt that they share with others."""
    llm = make(tp, depth)
    prompt = prompts(1, 70)[0]
    asked = [params(choice=CHOICE), params(), params(seed=4), params(seed=1, choice=CHOICE)]
    good = [llm.generate(prompt, wanted)[0] for wanted in asked[1:3]]
    llm.reset_prefix_cache()
    unreadable = "the tokenizer is on another host"

    def load_tokenizer(*about: object) -> None:
        raise OSError(unreadable)

    monkeypatch.setattr("headwise.workers.sampling.grammar.load_tokenizer", load_tokenizer)
    outputs = llm.generate([prompt] * 4, asked)
    assert results(outputs[1:3]) == results(good)
    for failed in (outputs[0], outputs[3]):
        assert failed.outputs[0].finish_reason == "error" and failed.outputs[0].token_ids == []
        assert failed.error == f"the grammar cannot be compiled on this host: {unreadable}"
    stats = llm.stats()
    assert stats["num_free_blocks"] == stats["num_blocks"]
    llm._loop.run(Engine.check_integrity)


def test_what_ends_other_outputs_ends_these(make: Callable[..., LLM]) -> None:
    llm = make()
    prompt = prompts(1)[0]
    structured = StructuredOutputsParams(regex="[ab]{3}-[ab]{300}")
    base = SamplingParams(temperature=0, max_tokens=8, structured_outputs=structured)
    [whole] = llm.generate(prompt, base)
    assert (whole.outputs[0].finish_reason, len(whole.outputs[0].token_ids)) == ("length", 8)
    [stopped] = llm.generate(prompt, base.clone(stop="-"))
    assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("stop", "-")
    assert stopped.outputs[0].text == whole.outputs[0].text.split("-")[0]
    [longest] = llm.generate(prompt, base.clone(max_tokens=None))
    assert len(longest.prompt_token_ids) + len(longest.outputs[0].token_ids) == 160
    assert re.fullmatch("[ab]{3}-[ab]*", longest.outputs[0].text)


def test_the_model_says_how_likely_it_was(make: Callable[..., LLM]) -> None:
    """Log-probabilities are the model's own, of all tokens."""
    llm = make()
    prompt = prompts(1)[0]
    [free] = llm.generate(prompt, params(max_tokens=1).clone(logprobs=3))
    [forced] = llm.generate(prompt, params(max_tokens=1, choice=["zz", "z"]).clone(logprobs=3))
    assert forced.outputs[0].text == "z"
    assert forced.outputs[0].logprobs is not None and free.outputs[0].logprobs is not None
    most_likely = free.outputs[0].logprobs[0]
    assert most_likely.items() <= forced.outputs[0].logprobs[0].items()


def test_many_requests_of_few_grammars(make: Callable[..., LLM]) -> None:
    llm = make(max_num_seqs=16)
    asked = [params(seed=i, regex=f"[a-d]{{1,{1 + i % 40}}}", max_tokens=20) for i in range(80)]
    outputs = llm.generate(prompts(80, 36), asked)
    assert check(outputs, asked) > 40
    again = llm.generate(prompts(80, 36)[::-1], asked[::-1])
    assert results(again)[::-1] == results(outputs)


@pytest.mark.thorough
def test_the_demo_model_fills_in_a_form(smollm2: Path, thread_llm: MakeLLM) -> None:
    questions = ["Describe a cat named Ada, aged 3, as JSON.", "A telephone number?", "Which colour is grass?", "Hi!"]
    chats = [[{"role": "user", "content": question}] for question in questions]
    asked = [
        params(json=SCHEMA),
        params(seed=1, regex=r"\d{3}-\d{4}"),
        params(seed=2, choice=["red", "green", "blue"], n=2),
        params(seed=3, max_tokens=12),
    ]
    llm = thread_llm(smollm2, max_model_len=256, num_blocks=64)
    outputs = llm.chat(chats, asked)
    assert check(outputs, asked) == 4
    assert results([llm.chat(chat, wanted)[0] for chat, wanted in zip(chats, asked, strict=True)]) == results(outputs)
