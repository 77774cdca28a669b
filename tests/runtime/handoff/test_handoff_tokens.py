"""What is computed in two places is what one engine gives: the tokens, and every byte of what was handed over."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, permutations
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from headwise.runtime import LLM, RequestOutput, SamplingParams
from headwise.runtime.engine.engine import Engine
from tests.byte_tokenizer import VOCAB, write_byte_tokenizer
from tests.checkpoints import SHAPES, write_checkpoint
from tests.effort import thorough
from tests.runtime.handoff.sides import Sides
from tests.runtime.test_structured_parity import REGEX, SCHEMA, params

BLOCK = 16
LENGTHS = (5, 15, 16, 17, 32, 33, 48, 49, 100, 63)
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"
PAIRS = [
    ("uneven", 2, 3, True),
    ("grouped", 4, 1, False),
    thorough("uneven", 1, 2, False),
    thorough("uneven", 3, 2, True),
]
PAIRS += [thorough("uneven", 2, 1, True), thorough("grouped", 3, 4, True), thorough("mqa", 2, 4, False)]
SAMPLED = [
    params(),
    params(seed=1, n=2),
    params(json=SCHEMA),
    params(seed=2, regex=REGEX),
    params(seed=3),
    params(seed=4, n=2, json=SCHEMA),
]


def prompt(seed: int, length: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(3, 256) for _ in range(length)]


ASKED = [(prompt(length, length), SAMPLED[index % len(SAMPLED)]) for index, length in enumerate(LENGTHS)]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def results(outputs: list[RequestOutput]) -> list[Any]:
    """With logarithms as good as sums of another order are."""
    return [
        [
            (sample.token_ids, sample.text, sample.finish_reason, sample.stop_reason, _rounded(sample.logprobs))
            for sample in output.outputs
        ]
        for output in outputs
    ]


def _rounded(logprobs: Any) -> Any:
    if logprobs is None:
        return None
    return [
        {token: (entry.rank, pytest.approx(entry.logprob, abs=1e-3)) for token, entry in table.items()}
        for table in logprobs
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small model that has a tokenizer and a chat template, by shape."""
    made: dict[str, Path] = {}

    def make(shape: str = "uneven") -> Path:
        if shape not in made:
            folder = made[shape] = write_checkpoint(tmp_path_factory.mktemp(shape), *SHAPES[shape], vocab_size=VOCAB)
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=write_byte_tokenizer(folder), eos_token="</s>")
            tokenizer.chat_template = TEMPLATE
            tokenizer.save_pretrained(folder)
        return made[shape]

    return make


@pytest.fixture(scope="module")
def alone(model: Callable[[str], Path]) -> Callable[..., list[Any]]:
    """What an engine that computes everything itself gives; each is computed once."""
    known: dict[str, list[Any]] = {}

    def generate(shape: str, name: str, run: Callable[[LLM], list[RequestOutput]]) -> list[Any]:
        if f"{shape} {name}" not in known:
            settings: dict[str, Any] = {"executor": "local", "kv_memory": "16MiB", "max_model_len": 256}
            with LLM(model(shape), quiet=True, enable_prefix_caching=False, **settings) as llm:
                known[f"{shape} {name}"] = results(run(llm))
        return known[f"{shape} {name}"]

    return generate


@contextmanager
def two_sides(model: Path, **settings: Any) -> Iterator[Sides]:
    with pytest.MonkeyPatch.context() as patch:
        sides = Sides(patch, model, **settings)
        try:
            yield sides
            sides.settle()
        finally:
            sides.close()


def mixed(llm: LLM) -> list[RequestOutput]:
    return llm.generate([ids for ids, _ in ASKED], [wanted for _, wanted in ASKED])


