"""Under every KV policy the logits are those of the oracle, however the heads are split and the text is cut, and
whatever is preempted, computed again, found, restored or handed over on the way."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from headwise.cluster.group import ShardGroupDied
from headwise.runtime import LLM, RequestOutput, SamplingParams, start
from headwise.runtime.engine.engine import Engine
from headwise.runtime.kv.cost import RestoreCost
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.format import kv_format
from headwise.workers.kv.policy import KvPolicy, resolve_policy
from headwise.workers.plan import StepOutput
from headwise.workers.spec import ShardSpec
from tests.checkpoints import write_mistral
from tests.conftest import MakeLLM
from tests.policy_oracle import Oracle
from tests.runtime.handoff.sides import Sides
from tests.thread_group import ThreadShardGroup, thread_groups

SHAPE = "uneven"  # 2 layers, 9 query and 3 KV heads of 16
BLOCK = 16
GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logprobs=0)
LENGTHS = (1, 15, 33, 70, 100)

ONE_GROUP = ["window:1", "window:20", "sinks:4,28", "sinks:20,13"]
MIXED = {
    "by layer": "dense@0;sinks:4,28@*",
    "by head": "window:20@0.0,1.1;dense",
    "three groups": "sinks:3,14@0.1;window:40@1.2,0.0;dense",
    "bounded": "window:33@1;sinks:5,11",
}
POLICIES = ["dense", *ONE_GROUP, *MIXED.values()]
KV_DTYPES = ["bfloat16", "int8", "int4", "int8/int4"]


class Tolerance(NamedTuple):
    """How far logits may be off, as a part of the largest. Of integers and narrow floats, those close to the middle
    between two may be rounded to either side, and are off by a step then."""

    dense: float = 3e-5
    float32: float = 1e-5
    rounded: float = 3e-2


TOLERANCE = Tolerance()


class Judge:
    """Knows what is right for one checkpoint."""

    def __init__(self, directory: Path) -> None:
        self._oracle = Oracle(directory)
        self._known: dict[tuple[str, str, tuple[int, ...]], torch.Tensor] = {}

    def check(self, outputs: list[RequestOutput], policy: str, kv_dtype: str = "float32") -> None:
        for output in outputs:
            for sample in output.outputs:
                logprobs = [step[token].logprob for step, token in zip(sample.logprobs, sample.token_ids, strict=True)]
                self.check_tokens(output.prompt_token_ids, sample.token_ids, logprobs, policy, kv_dtype)

    def check_tokens(
        self, prompt: list[int], tokens: list[int], logprobs: list[float], policy: str, kv_dtype: str
    ) -> None:
        """Each token is the most likely one, and as likely as is said."""
        logits_TV = self._logits(tuple(prompt + tokens[:-1]), policy, kv_dtype)[len(prompt) - 1 :]
        part = TOLERANCE.dense if policy == "dense" else TOLERANCE.float32
        if kv_dtype != "float32":
            part = TOLERANCE.rounded
        tolerance = 2 * part * logits_TV.abs().max()  # of a logit, and of the logarithm of the sum of all
        expected_TV = logits_TV.log_softmax(-1)
        chosen_T = expected_TV[torch.arange(len(tokens)), torch.tensor(tokens)]
        error = (torch.tensor(logprobs, dtype=torch.float64) - chosen_T).abs().max()
        assert error <= tolerance, f"off by {float(error):.2g}, at most {float(tolerance):.2g}"
        assert (expected_TV.amax(-1) - chosen_T).max() <= tolerance

    def _logits(self, tokens: tuple[int, ...], policy: str, kv_dtype: str) -> torch.Tensor:
        key = (policy, kv_dtype, tokens)
        if key not in self._known:
            self._known[key] = self._oracle.logits(list(tokens), resolved(policy), kv_format(kv_dtype, 16))
        return self._known[key]


@cache
def resolved(policy: str) -> KvPolicy:
    return resolve_policy(policy, 2, 3)


@pytest.fixture(scope="module")
def judge(checkpoint: Callable[..., Path]) -> Judge:
    return Judge(checkpoint(SHAPE))


@pytest.fixture
def llm_of(checkpoint: Callable[..., Path], thread_llm: MakeLLM) -> Callable[..., LLM]:
    """Makes LLMs of a policy."""

    def make(policy: str, tp: int = 1, **settings: Any) -> LLM:
        common: dict[str, Any] = {"kv_memory": "4MiB", "max_model_len": 256, "max_num_batched_tokens": 37}
        settings = common | {"max_mixed_prefill_tokens": 13} | settings
        return thread_llm(checkpoint(SHAPE), kv_policy=policy, tensor_parallel_size=tp, **settings)

    return make


def some_tokens(seed: int, count: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(3, 256) for _ in range(count)]


def prompts() -> list[list[int]]:
    return [some_tokens(length, length) for length in LENGTHS]


def token_ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def settled(llm: LLM) -> None:
    """Nothing is left, and the books add up."""
    stats = llm.stats()
    assert stats["num_free_blocks"] == stats["num_blocks"]
    assert all(group["num_free_blocks"] == group["num_blocks"] for group in stats["kv_groups"])
    llm._loop.run(Engine.check_integrity)


def some(values: list[Any], fast: set[int]) -> list[Any]:
    """Those at other places are slow."""
    return [pytest.param(*v, marks=[] if at in fast else [pytest.mark.slow]) for at, v in enumerate(values)]


# Splits and chunks

SPLITS = [(policy, tp) for policy in POLICIES for tp in (1, 2, 3)]


@pytest.mark.parametrize(("policy", "tp"), some(SPLITS, {3 * at + at % 3 for at in range(len(POLICIES))}))
def test_logprobs_are_those_of_the_oracle(llm_of: Callable[..., LLM], judge: Judge, policy: str, tp: int) -> None:
    llm = llm_of(policy, tp)
    judge.check(llm.generate(prompts(), GREEDY, use_tqdm=False), policy)
    assert llm.stats()["kv_policy"] == resolved(policy).text
    settled(llm)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("chunk", [3, 16, 61, 2048])
@pytest.mark.parametrize("policy", POLICIES)
def test_chunks_change_nothing(llm_of: Callable[..., LLM], judge: Judge, policy: str, chunk: int, depth: int) -> None:
    settings = {"max_num_batched_tokens": chunk, "max_mixed_prefill_tokens": chunk, "pipeline_depth": depth}
    outputs = llm_of(policy, **settings).generate(prompts(), GREEDY, use_tqdm=False)
    judge.check(outputs, policy)
    alone = [llm_of(policy).generate(prompt, GREEDY, use_tqdm=False)[0] for prompt in prompts()]
    assert [o.outputs[0].logprobs for o in alone] == [o.outputs[0].logprobs for o in outputs], "not the same bits"


# Preemption, recovery


@pytest.mark.parametrize(
    ("policy", "tp", "kv_dtype", "blocks"),
    some(
        [
            ("sinks:4,28", 1, None, 9),
            ("window:33@1;sinks:5,11", 2, None, 9),
            ("window:20", 2, "int8", 7),
            ("sinks:20,13", 3, "int8/int4", 9),
            ("window:16", 1, "int4", 4),
            ("window:20@0.0,1.1;dense", 1, None, 10),
            ("dense@0;sinks:4,28@*", 2, "int8", 10),
            ("sinks:3,14@0.1;window:40@1.2,0.0;dense", 3, "bfloat16", 10),
        ],
        {0, 1, 3},
    ),
)
def test_preemption_changes_nothing(
    llm_of: Callable[..., LLM], judge: Judge, policy: str, tp: int, kv_dtype: str | None, blocks: int
) -> None:
    wanted = GREEDY.clone(max_tokens=48)
    texts = [*prompts(), some_tokens(7, 90), some_tokens(8, 80)]
    llm = llm_of(policy, tp, kv_dtype=kv_dtype, num_blocks=blocks, max_model_len=160)
    outputs = llm.generate(texts, wanted, use_tqdm=False)
    assert llm.stats()["num_preemptions"] > 0
    settled(llm)
    judge.check(outputs, policy, kv_dtype or "float32")
    plenty = llm_of(policy, tp, kv_dtype=kv_dtype).generate(texts, wanted, use_tqdm=False)
    assert token_ids(outputs) == token_ids(plenty)


class MortalGroup(ThreadShardGroup):
    """Dies in a step, unless as many have died as are to."""

    deaths_left = 0
    last_step = 12

    def __init__(self, spec: ShardSpec) -> None:
        super().__init__(spec)
        self.steps_left = MortalGroup.last_step

    def collect(self) -> StepOutput:
        self.steps_left -= 1
        if self.steps_left <= 0 and MortalGroup.deaths_left > 0:
            MortalGroup.deaths_left -= 1
            assert self._mailbox is not None
            self._mailbox.declare_dead(0, "killed by a test")
            raise ShardGroupDied(0, "here", "killed by a test")
        return super().collect()


@pytest.mark.parametrize(
    ("policy", "tp", "kv_dtype"),
    some(
        [
            ("sinks:4,28", 2, None),
            ("dense@0;sinks:4,28@*", 1, None),
            ("window:20", 1, "int8"),
            ("sinks:20,13", 3, None),
            ("window:33@1;sinks:5,11", 3, "int4"),
            ("window:20@0.0,1.1;dense", 2, "int8/int4"),
        ],
        {0, 4},
    ),
)
def test_recovery_changes_nothing(
    llm_of: Callable[..., LLM],
    judge: Judge,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    tp: int,
    kv_dtype: str | None,
) -> None:
    plenty = llm_of(policy, tp, kv_dtype=kv_dtype).generate(prompts(), GREEDY, use_tqdm=False)
    monkeypatch.setattr(start, "make_factory", thread_groups(MortalGroup))
    monkeypatch.setattr(MortalGroup, "deaths_left", 2)
    llm = llm_of(policy, tp, kv_dtype=kv_dtype)
    outputs = llm.generate(prompts(), GREEDY, use_tqdm=False)
    assert MortalGroup.deaths_left == 0
    settled(llm)
    judge.check(outputs, policy, kv_dtype or "float32")
    assert token_ids(outputs) == token_ids(plenty)


# Prefix hits, tiers, handoff


@pytest.mark.parametrize(
    ("policy", "tp", "kv_dtype"),
    some(
        [
            ("sinks:4,28", 1, None),
            ("dense@0;sinks:4,28@*", 2, "int8"),
            ("window:20", 3, None),
            ("sinks:20,13", 2, "int4"),
            ("window:1", 1, None),
            ("window:33@1;sinks:5,11", 1, None),
            ("sinks:3,14@0.1;window:40@1.2,0.0;dense", 3, None),
            ("dense", 1, "int8/int4"),
        ],
        {0, 1},
    ),
)
def test_hits_change_nothing(
    llm_of: Callable[..., LLM], judge: Judge, policy: str, tp: int, kv_dtype: str | None
) -> None:
    llm = llm_of(policy, tp, kv_dtype=kv_dtype, num_blocks=48)
    shared = some_tokens(1, 96)
    llm.generate(shared + some_tokens(2, 70), GREEDY, use_tqdm=False)
    outputs = llm.generate([shared + some_tokens(seed, 9) for seed in (3, 4)], GREEDY, use_tqdm=False)
    assert [output.num_cached_tokens for output in outputs] == [96, 96], "shared beyond the window"
    longer = outputs[0].prompt_token_ids + outputs[0].outputs[0].token_ids + some_tokens(5, 3)
    [again] = llm.generate(longer, GREEDY, use_tqdm=False)
    assert again.num_cached_tokens == (105 + 29) // BLOCK * BLOCK, "what was generated, too"
    judge.check([*outputs, again], policy, kv_dtype or "float32")
    # Once other texts have taken all of the memory, nothing is there that could be mistaken for it.
    capacity = llm.stats()["num_blocks"] * BLOCK
    for seed in range(10, 10 + capacity // 200 + 1):
        llm.generate(some_tokens(seed, 200), GREEDY.clone(max_tokens=1), use_tqdm=False)
    [late] = llm.generate(longer, GREEDY, use_tqdm=False)
    assert late.outputs[0].token_ids == again.outputs[0].token_ids
    settled(llm)


@pytest.fixture
def always_restore(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model computes faster than anything could be restored."""
    monkeypatch.setattr(RestoreCost, "worth", lambda self, blocks, tokens: True)


