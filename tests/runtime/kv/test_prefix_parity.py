"""The prefix cache changes no token, whatever is shared, evicted, preempted or restored."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from headwise.runtime import LLM, RequestOutput, SamplingParams, start
from headwise.runtime.engine.engine import Engine
from headwise.runtime.kv.cost import RestoreCost
from headwise.runtime.kv.identity import TokenBlocks
from headwise.workers.plan import StepPlan
from tests.checkpoints import write_checkpoint
from tests.conftest import MakeLLM
from tests.effort import thorough
from tests.thread_group import ThreadShardGroup, thread_groups

BLOCK = 16
DEADLINE_S = 60.0
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.2, top_p=0.95, top_k=50, seed=11, max_tokens=12, ignore_eos=True)
SHAPE = "uneven"  # 3 KV heads: 1, 2 and 3 ranks have up to 3, 2 and 1 of them


def block_bytes(tp: int) -> int:
    """Of a block on the rank with the most KV heads: K and V, layers, heads, tokens, head_dim, float32."""
    return 2 * 2 * {1: 3, 2: 2, 3: 1}[tp] * BLOCK * 16 * 4


def some_tokens(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(3, 256) for _ in range(count)]


def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    """By prompt and sample."""
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


def cached(outputs: list[RequestOutput]) -> list[int]:
    return [output.num_cached_tokens for output in outputs]


def full(count: int) -> int:
    """The tokens of so many that lie in full blocks."""
    return count // BLOCK * BLOCK


def prefix_stats(llm: LLM) -> dict[str, Any]:
    stats: dict[str, Any] = llm.stats()["prefix_cache"]
    return stats


def without_cache(model: Path, prompts: list[list[int]]) -> list[list[list[int]]]:
    """The greedy tokens of an engine that shares nothing."""
    settings = {"executor": "local", "cpus_per_rank": 1, "kv_memory": "64MiB", "quiet": True}
    with LLM(model, enable_prefix_caching=False, **settings) as llm:
        return tokens(llm.generate(prompts, GREEDY))


def settle(llm: LLM) -> None:
    """Takes steps until none of them has anything saved, and nothing is on its way."""

    def jobs(engine: Engine) -> int:
        assert engine.generation.tiers is not None
        return -1 if engine.has_work else engine.generation.ledger._next_id

    deadline, before = time.monotonic() + DEADLINE_S, -1
    while (now := llm._loop.run(jobs)) < 0 or now != before:
        assert time.monotonic() < deadline
        if now >= 0:
            before = now
            llm.generate([3], GREEDY.clone(max_tokens=1))


@pytest.fixture
def always_restore(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model computes faster than anything could be restored."""
    monkeypatch.setattr(RestoreCost, "worth", lambda self, blocks, tokens: True)


@pytest.fixture
def pair(checkpoint: Callable[..., Path], thread_llm: MakeLLM) -> Callable[..., tuple[LLM, LLM]]:
    """Makes an LLM with a prefix cache, and its like without."""

    def make(tp: int = 1, plain: dict[str, Any] | None = None, **settings: Any) -> tuple[LLM, LLM]:
        settings |= {"tensor_parallel_size": tp}
        off = thread_llm(checkpoint(SHAPE), enable_prefix_caching=False, **settings | (plain or {}))
        return thread_llm(checkpoint(SHAPE), **settings), off

    return make


# What is shared on the device


def workload(seed: int) -> Iterator[tuple[list[list[int]], list[SamplingParams]]]:
    """Calls of a few prompts that start alike: with parts of each other, of earlier ones, or of nothing."""
    chance = random.Random(seed)
    known = [some_tokens(chance, 90) for _ in range(2)]
    for _ in range(6):
        prompts = []
        for _ in range(chance.randint(1, 5)):
            start = chance.choice(known)[: chance.randint(0, 90)]
            prompts.append(start + some_tokens(chance, chance.randint(1, 40)))
            known.append(prompts[-1])
        choices = [GREEDY, GREEDY.clone(max_tokens=30), SEEDED, SEEDED.clone(n=2)]
        yield prompts, [chance.choice(choices) for _ in prompts]


