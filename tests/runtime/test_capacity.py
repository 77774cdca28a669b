"""What a model takes of memory: known figures, and what shards really hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise.runtime import LLM, SamplingParams
from headwise.runtime.capacity import capacity, room
from headwise.runtime.engine.engine import Engine
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.cache import KVCache
from headwise.workers.kv.format import KV_DTYPES, kv_format
from headwise.workers.kv.policy import KvPolicy, resolve_policy
from headwise.workers.model.checkpoint import load_shard
from headwise.workers.model.model_config import ModelConfig, load_model_config
from headwise.workers.model.partition import partition_model
from tests.checkpoints import SHAPES

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def model(layers: int, heads: int, kv_heads: int, head_dim: int, **changes: Any) -> ModelConfig:
    made = ModelConfig(heads * head_dim, layers, heads, kv_heads, head_dim, 11008, 32_000, 4096, 1e-5)
    return replace(made, **changes)


LLAMA_2_7B = model(32, 32, 32, 128)


def test_llama_2_7b() -> None:
    taken = capacity(LLAMA_2_7B, 1, "float16", 1024)
    assert taken.attention == "MHA"
    assert taken.kv_bytes_per_token == 512 * KIB and taken.kv_bytes_per_request == 512 * MIB
    assert taken.weight_bytes == 2 * 6_738_415_616  # as its authors count its weights


def test_a_batch_of_32_requests_of_2048_tokens_in_float32() -> None:
    assert 32 * capacity(LLAMA_2_7B, 1, "float32", 2048).kv_bytes_per_request == 64 * GIB


def test_gpt_3() -> None:
    """Its keys and values; its other shapes are not those of a Llama."""
    assert capacity(model(96, 96, 96, 128), 1, "float16", 2048).kv_bytes_per_token == 4.5 * MIB


@pytest.mark.parametrize(("kv_heads", "name", "share"), [(32, "MHA", 1), (8, "GQA", 4), (1, "MQA", 32)])
def test_fewer_kv_heads_take_less(kv_heads: int, name: str, share: int) -> None:
    taken = capacity(replace(LLAMA_2_7B, num_kv_heads=kv_heads), 1, "bfloat16", 1024)
    assert taken.attention == name and taken.kv_bytes_per_token == 512 * KIB // share


def test_ranks_have_what_they_own() -> None:
    """9 query heads in 3 groups on 2 ranks; on 6 ranks each KV head is on two of them."""
    uneven = model(30, 9, 3, 64)
    per_head = 2 * 30 * 64 * 4
    two, six = (capacity(uneven, tp, "float32", 16) for tp in (2, 6))
    assert [rank.kv_bytes_per_token for rank in two.ranks] == [2 * per_head, per_head]
    assert [rank.query_heads for rank in two.ranks] == [(0, 6), (6, 9)]
    assert two.kv_bytes_per_token == 3 * per_head and six.kv_bytes_per_token > 3 * per_head


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}])
def test_weights_and_kv_are_those_that_shards_hold(
    checkpoint: Callable[..., Path], shape: str, changes: dict[str, Any]
) -> None:
    directory = checkpoint(shape, **changes)
    config = load_model_config(directory)
    for tp in (1, 2, 3):
        taken = capacity(config, tp, "bfloat16", 32)
        for rank, part in zip(taken.ranks, partition_model(config, tp), strict=True):
            weights = load_shard(directory, config, part, torch.bfloat16, torch.device("cpu"))
            held = weights.embed_VE.nbytes + weights.final_norm_E.nbytes
            held += sum(layer.nbytes for layer in weights.layers)
            held += 0 if config.tie_word_embeddings else weights.lm_head_VE.nbytes
            assert rank.weight_bytes == held
            cache = KVCache(config.num_layers, 3, part.heads.num_kv, 16, config.head_dim, torch.bfloat16)
            assert cache.nbytes == 48 * rank.kv_bytes_per_token


@given(
    tp=st.integers(1, 12),
    tokens=st.integers(1, 9000),
    block_size=st.sampled_from([1, 16, 32]),
    size=st.integers(20, 400),
    fraction=st.sampled_from(["0.5", "0.9", "1"]),
)
def test_what_fits_does_and_no_block_more_would(
    tp: int, tokens: int, block_size: int, size: int, fraction: str
) -> None:
    taken = capacity(model(32, 12, 4, 128), tp, "bfloat16", tokens, block_size)
    fits = room(taken, "gpu_memory", f"{size}GiB", fraction)
    largest = max(rank.kv_bytes_per_token for rank in taken.ranks) * block_size
    assert all(
        fits.blocks * rank.kv_bytes_per_token * block_size + rank.weight_bytes <= size * GIB for rank in taken.ranks
    )
    assert (fits.blocks + 1) * largest > min(fits.kv_bytes)
    assert taken.request_tokens % block_size == 0 and tokens <= taken.request_tokens < tokens + block_size
    assert fits.requests * taken.request_tokens <= fits.tokens < (fits.requests + 1) * taken.request_tokens


def of_llama(text: str) -> KvPolicy:
    return resolve_policy(text, 32, 32)


@pytest.mark.parametrize("text", ["dense", "sinks:4,28", "window:40@0;dense", "dense@0.1;sinks:4,28@1;window:16"])
@pytest.mark.parametrize("name", KV_DTYPES)
@pytest.mark.parametrize("tp", [1, 3])
def test_bytes_by_policy_and_form_are_those_that_a_cache_takes(text: str, name: str, tp: int) -> None:
    config = model(2, 12, 3, 32)
    policy, kept = resolve_policy(text, 2, 3), kv_format(name, 32)
    taken = capacity(config, tp, "float32", 100, policy=policy, format=kept)
    for rank, part in zip(taken.ranks, partition_model(config, tp), strict=True):
        local = policy.heads(part.heads.kv_start, part.heads.kv_stop)
        blocks = [group.request_blocks for group in taken.groups]
        cache = KVCache(2, blocks, part.heads.num_kv, 16, 32, torch.float32, format=kept, policy=local)
        assert rank.kv_bytes_per_request == cache.nbytes == taken.request_bytes(rank, 100)
    assert sum(group.kv_bytes_per_token for group in taken.groups) == taken.kv_bytes_per_token
    assert sum(group.kv_bytes_per_request for group in taken.groups) == taken.kv_bytes_per_request
    assert sum(group.heads for group in taken.groups) == 6


@pytest.mark.parametrize(
    ("name", "bytes_per_number"),
    [("float32", 4), ("float16", 2), ("int8", 1 + 4 / 128), ("int4", 0.5 + 4 / 32), ("int8/int4", 0.828125)],
)
def test_llama_2_7b_by_form(name: str, bytes_per_number: float) -> None:
    taken = capacity(LLAMA_2_7B, 1, "float16", 1024, format=kv_format(name, 128))
    assert taken.kv_bytes_per_token == 2 * 32 * 32 * 128 * bytes_per_number
    assert taken.weight_bytes == 2 * 6_738_415_616


def test_a_request_with_a_window_is_constant() -> None:
    """A block of sinks, 64 of the window, and two where it moves on."""
    for tokens in (1072, 4096, 50_000):
        taken = capacity(LLAMA_2_7B, 1, "float16", tokens, policy=of_llama("sinks:4,1020"))
        assert taken.constant_after == 67 * 16 and taken.groups[0].request_blocks == 67
        assert taken.kv_bytes_per_request == 67 * 16 * 512 * KIB and taken.kv_bytes_per_token == 512 * KIB
    short = capacity(LLAMA_2_7B, 1, "float16", 512, policy=of_llama("sinks:4,1020"))
    assert short.kv_bytes_per_request == 512 * 512 * KIB


@pytest.mark.parametrize("text", ["window:40", "sinks:4,28@0;window:16"])
def test_a_stream_holds_what_is_said_of_a_request(checkpoint: Callable[..., Path], text: str) -> None:
    directory = checkpoint("gqa")
    config = load_model_config(directory)
    policy = resolve_policy(text, config.num_layers, config.num_kv_heads)
    said = [group.request_blocks for group in capacity(config, 1, "float32", 130, policy=policy).groups]
    params = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)
    held: list[int] = []
    with LLM(directory, executor="local", device="cpu", num_blocks=256, kv_policy=text, quiet=True) as llm:
        for delta in llm.stream([5] * 10, params):
            if delta.finish_reason is None:
                stats = llm._loop.run(Engine.stats)
                held.append(stats["num_blocks"] - stats["num_free_blocks"])
    assert len(held) > 100 and said[0] - 2 <= max(held) <= said[0]


def test_half_of_the_layers_take_half_of_what_grows() -> None:
    taken = capacity(LLAMA_2_7B, 2, "float16", 4096, policy=of_llama("dense@0-15;window:256"))
    assert taken.constant_after is None
    dense, window = taken.groups
    assert (str(dense.reach), str(window.reach)) == ("dense", "window:256")
    assert dense.kv_bytes_per_token == window.kv_bytes_per_token == 256 * KIB
    assert dense.kv_bytes_per_request == 4096 * 256 * KIB and window.kv_bytes_per_request == 18 * 16 * 256 * KIB


def test_the_windows_of_a_model_count() -> None:
    trained = replace(LLAMA_2_7B, sliding_windows=(1024,) * 32)
    assert capacity(trained, 1, "float16", 4096).constant_after == 66 * 16
    assert capacity(LLAMA_2_7B, 1, "float16", 4096).constant_after is None


@given(
    text=st.sampled_from(["window:64", "sinks:4,1020", "dense@0-3;sinks:4,60", "window:16@0.3;dense", "dense"]),
    name=st.sampled_from(["float16", "int8", "int4"]),
    tokens=st.integers(1, 9000),
    size=st.integers(14, 400),
    tp=st.integers(1, 5),
)
def test_what_fits_with_windows_does(text: str, name: str, tokens: int, size: int, tp: int) -> None:
    """Every group has room for so many requests, and no group for one block more."""
    taken = capacity(LLAMA_2_7B, tp, "float16", tokens, policy=of_llama(text), format=kv_format(name, 128))
    fits = room(taken, "gpu_memory", f"{size}GiB", "0.9")

    def bytes_of(rank: int, blocks: int) -> int:
        caps = [blocks if cap is None else cap for cap in taken.caps]
        pairs = zip(taken.ranks[rank].block_bytes, caps, strict=True)
        return sum(block * min(blocks, cap) for block, cap in pairs)

    assert all(bytes_of(rank, fits.blocks) <= budget for rank, budget in enumerate(fits.kv_bytes))
    assert any(bytes_of(rank, fits.blocks + 1) > budget for rank, budget in enumerate(fits.kv_bytes))
    for group, cap in zip(taken.groups, taken.caps, strict=True):
        assert fits.requests * group.request_blocks <= min(fits.blocks, fits.blocks if cap is None else cap)


def test_heads_that_keep_different_tokens_have_no_blocks_below_the_device() -> None:
    taken = capacity(LLAMA_2_7B, 1, "float16", 1024, policy=of_llama("dense@0;window:16"))
    for field in ("host_kv_memory", "disk_kv_limit"):
        with pytest.raises(InvalidValueError, match=rf"^{field}=.*2 groups here, have no blocks there; .*--kv-policy"):
            room(taken, field, "64GiB", "0.9")


def test_a_block_on_disk_is_a_file() -> None:
    taken = capacity(LLAMA_2_7B, 1, "float16", 1024)
    host, disk = (room(taken, field, "64GiB", "0.9") for field in ("host_kv_memory", "disk_kv_limit"))
    assert host.tokens == 64 * GIB // (512 * KIB) and 0 < disk.tokens < host.tokens


def test_weights_that_do_not_fit_are_refused_with_the_numbers() -> None:
    taken = capacity(LLAMA_2_7B, 1, "float16", 1024)
    with pytest.raises(InvalidValueError, match=r"^gpu_memory=.*rank 0 take 13476831232 bytes; raise --tp"):
        room(taken, "gpu_memory", "8GiB", "0.9")


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"dtype": "int8"}, "dtype"), ({"tp": 33}, "tensor_parallel_size"), ({"request_tokens": 0}, "request_tokens")],
)
def test_what_cannot_be_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    settings: dict[str, Any] = {"tp": 1, "dtype": "float16", "request_tokens": 1024}
    with pytest.raises(InvalidValueError, match=f"^{field}="):
        capacity(LLAMA_2_7B, **settings | changes)


@pytest.mark.parametrize("size", ["lots", "0.5", "-1"])
def test_a_memory_is_a_size(size: str) -> None:
    with pytest.raises(InvalidValueError, match=r'^host_kv_memory=.*"80GiB"'):
        room(capacity(LLAMA_2_7B, 1, "float16", 1024), "host_kv_memory", size, "0.9")