@pytest.mark.parametrize(
    ("policy", "tp", "kv_dtype", "on_disk"),
    some(
        [
            ("sinks:4,28", 2, "int8", True),
            ("window:20", 1, None, False),
            ("sinks:20,13", 1, "int4", False),
            ("dense", 3, "int8/int4", True),
            ("dense", 1, "bfloat16", False),
            ("window:16", 2, None, True),
        ],
        {0},
    ),
)
@pytest.mark.usefixtures("always_restore")
def test_what_tiers_bring_back_changes_nothing(
    llm_of: Callable[..., LLM],
    judge: Judge,
    tmp_path: Path,
    policy: str,
    tp: int,
    kv_dtype: str | None,
    on_disk: bool,
) -> None:
    tiers: dict[str, Any] = {"host_kv_memory": "8MiB"}
    if on_disk:
        tiers = {"host_kv_memory": "32KiB", "disk_kv_path": tmp_path / "kv"}
    llm = llm_of(policy, tp, kv_dtype=kv_dtype, num_blocks=16, **tiers)
    off = llm_of(policy, tp, kv_dtype=kv_dtype, enable_prefix_caching=False)
    restored = 0
    texts = [some_tokens(seed, 100) for seed in range(4)]
    for turn in range(3):
        for text in texts:
            prompt = text + some_tokens(turn, 8)
            [output] = llm.generate(prompt, GREEDY, use_tqdm=False)
            restored += output.metrics.num_restored_tokens
            assert output.outputs[0].token_ids == token_ids(off.generate(prompt, GREEDY, use_tqdm=False))[0]
            judge.check([output], policy, kv_dtype or "float32")
    assert restored > 0
    found = llm.stats()["prefix_cache"]["tiers"]
    assert found["host"]["damaged"] == 0 and found["host"]["inserted_tokens"] > 0
    settled(llm)