@pytest.mark.parametrize(
    ("tp", "depth", "eviction", "blocks"),
    [
        thorough(1, 1, "lru", None),
        (1, 2, "cost_aware", 12),
        (2, 1, "cost_aware", None),
        thorough(2, 2, "lru", 12),
        (3, 1, "lru", 12),
        thorough(3, 2, "cost_aware", None),
    ],
)
def test_random_prompts_that_start_alike(
    pair: Callable[..., tuple[LLM, LLM]], tp: int, depth: int, eviction: str, blocks: int | None
) -> None:
    # 37 tokens a step cut prompts in the middle of a block.
    settings = {"pipeline_depth": depth, "max_num_batched_tokens": 37, "num_blocks": blocks, "max_model_len": 176}
    on, off = pair(tp, prefix_eviction=eviction, **settings)
    for prompts, params in workload(seed=tp * 10 + depth):
        assert tokens(on.generate(prompts, params)) == tokens(off.generate(prompts, params))
    stats = prefix_stats(on)
    assert stats["hit_tokens"] > 0 and prefix_stats(off)["hit_tokens"] == 0
    assert bool(stats["evictions"].get("room")) == (blocks is not None)
    on._loop.run(Engine.check_integrity)


@pytest.mark.parametrize(("tp", "depth"), [thorough(1, 1), (1, 2), (2, 2), thorough(3, 1)])
def test_the_next_turn_of_a_chat_finds_all_before_it(pair: Callable[..., tuple[LLM, LLM]], tp: int, depth: int) -> None:
    on, off = pair(tp, pipeline_depth=depth)
    chance = random.Random(depth)
    chats: list[list[int]] = [some_tokens(chance, 21), some_tokens(chance, 40)]
    known = [0, 0]
    for turn in range(5):
        params = (GREEDY if turn % 2 else SEEDED).clone(max_tokens=23)
        outputs = on.generate(chats, params)
        assert tokens(outputs) == tokens(off.generate(chats, params))
        assert cached(outputs) == known
        for index, [answer] in enumerate(tokens(outputs)):
            # The last token of an answer is never computed.
            known[index] = full(len(chats[index]) + len(answer) - 1)
            chats[index] = chats[index] + answer + some_tokens(chance, 9)
    assert min(known) > 100


@pytest.mark.parametrize(("tp", "depth"), [(1, 1), (2, 2)])
def test_whole_blocks_and_never_the_last_token(pair: Callable[..., tuple[LLM, LLM]], tp: int, depth: int) -> None:
    on, off = pair(tp, pipeline_depth=depth)
    lengths = (15, 16, 17, 31, 32, 33)
    chance = random.Random(5)
    prompts = [some_tokens(chance, length) for length in lengths]
    expected = tokens(off.generate(prompts, GREEDY))
    hits = [0, 0, 16, 16, 16, 32]
    for prompt, answer, hit in zip(prompts, expected, hits, strict=True):
        for found in (0, hit):
            outputs = on.generate(prompt, GREEDY)
            assert (tokens(outputs), cached(outputs)) == ([answer], [found])
    on.reset_prefix_cache()
    together = on.generate([prompt for prompt in prompts for _ in range(2)], GREEDY)
    assert tokens(together) == [answer for answer in expected for _ in range(2)]
    assert cached(together) == [found for hit in hits for found in (0, hit)]


@pytest.mark.parametrize(
    ("tp", "depth", "eviction"),
    [thorough(1, 1, "cost_aware"), (1, 2, "lru"), (2, 2, "cost_aware"), thorough(3, 2, "lru")],
)
def test_preemption(pair: Callable[..., tuple[LLM, LLM]], tp: int, depth: int, eviction: str) -> None:
    """9 requests want 10 blocks each, 3 of them the same in groups of three."""
    on, off = pair(
        tp, pipeline_depth=depth, prefix_eviction=eviction, num_blocks=24, max_model_len=192, plain={"num_blocks": 256}
    )
    chance = random.Random(8)
    starts = [some_tokens(chance, 50) for _ in range(3)]
    prompts = [starts[index % 3] + some_tokens(chance, 50) for index in range(9)]
    params = [(SEEDED if index % 4 == 3 else GREEDY).clone(max_tokens=48) for index in range(9)]
    for _ in range(2):
        assert tokens(on.generate(prompts, params)) == tokens(off.generate(prompts, params))
    stats = on.stats()
    assert stats["num_preemptions"] > 0 and stats["num_free_blocks"] == 24
    assert off.stats()["num_preemptions"] == 0
    assert stats["prefix_cache"]["hit_tokens"] > 0
    on._loop.run(Engine.check_integrity)