@pytest.mark.parametrize(("shape", "prefill", "decode", "shared_memory"), PAIRS)
def test_everything_is_as_it_is_alone(
    model: Callable[[str], Path],
    alone: Callable[..., list[Any]],
    shape: str,
    prefill: int,
    decode: int,
    shared_memory: bool,
) -> None:
    settings = {"tensor_parallel_size": prefill, "max_num_batched_tokens": 37}
    with two_sides(model(shape), prefill=settings, tensor_parallel_size=decode, shared_memory=shared_memory) as sides:
        outputs = mixed(sides.llm)
        assert results(outputs) == alone(shape, "mixed", mixed)
        for output in outputs:
            handed_over = (len(output.prompt_token_ids) - 1) // BLOCK * BLOCK
            metrics = output.metrics
            assert metrics is not None and metrics.num_handoff_tokens == handed_over
            assert metrics.prefilled_by == (f"127.0.0.1:{sides.port}" if handed_over else None)
        again = mixed(sides.llm)
        assert results(again) == results(outputs)
        assert not any(output.metrics.num_handoff_tokens for output in again if output.metrics)
        for ids, _ in ASKED:
            here, there = sides.decode_kv(ids), sides.prefill_kv(ids)
            blocks = (len(ids) - 1) // BLOCK
            assert len(there) == 2 * 2 * SHAPES[shape][1] * blocks
            assert there.items() <= here.items()
        stats = sides.llm.stats()["handoff"]
        assert stats["committed"] == sum(len(ids) > BLOCK for ids, _ in ASKED) and not stats["fallbacks"]


def test_chats_salts_and_streams(model: Callable[[str], Path], alone: Callable[..., list[Any]]) -> None:
    messages = [{"role": "user", "content": "Tell me all that you know of abcabcabc and 12 true things, é or 日本."}]

    def chat(llm: LLM) -> list[RequestOutput]:
        return [llm.chat(messages, GREEDY, cache_salt=salt)[0] for salt in ("", "a", "b", "a")]

    with two_sides(model("uneven"), prefill={"tensor_parallel_size": 2}) as sides:
        outputs = chat(sides.llm)
        assert results(outputs) == alone("uneven", "chat", chat)
        tokens = [output.metrics.num_handoff_tokens for output in outputs if output.metrics]
        # Each salt has blocks of its own, on both sides.
        assert tokens[0] == tokens[1] == tokens[2] > 0 and tokens[3] == 0
        assert sides.prefill.stats()["prefix_cache"]["hit_tokens"] == 0
        ids = outputs[0].prompt_token_ids
        here = [sides.decode_kv(ids, salt) for salt in ("", "a", "b")]
        assert here[0] == here[1] == here[2] and here[0] and not sides.decode_kv(ids, "c")
        streamed = [delta.token_ids for delta in sides.llm.stream(messages, GREEDY, cache_salt="d")]
        assert list(chain.from_iterable(streamed)) == outputs[0].outputs[0].token_ids


@pytest.mark.parametrize("length", [33, thorough(32), thorough(49)])
def test_prompts_that_differ_in_the_last_token_never_get_each_others(
    model: Callable[[str], Path], alone: Callable[..., list[Any]], length: int
) -> None:
    same = prompt(99, length - 1)
    prompts = [[*same, last] for last in (7, 8, 9)]

    def one_by_one(llm: LLM) -> list[RequestOutput]:
        return [llm.generate([ids], GREEDY)[0] for ids in prompts]

    right = alone("uneven", f"last {length}", one_by_one)
    assert len({str(result) for result in right}) == 3
    settings = {"tensor_parallel_size": 3, "max_num_batched_tokens": 16}
    with two_sides(model("uneven"), prefill=settings, tensor_parallel_size=2) as sides:
        for order in permutations(range(3)):
            for at_once in (False, True):
                sides.llm.reset_prefix_cache()
                before = sides.llm.stats()["handoff"]["committed"]
                if at_once:
                    outputs = sides.llm.generate([prompts[index] for index in order], GREEDY)
                else:
                    outputs = [sides.llm.generate([prompts[index]], GREEDY)[0] for index in order]
                assert results(outputs) == [right[index] for index in order]
                assert sides.llm.stats()["handoff"]["committed"] > before