@pytest.mark.parametrize(
    ("policy", "kv_dtype", "prefill", "decode"),
    some(
        [
            ("sinks:4,28", "int8", 2, 1),
            ("window:20", None, 1, 3),
            ("sinks:20,13", "int4", 1, 1),
            ("dense", "int8/int4", 3, 2),
            ("dense", "bfloat16", 1, 2),
            ("window:16", "int8", 2, 2),
        ],
        {0},
    ),
)
def test_a_handoff_changes_nothing(
    checkpoint: Callable[..., Path],
    llm_of: Callable[..., LLM],
    judge: Judge,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    kv_dtype: str | None,
    prefill: int,
    decode: int,
) -> None:
    shared = some_tokens(1, 80)
    texts = [*prompts(), shared + some_tokens(2, 40), shared + some_tokens(3, 9)]
    alone = [llm_of(policy, decode, kv_dtype=kv_dtype).generate(text, GREEDY, use_tqdm=False)[0] for text in texts]
    sides = Sides(
        monkeypatch,
        checkpoint(SHAPE),
        prefill={"tensor_parallel_size": prefill},
        tensor_parallel_size=decode,
        kv_policy=policy,
        kv_dtype=kv_dtype,
        max_num_batched_tokens=37,
    )
    try:
        outputs = [sides.llm.generate(text, GREEDY, use_tqdm=False)[0] for text in texts]
        assert token_ids(outputs) == token_ids(alone)
        judge.check(outputs, policy, kv_dtype or "float32")
        assert sides.llm.stats()["handoff"]["committed"] == 4 and not sides.llm.stats()["handoff"]["fallbacks"]
        assert outputs[-1].num_cached_tokens == 80, "what was handed over before is found"
        again = sides.llm.generate(texts, GREEDY, use_tqdm=False)
        assert token_ids(again) == token_ids(alone)
        sides.settle()
    finally:
        sides.close()