@pytest.mark.parametrize(("tp", "depth"), [thorough(1, 2), (2, 1)])
def test_what_many_share_is_computed_once(
    checkpoint: Callable[..., Path], thread_llm: MakeLLM, tp: int, depth: int
) -> None:
    directory = checkpoint(SHAPE, max_position_embeddings=2048)
    settings = {"tensor_parallel_size": tp, "pipeline_depth": depth}
    chance = random.Random(9)
    shared = some_tokens(chance, 1024)
    prompts = [shared + some_tokens(chance, 10) for _ in range(16)]
    params = GREEDY.clone(max_tokens=4)
    llm = thread_llm(directory, **settings)
    outputs = llm.generate(prompts, params)
    assert cached(outputs) == [0] + [1024] * 15
    stats = prefix_stats(llm)
    assert (stats["queried_tokens"], stats["hit_tokens"]) == (16 * 1034, 15 * 1024)
    assert (stats["inserted_tokens"], stats["duplicate_blocks"]) == (1024, 0)
    plain = thread_llm(directory, enable_prefix_caching=False, **settings)
    assert tokens(outputs) == tokens(plain.generate(prompts, params))


@pytest.mark.parametrize(("tp", "depth"), [(1, 1), (3, 2)])
def test_samples_share_their_prompt(pair: Callable[..., tuple[LLM, LLM]], tp: int, depth: int) -> None:
    on, off = pair(tp, pipeline_depth=depth)
    prompt, params = some_tokens(random.Random(3), 40), SEEDED.clone(n=2)
    outputs = on.generate(prompt, params)
    assert tokens(outputs) == tokens(off.generate(prompt, params))
    stats = prefix_stats(on)
    assert (stats["hit_tokens"], stats["queried_tokens"]) == (32, 80)
    assert stats["inserted_tokens"] == 32 + 2 * 16  # of the samples, each has filled one block of its own


# What is restored from the tiers


@pytest.mark.parametrize(
    ("tp", "depth", "eviction"), [thorough(1, 1, "lru"), (1, 2, "cost_aware"), (2, 2, "lru"), thorough(3, 2, "lru")]
)
@pytest.mark.usefixtures("always_restore")
def test_every_second_request_is_restored(
    pair: Callable[..., tuple[LLM, LLM]], tmp_path: Path, tp: int, depth: int, eviction: str
) -> None:
    settings = {"pipeline_depth": depth, "max_num_batched_tokens": 64, "max_model_len": 176}
    tiers = {"host_kv_memory": 13 * block_bytes(tp), "disk_kv_path": tmp_path / "kv"}
    on, off = pair(
        tp, **settings, **tiers, num_blocks=12, prefix_eviction=eviction, plain=dict.fromkeys((*tiers, "num_blocks"))
    )
    chance = random.Random(4)
    starts = [some_tokens(chance, length) for length in (64, 80, 96, 97, 112)]
    restored = 0
    for number in range(30):
        prompts = [
            start + some_tokens(chance, chance.randint(1, 20)) for start in chance.sample(starts, 1 + number % 2)
        ]
        params = chance.choice((GREEDY, SEEDED))
        outputs = on.generate(prompts, params)
        assert tokens(outputs) == tokens(off.generate(prompts, params))
        for output in outputs:
            metrics = output.metrics
            assert 0 <= metrics.num_restored_tokens <= metrics.num_cached_tokens < len(output.prompt_token_ids)
        restored += any(output.metrics.num_restored_tokens for output in outputs)
    found = prefix_stats(on)["tiers"]
    assert restored >= 15, (restored, found)
    assert found["host"]["hit_tokens"] > 0 and found["disk"]["hit_tokens"] > 0
    assert found["host"]["max_blocks"] == 13
    assert found["host"]["damaged"] == found["disk"]["damaged"] == found["disk"]["refused"] == 0
    settle(on)
    on._loop.run(Engine.check_integrity)