def test_only_what_decode_lacks_travels(model: Callable[[str], Path], alone: Callable[..., list[Any]]) -> None:
    first, second = prompt(1, 70), [*prompt(1, 50), *prompt(2, 60)]

    def both(llm: LLM) -> list[RequestOutput]:
        return [llm.generate([ids], params(seed=6))[0] for ids in (first, second)]

    with two_sides(model("uneven"), prefill={"tensor_parallel_size": 2}, tensor_parallel_size=3) as sides:
        outputs = both(sides.llm)
        assert results(outputs) == alone("uneven", "partly", both)
        metrics = outputs[1].metrics
        assert metrics is not None and metrics.num_cached_tokens == 96 and metrics.num_handoff_tokens == 96 - 48
        assert sides.prefill.stats()["prefix_cache"]["hit_tokens"] == 48  # prefill had the same blocks
        # Now prefill has all of it, and decode nothing.
        sides.llm._loop.run(Engine.reset_prefix_cache)
        again = sides.llm.generate([second], params(seed=6))
        assert results(again) == results(outputs[1:])
        assert again[0].metrics is not None and again[0].metrics.num_handoff_tokens == 96
        assert sides.prefill.stats()["prefix_cache"]["hit_tokens"] > 48
        assert sides.prefill_kv(second).items() <= sides.decode_kv(second).items()


def test_a_reset_forgets_on_both_sides(model: Callable[[str], Path]) -> None:
    with two_sides(model("uneven")) as sides:
        sides.llm.generate([prompt(1, 70)], GREEDY)
        assert sides.prefill_kv(prompt(1, 70)) and sides.decode_kv(prompt(1, 70))
        sides.llm.reset_prefix_cache()
        assert not sides.prefill_kv(prompt(1, 70)) and not sides.decode_kv(prompt(1, 70))


def many(llm: LLM) -> list[RequestOutput]:
    prompts = [prompt(seed, 60 + seed) for seed in range(8)]
    wanted = [SamplingParams(temperature=0.9, seed=seed, max_tokens=60, ignore_eos=True) for seed in range(8)]
    return llm.generate(prompts, wanted)


@pytest.mark.parametrize("few_at", ["decode", "prefill", thorough("both")])
def test_where_blocks_are_few(model: Callable[[str], Path], alone: Callable[..., list[Any]], few_at: str) -> None:
    few, enough = {"num_blocks": 16}, {"num_blocks": 100}
    with two_sides(
        model("uneven"),
        prefill={"tensor_parallel_size": 2} | (enough if few_at == "decode" else few),
        tensor_parallel_size=2,
        **(enough if few_at == "prefill" else few),
    ) as sides:
        outputs = many(sides.llm)
        assert results(outputs) == alone("uneven", "many", many)
        stats = sides.llm.stats()
        assert (stats["num_preemptions"] > 0) == (few_at != "prefill") and stats["handoff"]["committed"] >= 8
        assert not stats["handoff"]["fallbacks"]


def test_with_tiers_at_decode(model: Callable[[str], Path], alone: Callable[..., list[Any]], tmp_path: Path) -> None:
    tiers = {"host_kv_memory": "64KiB", "disk_kv_path": str(tmp_path), "disk_kv_limit": "16MiB"}
    with two_sides(
        model("uneven"), prefill={"tensor_parallel_size": 2}, tensor_parallel_size=2, num_blocks=20, **tiers
    ) as sides:
        for _ in range(3):
            outputs = many(sides.llm)
            assert results(outputs) == alone("uneven", "many", many)
            handed = sum(output.metrics.num_handoff_tokens for output in outputs if output.metrics)
            restored = sum(output.metrics.num_restored_tokens for output in outputs if output.metrics)
            sides.settle()
        assert handed or restored