# Text without end


@pytest.mark.parametrize(
    ("policy", "tp"),
    some([("sinks:4,28", 1), ("window:20", 2), ("window:33@1;sinks:5,11", 3), ("sinks:20,13", 1)], {0}),
)
def test_a_text_goes_on_past_the_models_length(llm_of: Callable[..., LLM], judge: Judge, policy: str, tp: int) -> None:
    llm = llm_of(policy, tp, max_model_len=64)
    outputs = llm.generate([some_tokens(1, 50), some_tokens(2, 7)], GREEDY.clone(max_tokens=300), use_tqdm=False)
    assert [len(ids) for ids in token_ids(outputs)] == [300, 300]
    judge.check(outputs, policy)
    settled(llm)


def test_a_text_without_end_finds_room_beside_pins(llm_of: Callable[..., LLM]) -> None:
    """Its window is longer than any prompt."""
    llm = llm_of("sinks:4,200", max_model_len=64, num_blocks=24, kv_memory=None)
    llm.pin_prefix(some_tokens(1, 49), 1000.0)
    with pytest.raises(InvalidValueError, match="must still have room"):
        llm.pin_prefix(some_tokens(2, 49), 1000.0)
    outputs = llm.generate(some_tokens(9, 20), GREEDY.clone(max_tokens=300), use_tqdm=False)
    assert [len(ids) for ids in token_ids(outputs)] == [300]