Hashes = dict[tuple[bytes, int, int, int, str], bytes]


def kv_hashes(engine: Engine, digests: list[bytes]) -> Hashes:
    """SHA-256 of what the device holds, by (block's digest, rank, layer, head, K or V)."""
    group, found = engine.generation.group, {}
    assert isinstance(group, ThreadShardGroup)
    for digest in digests:
        node = engine.generation.cache.get(digest)
        assert node is not None
        for rank, shard in enumerate(group.shards):
            kv = shard._kv_cache
            assert kv is not None
            block = torch.empty(1, *kv.block_shape, dtype=kv.dtype)
            kv.read_blocks([node.block], block)
            for layer, kv_2KSD in enumerate(block[0]):
                for head in range(kv.num_kv_heads):
                    for name, x_SD in zip("KV", kv_2KSD[:, head], strict=True):
                        data = x_SD.numpy().tobytes()
                        found[digest, rank, layer, head, name] = hashlib.sha256(data).digest()
    return found


def empty_device(engine: Engine) -> None:
    """Evicts every block, and leaves nothing of them in the memory."""
    engine.generation.cache.clear("room")
    assert isinstance(engine.generation.group, ThreadShardGroup)
    for shard in engine.generation.group.shards:
        assert shard._kv_cache is not None
        shard._kv_cache.keys.fill_(3.0)
        shard._kv_cache.values.fill_(3.0)


@pytest.mark.parametrize("tiers", ["host", "disk", "host then disk"])
@pytest.mark.parametrize("attention", ["cpu", "reference"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.usefixtures("always_restore")
def test_what_is_restored_is_what_was_evicted(
    checkpoint: Callable[..., Path], thread_llm: MakeLLM, tmp_path: Path, tp: int, attention: str, tiers: str
) -> None:
    settings: dict[str, Any] = {"tensor_parallel_size": tp, "attention": attention, "num_blocks": 32}
    if "host" in tiers:
        settings["host_kv_memory"] = (64 if tiers == "host" else 4) * block_bytes(tp)
    if "disk" in tiers:
        settings["disk_kv_path"] = tmp_path / "kv"
    llm = thread_llm(checkpoint(SHAPE), **settings)
    prompt = some_tokens(random.Random(2), 150)
    [output] = llm.generate(prompt, GREEDY)
    settle(llm)
    [request] = llm._inputs.requests("any", prompt, GREEDY, 0)
    assert isinstance(request.token_blocks, TokenBlocks)
    digests = request.token_blocks.digests
    before = llm._loop.run(lambda engine: kv_hashes(engine, digests))
    heads = 3  # all ranks' together
    assert len(before) == len(set(before.values())) == 9 * 2 * heads * 2
    llm._loop.run(empty_device)
    [again] = llm.generate(prompt, GREEDY)
    assert again.metrics.num_cached_tokens == again.metrics.num_restored_tokens == 144
    assert again.outputs[0].token_ids == output.outputs[0].token_ids
    assert llm._loop.run(lambda engine: kv_hashes(engine, digests)) == before
    found = prefix_stats(llm)["tiers"]
    assert (found["disk"]["hit_tokens"] > 0) == ("disk" in tiers) if "disk" in tiers else "disk" not in found


@pytest.mark.slow
@pytest.mark.usefixtures("always_restore")
def test_a_conversation_with_the_demo_model(smollm2: Path, thread_llm: MakeLLM) -> None:
    """On the device in the second turn, restored from host memory in the third."""
    params = GREEDY.clone(max_tokens=24)
    answers: list[list[str | None]] = []
    for settings in ({"enable_prefix_caching": False}, {"host_kv_memory": "64MiB"}):
        llm = thread_llm(smollm2, num_blocks=32, max_model_len=512, **settings)
        messages = [{"role": "system", "content": "You are a helpful assistant who answers in one short sentence."}]
        answers.append([])
        for turn, question in enumerate(("What is the capital of France?", "And of Italy?", "Which is larger?")):
            messages.append({"role": "user", "content": question})
            if turn == 2 and "host_kv_memory" in settings:
                settle(llm)
                llm._loop.run(empty_device)
            [output] = llm.chat(messages, params)
            answers[-1].append(output.outputs[0].text)
            messages.append({"role": "assistant", "content": output.outputs[0].text or ""})
    assert "Paris" in (answers[0][0] or "") and answers[0] == answers[1]
    assert output.metrics.num_restored_tokens == output.num_cached_tokens >= 64


# Logits that are not finite


@pytest.mark.parametrize(
    ("tp", "depth", "shape"),
    [
        (1, 1, (8, 4)),
        (1, 2, (8, 4)),
        (2, 2, (8, 4)),
        (1, 2, (9, 3)),  # rows that are padded
    ],
)
def test_blocks_of_a_request_that_fails_are_served_to_nobody(
    tmp_path: Path, thread_llm: MakeLLM, tp: int, depth: int, shape: tuple[int, int]
) -> None:
    bad, (heads, kv_heads) = 7, shape
    directory = write_checkpoint(tmp_path / "model", heads, kv_heads, tie_word_embeddings=False)
    weights = load_file(directory / "model.safetensors")
    weights["model.embed_tokens.weight"][bad] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    llm = thread_llm(
        directory,
        tensor_parallel_size=tp,
        pipeline_depth=depth,
        num_blocks=48,
        max_num_batched_tokens=40,
        disk_kv_path=tmp_path / "kv",
    )
    params = GREEDY.clone(logit_bias={bad: -100.0})
    shared = [token if token != bad else 8 for token in some_tokens(random.Random(6), 90)]
    healthy = [shared, shared + [5] * 20, shared[:40] + [9] * 30]
    poisoned = [shared + [bad] * 40, [bad] * 60, shared[:40] + [bad] + [9] * 30]
    expected = tokens(llm.generate(healthy, params))
    for _ in range(3):
        llm.reset_prefix_cache()
        for _ in range(2):
            mixed = [poisoned[0], healthy[0], poisoned[1], healthy[1], poisoned[2], healthy[2]]
            outputs = llm.generate(mixed, params)
            assert tokens(outputs[1::2]) == expected
            assert [output.outputs[0].finish_reason for output in outputs] == ["error", "length"] * 3
            assert tokens(outputs[::2]) == [[[]]] * 3
        assert outputs[2].num_cached_tokens == 0
    assert llm.stats()["num_free_blocks"] == 48
    llm._loop.run(Engine.check_integrity)


class FlippingGroup(ThreadShardGroup):
    """Spoils what one step wrote to a request's first block, once."""

    spoil_at = -1

    def submit(self, plan: StepPlan) -> None:
        if plan.step == self.spoil_at:
            for shard in self.shards:
                assert shard._kv_cache is not None
                shard._kv_cache.values[:, self.first_block] = float("nan")
        for admit in plan.admits[:1]:
            self.first_block = admit.block_ids[0]
        super().submit(plan)


@pytest.mark.parametrize("spoil_after", [1, 2])
def test_who_waited_for_blocks_that_turn_out_bad_computes_them(
    checkpoint: Callable[..., Path],
    thread_llm: MakeLLM,
    monkeypatch: pytest.MonkeyPatch,
    spoil_after: int,
) -> None:
    """A prompt of six steps, of which the third or so fails; two others share it, one has nothing to do with it."""
    chance = random.Random(6)
    prompts = [some_tokens(chance, 90) for _ in range(8)]
    directory = checkpoint("gqa")
    expected = tokens(thread_llm(directory, enable_prefix_caching=False).generate(prompts, GREEDY))
    monkeypatch.setattr(start, "make_factory", thread_groups(FlippingGroup))
    llm = thread_llm(directory, pipeline_depth=1, max_num_batched_tokens=16, num_blocks=32, max_model_len=128)
    group = llm._loop.engine.generation.group
    assert isinstance(group, FlippingGroup)
    group.spoil_at = spoil_after
    outputs = llm.generate([prompts[0], prompts[0], prompts[1], prompts[0]], GREEDY)
    assert [output.outputs[0].finish_reason for output in outputs] == ["error", "length", "length", "length"]
    assert tokens(outputs[1:]) == [expected[0], expected[1], expected[0]]
    for _ in range(2):
        assert tokens(llm.generate(prompts, GREEDY)) == expected
    assert llm.stats()["num_free_blocks"] == 32
    llm._loop.run(Engine.check_integrity)