@pytest.mark.slow
def test_a_text_without_end_goes_on_when_the_decode_ranks_die(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is longer than what prefill engines take, and than what the memory holds without a window."""
    settings: dict[str, Any] = {"max_model_len": 64, "num_blocks": 8, "kv_memory": None}
    sides = Sides(monkeypatch, checkpoint(SHAPE), kv_policy="sinks:4,28", max_num_batched_tokens=37, **settings)
    try:
        params = GREEDY.clone(max_tokens=170, logprobs=None)
        [alone] = token_ids(sides.llm.generate(some_tokens(1, 50), params, use_tqdm=False))
        sides.llm.reset_prefix_cache()
        got: list[int] = []
        for delta in sides.llm.stream(some_tokens(1, 50), params):
            if len(got) < 140 <= len(got) + len(delta.token_ids):
                sides.kill_decode_ranks()
            got += delta.token_ids
        assert got == alone
        assert sides.llm.stats()["recoveries"]["count"] == 1
        sides.settle()
    finally:
        sides.close()


def test_dense_text_ends_at_the_models_length(llm_of: Callable[..., LLM]) -> None:
    llm = llm_of("dense", max_model_len=64)
    with pytest.raises(InvalidValueError, match="kv_policy"):
        llm.generate(some_tokens(1, 50), GREEDY.clone(max_tokens=300), use_tqdm=False)


def test_a_model_that_was_trained_with_a_window_has_that(
    checkpoint: Callable[..., Path], thread_llm: MakeLLM, judge: Judge, tmp_path: Path
) -> None:
    directory = write_mistral(tmp_path, checkpoint(SHAPE), 20)
    llm = thread_llm(directory, kv_memory="4MiB", max_model_len=256, max_num_batched_tokens=37)
    judge.check(llm.generate(prompts(), GREEDY, use_tqdm=False), "window:20")
    assert llm.stats()["kv_policy"] == "window:20"
